"""How long a step takes, by a short measurement."""

import statistics
import time

import jax

from peer_jax import memory
from peer_jax.errors import InputError
from peer_jax.ops import checked as with_checks
from peer_jax.sharding import part_bytes, split_batch, use
from peer_jax.training.flops import training_flops
from peer_jax.training.run import Run

MEASURED_SECONDS = 1.5
LONGEST_STEP = 30.0  # seconds
SLOWEST_CPU = 2e10  # FLOPs per second; a core does 14 to 36e9


def seconds_per_step(run: Run) -> float:
    """Median seconds of the run's training step on random inputs, placed as ``train`` places it, without compilation.

    Raises:
        InputError: if the run's state doesn't fit the device's memory, or a step would take too long to try.
    """
    placement = run.sharding.place(rows=run.batch_size // run.accumulation)
    with use(placement):
        return _measure(run)


def _measure(run: Run) -> float:
    trainer = run.trainer()
    rows, seq_len = run.batch_size, run.task.seq_len
    _check_size(trainer.abstract_state(), training_flops(trainer.abstract_model, rows * seq_len, seq_len))
    batch = split_batch(run.task.example(rows))
    rates = run.optimizer.rates(trainer.labels, 0, 10)
    step = with_checks(trainer.step) if run.checked else trainer.compiled_step()
    state, metrics = step(trainer.init(0), batch, rates)
    jax.block_until_ready(metrics)
    times: list[float] = []
    while sum(times) < MEASURED_SECONDS:
        start = time.perf_counter()
        state, metrics = step(state, batch, rates)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _check_size(state: object, step_flops: float) -> None:
    """Raises InputError if a step can't be tried on this machine."""
    if jax.default_backend() == "cpu" and step_flops > LONGEST_STEP * SLOWEST_CPU:
        raise InputError(f"a step of {step_flops:.2g} FLOPs takes too long to be tried on a CPU")
    # Beside the state, a step needs gradients, and at least as much again for activations and copies.
    memory.check(1.5 * part_bytes(state), "a step", "choose smaller sizes, or more devices to split the state over")
