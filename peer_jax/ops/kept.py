"""What is kept of a block that is otherwise computed again in the backward pass (``Transformer.remat``).

Kept are arrays that are small and expensive to make: for each token its experts, their scores and their projections.
Attention's output is not: docs/performance.md says what it would cost.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"
POLICY = jax.checkpoint_policies.save_only_these_names(NAME)


def keep(arrays: Any) -> Any:
    """The same arrays, which ``POLICY`` keeps. The backward pass must use what this returns, not the arguments."""
    return checkpoint_name(arrays, NAME)
