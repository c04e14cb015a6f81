"""The measurements of docs/log.md: one op against its reference, and the training step against the number of experts.

python scripts/measure.py op      expert_mix forward, and forward + backward: seconds and the program's temporary memory
python scripts/measure.py step    a training step at N = 128^2 .. 1024^2: seconds and the process's peak memory
"""

import argparse
import functools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from peer_jax.cli import keep_freed_memory
from peer_jax.layers import PEER, Dense
from peer_jax.models import Transformer
from peer_jax.ops import expert_mix
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

MIB = 2**20


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that isn't counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def op(repeats: int) -> None:
    """expert_mix at T=2048, d=256, N=512^2, h=8, k=16, float32; implementations in turn."""
    t, d, n, h, k = 2048, 256, 512 * 512, 8, 16
    keys = jax.random.split(jax.random.key(0), 5)
    x, down, up = (jax.random.normal(key, (rows, d)) for key, rows in zip(keys, (t, n, n), strict=False))
    indices = jax.random.randint(keys[3], (t, h, k), 0, n)
    gates = jax.nn.softmax(jax.random.normal(keys[4], (t, h, k)))
    for what in ("forward", "forward + backward"):
        for implementation in ("reference", "xla"):

            def mix(x, down, up, gates, indices, implementation=implementation):
                return expert_mix(x, down, up, indices, gates, jax.nn.gelu, implementation=implementation)

            def loss(*args, mix=mix):
                return jnp.sum(mix(*args) ** 2)

            function = mix if what == "forward" else jax.grad(loss, argnums=(0, 1, 2, 3))
            arguments = (x, down, up, gates, indices)
            program = jax.jit(function).lower(*arguments).compile()
            memory = program.memory_analysis()
            print(
                f"{what:20} {implementation:10} {seconds(functools.partial(program, *arguments), repeats):7.3f} s   "
                f"temporary {memory.temp_size_in_bytes / MIB:6.0f} MiB, "
                f"outputs {memory.output_size_in_bytes / MIB:4.0f} MiB",
                flush=True,
            )


def step(side: int, repeats: int) -> None:
    """A training step with N = side^2 experts: d=256, 8 blocks, PEER in the middle one, 8 x 256 tokens, float32."""
    batch, length, vocab = 8, 256, 259
    peer = functools.partial(PEER, num_experts=side * side)
    build = functools.partial(Transformer, vocab, 256, 8, 4, ffw=Dense, sparse_ffw=peer)
    trainer = Trainer(build, AdamW(learning_rate=1e-3))
    state = trainer.init(0)
    tokens = np.random.default_rng(0).integers(3, vocab, (batch, length)).astype(np.int32)
    data = {"inputs": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens)}
    rates = trainer.optimizer.rates(trainer.labels, 0, 10)
    program = jax.jit(trainer.step, donate_argnums=0)

    def call() -> object:
        nonlocal state
        state, metrics = program(state, data, rates)
        return metrics

    taken = seconds(call, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    params = trainer.abstract_model.num_params()
    print(f"N = {side:4}^2  {params / 1e6:7.1f}M parameters  {taken:7.2f} s/step  peak {peak:5.1f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("op", "step"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, help="measure the step at this N = side^2 alone, in this process")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.what == "op":
        op(arguments.repeats)
    elif arguments.side:
        step(arguments.side, arguments.repeats)
    else:
        for side in (128, 256, 512, 1024):  # a process each, for its own peak memory
            command = [sys.executable, __file__, "step", "--side", str(side), "--repeats", str(arguments.repeats)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
