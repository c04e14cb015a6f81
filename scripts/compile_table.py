"""What a training step of the paper's models takes on TPU v5p, as its compiler estimates: a table in Markdown.

Usage: python scripts/compile_table.py [WORD ...]

It compiles the rows whose names contain all of the words, by `peer_jax.planning.compiled`. The extra `compile` must be
installed. A step of 12 blocks takes up to ten minutes of two cores, so its figures are those of its sparse block and 11
times those of a dense block: what a dense model of two blocks has more than one of one block. With --whole, the step is
compiled as it is. docs/performance.md compares both, and says what the estimates leave out.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Tables have Adam, all rows updated: what a step costs that passes over whole tables, unlike the configs' default.
ADAM = ["AdamW.table_b1=None", 'AdamW.table_second_moment="element"']
SPLIT = ["Sharding.expert=8", *ADAM]
LARGE = [*SPLIT, "NUM_EXPERTS=16777216"]
TOUCHED = ["AdamW.table_b1=0.0", 'AdamW.table_second_moment="row"', 'AdamW.table_updates="touched"']
# Name of the row; topology; layer; bindings of the batch, and of the layer.
ROWS = [
    (f"{chips} {name}", topology, layer, batch, bindings)
    for chips, topology, batch in (
        (8, "v5p:2x2x2", "Run.batch_size=64"),
        (64, "v5p:4x4x4", "Run.batch_size=128"),
        (256, "v5p:4x8x8", "Run.batch_size=256"),
    )
    for name, layer, bindings in (
        ("dense", "dense", []),
        ("MoE, 128 experts, expert choice", "moe", SPLIT),
        ("PKM, 1024^2, by rows", "pkm", SPLIT),
        ("PKM, 1024^2, by columns", "pkm", [*SPLIT, 'Sharding.tables="columns"']),
        ("PEER, 1024^2, by rows", "peer", SPLIT),
        ("PEER, 1024^2, by columns", "peer", [*SPLIT, 'Sharding.tables="columns"']),
        ("PEER, 4096^2, by rows", "peer", LARGE),
        ("PEER, 4096^2, by columns", "peer", [*LARGE, 'Sharding.tables="columns"']),
        ("PEER, 4096^2, by rows, an eighth touched", "peer", [*LARGE, *TOUCHED, "AdamW.touched_share=0.125"]),
    )
]
HEADER = (
    "chips, layer",
    "state, GiB",
    "temporary, GiB",
    "of a chip",
    "estimate, ms",
    "exchanges at the links' peak, ms",
    "chip-ns per token",
    "chip-s per 1e18 counted FLOPs",
    "sorts",
    "on SparseCores",
)
CLOCK = 1.75e9  # cycles of v5p's cores per second
Figures = dict[str, float]


@functools.cache
def figures(topology: str, layer: str, bindings: tuple[str, ...]) -> Figures:
    """What the compiler says of a step, per chip; and of the run, what is known without it."""
    from peer_jax import config
    from peer_jax.planning import topology as topologies
    from peer_jax.planning.compiled import compile_run
    from peer_jax.training.flops import training_flops

    files = [ROOT / "configs" / f for f in ("base.gin", f"layers/{layer}.gin", "sizes/paper.gin", "data/c4.gin")]
    run = config.load(files, ["Transformer.remat=True", *bindings])
    on = topologies.topology(topology)
    compiled = compile_run(run, on)
    account = compiled.account
    received = sum(of.size * (2 if of.kind == "all-reduce" else 1) for of in account.collectives)
    apart = account.unestimated.items()
    return {
        "state": compiled.memory.arguments,
        "temporary": compiled.memory.temporaries,
        "of a chip": compiled.memory.total / on.kind.memory,
        # Each loop as often as it turns, which the compiler's own estimate of seconds leaves out.
        "seconds": sum(account.cycles.values()) / CLOCK,
        "exchanges": received / on.kind.links,
        "sorts": sum(number for what, number in apart if what.startswith("sort of")),
        "on SparseCores": sum(number for what, number in apart if what.endswith("SparseCores")),
        "chip-seconds per second and token": len(on.devices) / compiled.tokens,
        "chips per counted FLOP": len(on.devices)
        / training_flops(run.trainer().abstract_model, compiled.tokens, run.task.seq_len),
    }


def by_block(topology: str, layer: str, batch: str, bindings: list[str]) -> Figures:
    """Those of a step of 12 blocks, from three steps of one or two blocks."""
    one, two = (f"Transformer.num_blocks={blocks}" for blocks in (1, 2))
    begin, end = (figures(topology, "dense", (batch, blocks)) for blocks in (one, two))
    sparse = figures(topology, layer, (batch, *bindings, one))
    whole = {name: value + 11 * (end[name] - begin[name]) for name, value in sparse.items()}
    # A ratio adds up by its inverse.
    inverse = [1 / of["chips per counted FLOP"] for of in (sparse, begin, end)]
    whole["chips per counted FLOP"] = 1 / (inverse[0] + 11 * (inverse[2] - inverse[1]))
    return whole


def row(name: str, of: Figures) -> list[str]:
    gib = 2**30
    return [
        name,
        f"{of['state'] / gib:.1f}",
        f"{of['temporary'] / gib:.1f}",
        f"{of['of a chip']:.0%}",
        f"{1e3 * of['seconds']:.0f}",
        f"{1e3 * of['exchanges']:.1f}",
        f"{1e9 * of['seconds'] * of['chip-seconds per second and token']:.0f}",
        f"{1e18 * of['seconds'] * of['chips per counted FLOP']:.0f}",
        f"{of['sorts']:.0f}",
        f"{of['on SparseCores']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="compile the rows whose names contain all of these")
    parser.add_argument("--whole", action="store_true", help="compile all 12 blocks")
    arguments = parser.parse_args()

    from peer_jax import startup
    from peer_jax.cli.app import keep_off_accelerators
    from peer_jax.errors import InputError

    startup.prepare(keep_programs=False)
    keep_off_accelerators()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for name, topology, layer, batch, bindings in ROWS:
        if all(word in name for word in arguments.words):
            start = time.perf_counter()
            try:
                if arguments.whole:
                    found = figures(topology, layer, (batch, *bindings))
                else:
                    found = by_block(topology, layer, batch, bindings)
                print(f"| {' | '.join(row(name, found))} |", flush=True)
            except InputError as error:
                print(f"| {name} | {error} |", flush=True)
            print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
