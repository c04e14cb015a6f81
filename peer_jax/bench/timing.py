"""Measures seconds per call of competitors that take turns, and a machine's bandwidth and rate of products."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

SHORTEST_SAMPLE = 0.02  # seconds; a faster call is repeated within a sample


class Times(NamedTuple):
    """Median and quartiles of the samples, in seconds per call."""

    median: float
    low: float
    high: float
    samples: int


class Machine(NamedTuple):
    """What the machine was measured to do in this run."""

    bandwidth: float  # bytes per second
    flops_per_second: float


def summarise(samples: Sequence[float]) -> Times:
    """Median and quartiles, both ends included."""
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Times(median, low, high, len(samples))


def sampler(call: Callable[[], object]) -> Callable[[], float]:
    """A function that measures the seconds per call; ``call`` is run twice first, to warm up and to see its length.

    On CPU a call waits for the previous one. XLA would run both at once otherwise, and a program that uses one core
    would seem twice as fast.
    """
    wait = jax.block_until_ready if jax.default_backend() == "cpu" else lambda result: result
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(1, math.ceil(SHORTEST_SAMPLE / max(time.perf_counter() - start, 1e-9)))

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = wait(call())
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    return sample


def interleaved(samplers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Times]:
    """Times of each competitor. They take turns, so that a disturbance of the machine meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name, sample in samplers.items():
            samples[name].append(sample())
    return {name: summarise(taken) for name, taken in samples.items()}


def measure_machine(dtype: str = "float32", *, megabytes: int = 256, width: int = 2048, repeats: int = 5) -> Machine:
    """Measures bandwidth and the rate of products; the best of some repeats counts, because both are ceilings.

    Bandwidth is measured by ``a += s * b`` on all cores, which reads two arrays of ``megabytes`` each and writes one.
    The rate of products is measured by a square matrix product at JAX's default precision.
    """
    n = megabytes * 2**20 // 4
    add = jax.jit(lambda a, b: a + 0.5 * b, donate_argnums=0)
    a, b = jnp.ones(n, jnp.float32), jnp.ones(n, jnp.float32)
    moves = []
    for _ in range(repeats + 1):
        jax.block_until_ready((a, b))
        start = time.perf_counter()
        a = jax.block_until_ready(add(a, b))
        moves.append(time.perf_counter() - start)
    del a, b
    matrix = jnp.ones((width, width), dtype)
    multiply = jax.jit(jnp.matmul)
    product = sampler(lambda: multiply(matrix, matrix))
    return Machine(3 * 4 * n / min(moves[1:]), 2 * width**3 / min(product() for _ in range(repeats)))
