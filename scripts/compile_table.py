"""What a training step of the paper's models takes on TPU v5p, as its compiler estimates: a table in Markdown.

Usage: python scripts/compile_table.py [WORD ...]

It compiles the rows whose names contain all of the words, by `peer_jax.planning.compiled`, each for minutes of a core.
The extra `compile` must be installed. docs/performance.md says what the estimates leave out.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Name of the row; topology; layer; bindings beside those of all rows.
SPLIT = ["Sharding.expert=8"]
ROWS = [
    (f"{chips} {name}", topology, layer, bindings)
    for chips, topology, batch in (
        (8, "v5p:2x2x2", ["Run.batch_size=64"]),
        (64, "v5p:4x4x4", []),
        (256, "v5p:4x8x8", ["Run.batch_size=256"]),
    )
    for name, layer, bindings in (
        ("dense", "dense", batch),
        ("MoE, 128 experts, expert choice", "moe", [*batch, *SPLIT]),
        ("PKM, 1024^2, by columns", "pkm", [*batch, *SPLIT, 'Sharding.tables="columns"']),
        ("PEER, 1024^2, by rows", "peer", [*batch, *SPLIT]),
        ("PEER, 1024^2, by columns", "peer", [*batch, *SPLIT, 'Sharding.tables="columns"']),
        ("PEER, 4096^2, by rows", "peer", [*batch, *SPLIT, "NUM_EXPERTS=16777216"]),
        ("PEER, 4096^2, by columns", "peer", [*batch, *SPLIT, "NUM_EXPERTS=16777216", 'Sharding.tables="columns"']),
    )
]
HEADER = (
    "chips, layer",
    "state, GiB",
    "temporary, GiB",
    "of a chip",
    "estimate, ms",
    "FLOPs at peak, ms",
    "exchanges at the links' peak, ms",
    "chip-ns per token",
    "chip-s per 1e18 counted FLOPs",
    "sorts",
    "on SparseCores",
)
CLOCK = 1.75e9  # cycles of v5p's cores per second


def row(name: str, topology: str, layer: str, bindings: list[str]) -> list[str]:
    from peer_jax import config
    from peer_jax.planning import topology as topologies
    from peer_jax.planning.compiled import compile_run
    from peer_jax.training.flops import training_flops

    files = [ROOT / "configs" / f for f in ("base.gin", f"layers/{layer}.gin", "sizes/paper.gin", "data/c4.gin")]
    run = config.load(files, ["Transformer.remat=True", *bindings])
    on = topologies.topology(topology)
    compiled = compile_run(run, on)
    memory, account, chips = compiled.memory, compiled.account, len(on.devices)
    counted = training_flops(run.trainer().abstract_model, compiled.tokens, run.task.seq_len)
    # Each loop as often as it turns, which the compiler's own estimate of seconds leaves out.
    seconds, gib = sum(account.cycles.values()) / CLOCK, 2**30
    received = sum(of.size * (2 if of.kind == "all-reduce" else 1) for of in account.collectives)
    apart = account.unestimated.items()
    return [
        name,
        f"{memory.arguments / gib:.1f}",
        f"{memory.temporaries / gib:.1f}",
        f"{memory.total / on.kind.memory:.0%}",
        f"{1e3 * seconds:.0f}",
        f"{1e3 * compiled.flops / on.kind.flops:.0f}",
        f"{1e3 * received / on.kind.links:.1f}",
        f"{1e9 * seconds * chips / compiled.tokens:.0f}",
        f"{1e18 * seconds * chips / counted:.0f}",
        str(sum(number for what, number in apart if what.startswith("sort"))),
        str(sum(number for what, number in apart if what.endswith("SparseCores"))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="compile the rows whose names contain all of these")
    words = parser.parse_args().words

    from peer_jax import startup
    from peer_jax.cli.app import keep_off_accelerators
    from peer_jax.errors import InputError

    startup.prepare(keep_programs=False)
    keep_off_accelerators()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for name, *of in ROWS:
        if all(word in name for word in words):
            start = time.perf_counter()
            try:
                print(f"| {' | '.join(row(name, *of))} |", flush=True)
            except InputError as error:
                print(f"| {name} | {error} |", flush=True)
            print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
