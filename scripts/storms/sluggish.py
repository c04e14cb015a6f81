"""A module for ``--import`` that makes one process wait once: with ``SLUGGISH=compile:1:40``, process 1 compiles for
40 seconds longer than it would.
"""

import os
import time

import jax

from peer_jax.layers import PEER
from peer_jax.training import evaluators, loop
from peer_jax.training.checkpoint import Checkpoints

# The functions whose first call waits; at "import", it is the import of this module that does.
MOMENTS = {
    "compile": (PEER, "__call__"),
    "batch": (loop, "split_batch"),
    "evaluate": (evaluators.Evaluations, "_evaluate"),
    "restore": (Checkpoints, "restore"),
    "save": (Checkpoints, "save"),
    "result": (loop.result, "write"),
}


def wait_at(owner: object, name: str, seconds: float) -> None:
    """Has the first call of a function wait."""
    function, waited = getattr(owner, name), []

    def slow(*args, **kwargs):
        if not waited:
            waited.append(name)
            time.sleep(seconds)
        return function(*args, **kwargs)

    setattr(owner, name, slow)


moment, number, duration = os.environ.get("SLUGGISH", "none:-1:0").split(":")
if jax.process_index() == int(number):
    if moment == "import":
        time.sleep(float(duration))
    else:
        wait_at(*MOMENTS[moment], float(duration))
