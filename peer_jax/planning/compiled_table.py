"""Prints what ``peer_jax.planning.compiled`` has found."""

from rich.console import Console

from peer_jax.memory import shown
from peer_jax.planning.capacity_table import print_table
from peer_jax.planning.compiled import Compiled
from peer_jax.planning.hlo import Loop
from peer_jax.planning.topology import Topology


def show(compiled: Compiled, topology: Topology) -> None:
    """Prints memory, work, time, exchanges and loops of a program, each in a table, and whether it fits."""
    console = Console(highlight=False, soft_wrap=True)
    mesh = ", ".join(f"{axis}={size}" for axis, size in compiled.mesh.items())
    console.print(
        f"{compiled.program} on {topology.name}: {mesh}; tables by {compiled.tables}; {compiled.tokens:,} tokens"
    )
    memory, account = compiled.memory, compiled.account
    sizes = {**memory._asdict(), "total": memory.total}
    print_table(console, "memory per device", "size", {what: shown(size) for what, size in sizes.items()})
    share = memory.total / topology.kind.memory
    verdict = "DOES NOT FIT" if share > 1 else "Fits"
    console.print(f"{verdict}: {share:.0%} of the {shown(topology.kind.memory)} of a device.")

    work = {}
    for what, of, amount, peak in (
        ("FLOPs", "bfloat16", compiled.flops, topology.kind.flops),
        ("bytes", "memory's", compiled.bytes, topology.kind.bandwidth),
    ):
        if amount is not None:
            work |= {what: f"{amount:.3g}", f"{what} at the {of} peak, ms": f"{1e3 * amount / peak:.2f}"}
    if compiled.seconds is not None:
        work["compiler's estimate without exchanges, ms"] = f"{1e3 * compiled.seconds:.2f}"
    if account.collectives:
        received = sum(of.size * (2 if of.kind == "all-reduce" else 1) for of in account.collectives)
        work["exchanges at the links' peak, ms"] = f"{1e3 * received / topology.kind.links:.2f}"
    print_table(console, "work per device", "", work or {"not told by this compiler": ""})
    if total := sum(account.cycles.values()):
        rows = {part: f"{cycles / total:.1%}" for part, cycles in account.cycles.items()}
        print_table(console, "estimated cycles by part", f"of {total:.3g}", rows)
    if account.cycles and account.unestimated:
        rows = {what: str(number) for what, number in account.unestimated.items()}
        print_table(console, "without an estimate", "number", rows)
    rows = {f"{of.number} {of.kind}": shown(of.size) for of in account.collectives}
    print_table(console, "results of exchanges, per device", "size", rows or {"none": ""})
    if account.loops:
        rows = {
            f"{index}: {loop.part}, {_turns(loop)}": f"{loop.cycles:.3g}" for index, loop in enumerate(account.loops, 1)
        }
        print_table(console, "loops", "estimated cycles per turn", rows)
        console.print(
            "FLOPs, bytes and the compiler's estimate count each loop for one turn. Cycles by part and exchanges count "
            "its turns, where their number is known or expected."
        )


def _turns(loop: Loop) -> str:
    return "unknown turns" if loop.turns is None else f"{'about ' * loop.about}{loop.turns} turns"
