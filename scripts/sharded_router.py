"""Product-key retrieval on several devices, sub-keys replicated or split over them: seconds, bytes sent, memory.

Usage: python scripts/sharded_router.py [--tokens 2048] [--num-experts 1048576 16777216] [--devices 2 4 8]

Tokens are split over all E devices, which are all along the ``expert`` axis. They retrieve in one of two ways:

replicated  A device has all n sub-keys of both halves and retrieves for its own tokens. Nothing is exchanged but the
            sum of the sub-keys' gradients, an all-reduce. It is what the project does: ``product_key_top_k``.
split       A device has n / E sub-keys of each half. It gathers the queries of all devices, and sends each one the
            best k of its own sub-keys for that one's tokens, which are merged there. In the backward pass it gathers
            the gradients of scores: its sub-keys' gradients are whole, those of queries are summed and scattered.

Inputs are small multiples of 1/8, so that float32 sums are exact in any order: both ways must give the same bits, ties
and gradients included, and send the bytes that docs/sharding.md has a formula for; else the script fails and prints no
table. Bytes are read from the compiled program: a device sends, on a ring, (E - 1) / E of the whole array of a
collective, of an all-reduce twice that. Memory is the compiled program's own account. Seconds are medians, all programs
taken in turns; on forced CPU devices, which share cores and memory, they are those of the work and the copies of all
devices together, not of an interconnect.
"""

import argparse
import functools
import math
import os
import re
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from peer_jax.allocator import keep_freed_memory
from peer_jax.ops import product_key_top_k
from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.product_keys import _combine, _half_scores
from peer_jax.ops.rows import sum_rows
from peer_jax.ops.sharded import TOKENS, gather, scatter_sum
from peer_jax.ops.table_gradients import table_gradients
from peer_jax.ops.top_k import top_k_columns
from peer_jax.sharding import EXPERT, Sharding, current, on_each_device, use

PARTS = P(None, EXPERT)
HEADER = (
    "experts | devices | sub-keys | forward, s | both, s | forward sends, MiB | both send, MiB | sub-keys, MiB "
    "| forward, temporary MiB | both, temporary MiB"
)


def replicated(k, sub_keys, queries, d_scores=None):
    """Scores and indices; given the gradients of scores, also those of sub-keys and queries."""
    retrieve = functools.partial(product_key_top_k, k=k)
    if d_scores is None:
        return retrieve(queries, sub_keys)
    scores, pull, indices = jax.vjp(retrieve, queries, sub_keys, has_aux=True)
    return scores, indices, *pull(d_scores)


def split(k, sub_keys, queries, d_scores=None):
    """The same."""
    found = on_each_device(functools.partial(_retrieve, k), (TOKENS, PARTS), TOKENS)(queries, sub_keys)
    if d_scores is None:
        return found
    gradients = on_each_device(_gradients, (TOKENS, PARTS, TOKENS, TOKENS), (TOKENS, PARTS))
    return *found, *gradients(queries, sub_keys, found[1], d_scores)


def _retrieve(k, queries, sub_keys):
    """Of this device's t tokens, and m = n / E sub-keys of a half, of width c: scores and indices, [t, h, k]."""
    E, (_, m, c), (t, h, _) = current().size(EXPERT), sub_keys.shape, queries.shape
    p = min(k, m)

    def best(_, queries):
        halves = queries.reshape(-1, 2, c).swapaxes(0, 1)
        found = [top_k_columns(_half_scores(halves[i : i + 1], sub_keys[i : i + 1]), p) for i in (0, 1)]
        return None, jax.tree.map(lambda a: a.T.reshape(-1, h, p), found)

    def merge(_, found):
        # Candidates are in the order of the devices: equal scores still rank by lower index.
        halves = []
        for scores, index in found:
            scores, index = (a.swapaxes(1, 2).reshape(-1, E * p).T for a in (scores, index))
            scores, place = top_k_columns(scores, min(k, E * m))
            halves += [scores, jnp.take_along_axis(index, place, axis=0, mode="promise_in_bounds")]
        return None, [a.T.reshape(-1, h, k) for a in _combine(*halves, E * m, k)]

    # Chunks of as many tokens as with all sub-keys: E times as many fill the budget, but took longer.
    _, found = scan_chunks(best, None, gather(queries), E * t, chunk_size(E * t, 4 * h * E * m))
    found = [(scores, index + m * jax.lax.axis_index(EXPERT)) for scores, index in found]
    exchange = functools.partial(jax.lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=1)
    found = jax.tree.map(lambda a: exchange(a.reshape(E, t, h, p)), found)  # to [t, E, h, p]
    return tuple(scan_chunks(merge, None, found, t, chunk_size(t, 4 * h * E * p))[1])


def _gradients(queries, sub_keys, indices, d_scores):
    E, (_, m, c), (_, h, k) = current().size(EXPERT), sub_keys.shape, indices.shape
    queries = gather(queries).reshape(-1, 2, c)
    indices, d_scores = (gather(a).reshape(-1, k) for a in (indices, d_scores))
    d_keys, d_queries = [], []
    for half, index in enumerate((indices // (E * m), indices % (E * m))):
        row = index - m * jax.lax.axis_index(EXPERT)
        weights = jnp.where((row >= 0) & (row < m), d_scores, 0)
        row = jnp.clip(row, 0, m - 1)
        d_keys += table_gradients(row, m, (weights, queries[:, half]))
        d_queries.append(sum_rows(weights, sub_keys[half], row, jnp.float32))
    return scatter_sum(jnp.concatenate(d_queries, axis=-1).reshape(-1, h, 2 * c)), jnp.stack(d_keys)


def sent(text: str, E: int) -> float:
    """Bytes that a device sends through the collectives of a compiled program: of 4-byte elements, none in a loop."""
    whole = {"all-gather": 1, "all-to-all": 1, "reduce-scatter": E, "all-reduce": 2}
    total = 0
    for arrays, kind in re.findall(r"= (\S.*?) ([a-z-]*(?:all-|reduce-s|collective)[a-z-]+?)(?:-done)?\(", text):
        if not kind.endswith("-start"):
            shapes = re.findall(r"[fs]32\[([\d,]*)\]", arrays)
            total += 4 * whole[kind] * sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
    return total * (E - 1) / E


def expected(T: int, n: int, h: int, k: int, d_key: int, E: int) -> dict[tuple, float]:
    """The same by formula; T are the tokens of all devices."""
    forward = 4 * T * h * d_key + 16 * T * h * min(k, n // E)
    whole = {
        (replicated, "forward"): 0,
        (replicated, "both"): 2 * 4 * n * d_key,
        (split, "forward"): forward,
        (split, "both"): forward + 8 * T * h * k + 4 * T * h * d_key,
    }
    return {program: size * (E - 1) / E for program, size in whole.items()}


def measure(T: int, n: int, h: int, k: int, d_key: int, repeats: int) -> None:
    """Two rows of the table, of this process's devices."""
    keep_freed_memory()
    placement, E = Sharding(data=1, expert=-1).place(), jax.device_count()
    rng = np.random.default_rng(0)

    def draw(*shape):
        return np.round(8 * rng.standard_normal(shape, np.float32)) / 8

    def put(array, spec):
        return jax.device_put(array, NamedSharding(placement.mesh, spec))

    sub_keys, queries, d_scores = draw(2, n, d_key // 2), put(draw(T, h, d_key), TOKENS), put(draw(T, h, k), TOKENS)
    programs = {}
    with use(placement):
        for way, spec in ((replicated, P()), (split, PARTS)):
            arguments = put(sub_keys, spec), queries, d_scores
            for name, given in ("forward", arguments[:2]), ("both", arguments):
                compiled = jax.jit(functools.partial(way, k)).lower(*given).compile()
                programs[way, name] = functools.partial(compiled, *given)

    result = {program: jax.tree.map(np.asarray, run()) for program, run in programs.items()}
    for name in ("forward", "both"):
        jax.tree.map(np.testing.assert_array_equal, result[replicated, name], result[split, name])
    bytes_sent = {program: sent(run.func.as_text(), E) for program, run in programs.items()}
    if bytes_sent != expected(T, n, h, k, d_key, E):
        sys.exit(f"bytes sent are {bytes_sent}, by formula {expected(T, n, h, k, d_key, E)}")

    seconds = {program: [] for program in programs}
    for _ in range(repeats):
        for program, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[program].append(time.perf_counter() - start)
    for way in (replicated, split):
        held = programs[way, "both"].args[0].addressable_shards[0].data.nbytes
        cells = [f"{statistics.median(seconds[way, name]):.3f}" for name in ("forward", "both")]
        sizes = [bytes_sent[way, name] for name in ("forward", "both")] + [held]
        sizes += [programs[way, name].func.memory_analysis().temp_size_in_bytes for name in ("forward", "both")]
        cells += [f"{size / 2**20:.2f}" for size in sizes]
        print("|", " | ".join([f"{n}^2", str(E), way.__name__, *cells]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of all devices")
    parser.add_argument("--num-experts", type=int, nargs="+", default=[1024**2, 4096**2])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--d-key", type=int, default=128)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = arguments.heads, arguments.top_k, arguments.d_key, arguments.repeats
    if arguments.n:
        measure(arguments.tokens, arguments.n, *sizes)
        return
    halves = [math.isqrt(number) for number in arguments.num_experts]
    if [n * n for n in halves] != arguments.num_experts:
        parser.error("--num-experts are squares of the number of sub-keys of a half, as 1048576")
    for devices in arguments.devices:
        if devices < 2 or any(size % devices for size in (arguments.tokens, *halves)):
            parser.error(
                f"--devices {devices} must be at least 2 and divide --tokens and the sub-keys of a half, {halves}"
            )
    table = f"| {HEADER} |\n" + "|---" * len(HEADER.split("|")) + "|"
    for n in halves:
        for devices in arguments.devices:
            command = [sys.executable, *sys.argv, "--n", str(n)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            rows = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if rows.returncode:
                sys.exit(f"{n}^2 experts on {devices} devices failed")
            table += f"\n{rows.stdout.rstrip()}"
    print(table)


if __name__ == "__main__":
    main()
