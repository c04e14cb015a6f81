"""A look inside the experts of a model: how they are used, what they are for, what they cost if they are missing.

``look`` runs all analyses of a model on texts, and ``write`` shows them as a page. The functions of each module take
the arrays of a ``Trace``, which may also come from a model of one's own: for any layer with ``route``, at any number of
experts, since nothing has the size [tokens, experts].
"""

from peer_jax.analysis.experts.everything import Look, look, look_into
from peer_jax.analysis.experts.page import write
from peer_jax.analysis.experts.passes import Passes, collect, draw
from peer_jax.analysis.experts.trace import Labels, Text, Trace

__all__ = ["Labels", "Look", "Passes", "Text", "Trace", "collect", "draw", "look", "look_into", "write"]
