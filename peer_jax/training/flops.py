"""Training FLOPs: 3 x forward FLOPs x tokens, the same for every method.

A backward pass costs twice the forward pass. Every position of a batch counts as a token, padding included, because it
is computed; of images, every patch. ``Model.flops_by_part`` says what counts in a forward pass.
"""

import math
import re

from peer_jax.errors import InputError
from peer_jax.models import Model

TRAINING_TO_FORWARD = 3
MOST_STEPS = 2**31 - 1  # optimizers count them in 32 bits


def training_flops(model: Model, tokens: int, seq_len: int) -> float:
    """FLOPs of training on ``tokens`` tokens in rows of ``seq_len`` tokens."""
    return TRAINING_TO_FORWARD * model.flops_per_token(seq_len) * tokens


def steps_for(budget: float, model: Model, batch_size: int, seq_len: int) -> int:
    """The number of steps of ``batch_size`` rows whose training FLOPs are nearest to the budget, within half a step.

    Raises:
        InputError: if the budget is less than one step or more than ``MOST_STEPS``, or a layer does not define its
            FLOPs.
    """
    if not math.isfinite(budget):
        raise InputError(f"training_flops={budget} is not finite: give a budget such as 1e15")
    step = training_flops(model, batch_size * seq_len, seq_len)
    if budget < step:
        raise InputError(
            f"training_flops={budget:.3g} is less than the {step:.3g} of one step: "
            f"raise it, or lower batch_size={batch_size}"
        )
    if budget / step > MOST_STEPS:
        raise InputError(f"training_flops={budget:.3g} is {budget / step:.3g} steps, more than {MOST_STEPS}: lower it")
    return round(budget / step)


def short(number: float) -> str:
    """Writes FLOPs without needless zeros: 3e11 for 300000000000.0, 1.5e12 for 1500000000000.0."""
    return re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", f"{number:g}") if number >= 1e6 else f"{number:g}"
