"""Seconds per training step and memory per device on 1, 2, 4 and 8 devices, with tables split by rows and by columns.

Usage: python scripts/sharded_step.py [--num-experts 262144] [--devices 1 2 4 8]

It prints a table in Markdown. On CPU the devices are forced ones that share the cores, so more devices can't make a
step faster; the extra time is what sharding costs. Memory is what XLA says about the compiled program.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time


def measure(num_experts: int, tables: str, steps: int) -> None:
    """Prints a row of the table, with all devices of this process along the ``expert`` axis."""
    import functools

    import jax
    import numpy as np

    from peer_jax.layers import PEER, Dense
    from peer_jax.models import Transformer
    from peer_jax.sharding import Sharding, split_batch, use
    from peer_jax.startup import keep_freed_memory
    from peer_jax.training.optimizer import AdamW
    from peer_jax.training.step import Trainer

    keep_freed_memory()
    peer = functools.partial(PEER, num_experts=num_experts)
    build = functools.partial(Transformer, 259, 256, 8, 4, ffw=Dense, sparse_ffw=peer)
    placement = Sharding(data=1, expert=-1, tables=tables).place()
    with use(placement):
        trainer = Trainer(build, AdamW(learning_rate=1e-3))
        state = trainer.init(0)
        tokens = np.random.default_rng(0).integers(3, 259, (8, 256)).astype(np.int32)
        batch = {"inputs": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens)}
        batch = split_batch(batch)
        rates = trainer.optimizer.rates(trainer.labels, 0, 10)
        step = trainer.compiled_step().lower(state, batch, rates).compile()
        held = step.memory_analysis()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step(state, batch, rates)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    mib = [size / 2**20 for size in (held.argument_size_in_bytes, held.temp_size_in_bytes)]
    median = statistics.median(seconds[1:])
    loss = float(metrics["loss"])
    print(f"| {jax.device_count()} | {tables} | {median:.2f} | {mib[0]:.0f} | {mib[1]:.0f} | {loss:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-experts", type=int, default=512**2)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=6, help="the first one does not count")
    parser.add_argument("--tables", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tables:
        measure(arguments.num_experts, arguments.tables, arguments.steps)
        return
    print("| devices | tables | s/step | state and batch, MiB per device | temporary, MiB per device | loss |")
    print("|---|---|---|---|---|---|", flush=True)
    for devices in arguments.devices:
        for tables in ("rows", "columns") if devices > 1 else ("rows",):
            subprocess.run(
                [sys.executable, *sys.argv, "--tables", tables],
                env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
                check=True,
            )


if __name__ == "__main__":
    main()
