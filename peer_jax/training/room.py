"""The least memory that a step and an evaluation take, so that what can't fit is refused before it is tried.

It is what every step holds, whatever its feed-forward layers: the parameters and the optimiser's moments, the residual
streams and, where attention holds them, its probabilities that are kept for the backward pass, and a chunk of logits.
How much more it is, the compiler decides (``peer_jax.planning.compiled``).
"""

import jax.numpy as jnp

from peer_jax import memory
from peer_jax.models import Model
from peer_jax.sharding import current, part_bytes, target
from peer_jax.startup import accelerators
from peer_jax.training.step import TrainState

FLOAT = 4  # bytes


def step_bytes(model: Model, state: TrainState, *, batch_size: int, accumulation: int, seq_len: int) -> int:
    """The least memory that a step takes on each device of the placement in use; on all, if none is in use.

    Args:
        model, state: abstract, the state as the placement in use splits it.
        batch_size, accumulation, seq_len: of the run.
    """
    tokens = batch_size // accumulation * seq_len // _devices()
    return part_bytes(state) + activation_bytes(model, tokens, seq_len, on_cpu=_on_cpu())


def activation_bytes(model: Model, tokens: int, seq_len: int, *, on_cpu: bool) -> int:
    """The least memory that a step takes on a device beside its state, for ``tokens`` tokens of this device."""
    kept = 1 if model.remat else len(model.blocks)
    streams = tokens * model.d_model * jnp.dtype(model.dtype).itemsize * len(model.blocks)
    logits = FLOAT * model.logits_at_once(tokens, seq_len)
    return kept * _probabilities(model, tokens, seq_len, on_cpu) + streams + logits


def check_step(model: Model, state: TrainState, *, batch_size: int, accumulation: int, seq_len: int) -> None:
    """An InputError if no device can hold a step; the arguments are those of ``step_bytes``."""
    memory.check(
        step_bytes(model, state, batch_size=batch_size, accumulation=accumulation, seq_len=seq_len),
        "a training step",
        f"lower batch_size={batch_size}, seq_len={seq_len}, d_model={model.d_model} or the number of experts, or raise "
        f"accumulation={accumulation}",
    )


def check_evaluation(model: Model, *, batch_size: int, seq_len: int) -> None:
    """An InputError if no device can hold a batch of an evaluation."""
    tokens = batch_size * seq_len // _devices()
    memory.check(
        _probabilities(model, tokens, seq_len, _on_cpu()) + FLOAT * model.logits_at_once(tokens, seq_len),
        f"an evaluation of batches of {batch_size} rows of {seq_len} tokens",
        "give fewer rows",
        "batch_size",
    )


def _devices() -> int:
    return 1 if current() is None else current().mesh.size


def _on_cpu() -> bool:
    # JAX is kept on the CPU where a sweep is planned for its workers.
    return target().platform == "cpu" and not accelerators()


def _probabilities(model: Model, tokens: int, seq_len: int, on_cpu: bool) -> int:
    """Bytes of attention's probabilities in a block, where they are held."""
    held = on_cpu or model.blocks[0].attention.implementation == "xla"
    return tokens * model.num_heads * seq_len * jnp.dtype(model.dtype).itemsize if held else 0
