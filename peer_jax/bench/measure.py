"""Measures what was asked for, case by case."""

import contextlib
import dataclasses
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from peer_jax.bench import pytorch
from peer_jax.bench.cases import (
    BYTES,
    COMPARED,
    OPS,
    PYTORCH,
    PYTORCH_KEEPING,
    STEP,
    STEP_LAYER,
    Case,
    cases,
    check_memory,
)
from peer_jax.bench.programs import SEQUENCE, program
from peer_jax.bench.timing import Machine, Times, interleaved, measure_machine, sampler
from peer_jax.bench.worker import Worker
from peer_jax.errors import InputError
from peer_jax.layers import FeedForward, families
from peer_jax.ops import check_implementation
from peer_jax.ops.floor import Floor

WHATS = ("op", "layer", "step")
SCHEMA = 2  # version 1 had no "sizes" and no unknown floors
Sizes = dict[str, Sequence[int]]
GRID: dict[str, Sizes] = {
    "op": {"tokens": (256, 2048), "d_model": (64, 256), "num_experts": (64**2, 512**2), "heads": (1, 8)},
    "layer": {"tokens": (256, 2048), "d_model": (64, 256), "num_experts": (64**2, 512**2), "heads": (1, 8)},
    "step": {"tokens": (2048,), "d_model": (256,), "num_experts": (128**2, 256**2, 512**2, 1024**2), "heads": (8,)},
}
AGAINST: Sizes = {"tokens": (2048,), "d_model": (256,), "num_experts": (512**2,), "heads": (8,)}
QUICK: Sizes = {"tokens": (64,), "d_model": (32,), "num_experts": (16**2,), "heads": (2,), "top_k": (4,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; an empty sequence stands for the default of ``what``.

    Args:
        what: "op", "layer" or "step".
        only: names of ops, of layers, or of the layers of steps.
        tokens, d_model, num_experts, heads, top_k: sizes; all their combinations are measured.
        dtype: type of tokens and computation.
        table_dtype: type of tables and, for a layer, of all parameters.
        implementation: the implementations of the ops that compete.
        table_updates: how steps update tables, "all" or "touched", see ``AdamW``; each is measured.
        touched_share: the room for touched rows, see ``AdamW``.
        against: "pytorch" compares with the layer of PEER-pytorch, given the same weights.
        repeats: samples of each competitor.
        quick: one small size, few repeats.
        layers: further classes of layers by name, beside those of ``peer_jax.layers``.
    """

    what: str
    only: Sequence[str] = ()
    tokens: Sequence[int] = ()
    d_model: Sequence[int] = ()
    num_experts: Sequence[int] = ()
    heads: Sequence[int] = ()
    top_k: Sequence[int] = ()
    dtype: str = "float32"
    table_dtype: str = "float32"
    implementation: Sequence[str] = ()
    table_updates: Sequence[str] = ()
    touched_share: float = 1.0
    against: str | None = None
    repeats: int = 5
    quick: bool = False
    layers: Mapping[str, type[FeedForward]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_one("what", self.what, WHATS)
        _check_one("dtype", self.dtype, tuple(BYTES))
        _check_one("table_dtype", self.table_dtype, tuple(BYTES))
        for name in self.only:
            _check_one("only", name, tuple(self._known()))
        for value in self.implementation:
            check_implementation(value)
        for value in self.table_updates:
            _check_one("table_updates", value, ("all", "touched"))
            if self.what != "step":
                raise InputError("only a step updates tables: use what='step'", argument="what")
        if self.touched_share != 1.0 and "touched" not in self.table_updates:
            raise InputError(
                f"touched_share={self.touched_share} is for steps on touched rows: use table_updates=('touched',)",
                argument="touched_share",
            )
        for name in ("tokens", "d_model", "num_experts", "heads", "top_k"):
            for value in getattr(self, name):
                if value < 1:
                    raise InputError(f"{name}={value} must be above zero", argument=name)
        for value in self.num_experts if self.what == "op" else ():  # a layer says itself what it can take
            if round(value**0.5) ** 2 != value:
                raise InputError(
                    f"num_experts={value} is not a square: try {round(value**0.5) ** 2}", argument="num_experts"
                )
        for value in self.tokens if self.what == "step" else ():
            if value > SEQUENCE and (over := value % SEQUENCE):
                raise InputError(
                    f"tokens={value} is not a whole number of rows of {SEQUENCE} tokens, which a step has: "
                    f"try {value - over} or {value - over + SEQUENCE}",
                    argument="tokens",
                )
        if self.repeats < 1:
            raise InputError(f"repeats={self.repeats} must be above zero", argument="repeats")
        if self.against is not None:
            _check_one("against", self.against, (PYTORCH,))
            if self.what != "layer":
                raise InputError(
                    f"a comparison against {self.against} is of whole layers: use what='layer'", argument="what"
                )
            if self.only:
                raise InputError("a comparison against pytorch measures PEER alone: leave 'only' out", argument="only")
            if {self.dtype, self.table_dtype} != {"float32"}:
                raise InputError("a comparison against pytorch is in float32: leave the types out", argument="dtype")
            pytorch.check_installed()

    def _known(self) -> Mapping[str, type[FeedForward] | None]:
        """The class of each layer, or None for an op, by name."""
        return dict.fromkeys(OPS) if self.what == "op" else families() | dict(self.layers)

    def names(self) -> dict[str, type[FeedForward] | None]:
        """What is measured: the class of each layer, or None for an op, by the name in tables."""
        known = self._known()
        if self.against:
            return {COMPARED: known[STEP_LAYER]}
        if self.what == "step":
            chosen = self.only or (STEP_LAYER,)
            return {STEP if name == STEP_LAYER else f"{STEP} with {name}": known[name] for name in chosen}
        usual = [name for name, layer in known.items() if layer is None or layer.benchmark.by_default]
        return {name: known[name] for name in self.only or usual}

    def competitors(self) -> list[list[Case]]:
        """The cases to measure, grouped by problem."""
        defaults = {"top_k": (16,)} | (QUICK if self.quick else AGAINST if self.against else GRID[self.what])
        # A step of the reference holds [tokens, h, k, d], so it is measured only if it is asked for.
        usual = ("xla",) if self.what == "step" or self.against else ("reference", "xla")
        implementations = (*(self.implementation or usual), *([PYTORCH, PYTORCH_KEEPING] if self.against else ()))
        found = []
        for name, layer in self.names().items():
            own = () if layer is None or self.quick else layer.benchmark.num_experts
            usual_sizes = defaults | ({"num_experts": own} if own else {})
            sizes = {size: getattr(self, size) or values for size, values in usual_sizes.items()}
            types = {"dtype": self.dtype, "table_dtype": self.table_dtype, "touched_share": self.touched_share}
            found += cases(self.what, name, layer, implementations, self.table_updates or ("all",), **sizes, **types)
        if not found:
            raise InputError("nothing is left to measure: top_k is more than num_experts in all combinations")
        return found


def _check_one(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{argument}={value} is not one of {', '.join(choices)}", argument=argument)


def run(options: Options, *, on_row: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Measures all cases and returns what the JSON file holds. ``on_row`` is called with each row as it is measured.

    Raises:
        InputError: if a competitor's output differs, or nothing can be measured.
    """
    start = time.monotonic()
    competitors_of = options.competitors()
    for case in itertools.chain(*competitors_of):  # before any is measured
        check_memory(case)
    # Small arrays for a small run.
    size = {"megabytes": 32, "width": 512} if options.quick else {}
    machine = measure_machine(options.dtype, **size)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for competitors in competitors_of:
        measure = apart if options.what == "step" or options.against else _together
        measured, refused = measure(competitors, 3 if options.quick else options.repeats)
        notes += [note for note in refused if note not in notes]
        first = next(iter(measured.values()))[0] if measured else None
        for case, (times, floors, memory) in measured.items():
            rows.append(_row(case, times, floors, memory, machine, first))
            on_row(rows[-1])
    if not rows:
        raise InputError(f"nothing could be measured: {notes[0]}")
    device = jax.devices()[0]
    return {
        "schema": SCHEMA,
        "options": dataclasses.asdict(options) | {"layers": sorted(options.layers)},
        "machine": {
            "device": device.device_kind,
            "platform": device.platform,
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            **machine._asdict(),
        },
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "seconds": time.monotonic() - start,
        "notes": notes,
        "rows": rows,
    }


Measured = dict[Case, tuple[Times, Mapping[str, Floor | None], dict[str, int | None]]]


def _together(competitors: Sequence[Case], repeats: int) -> tuple[Measured, list[str]]:
    """Measures competitors in this process, in turn. Leaves out those that can't take the sizes, with the reason."""
    programs, notes = {}, []
    for case in competitors:
        try:
            programs[case.implementation] = case, program(case)
        except InputError as error:
            notes.append(f"{case.implementation}: {error}")
    times = interleaved({name: sampler(made.call) for name, (_, made) in programs.items()}, repeats)
    return {case: (times[name], made.floors, {"memory": made.memory}) for name, (case, made) in programs.items()}, notes


def apart(competitors: Sequence[Case], repeats: int) -> tuple[Measured, list[str]]:
    """Measures competitors in turn, each in its own process, so that the memory of each can be measured too.

    Leaves out competitors as ``_together`` does.
    """
    workers: dict[str, Worker] = {}
    notes = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peer_jax-")))
        for case in competitors:
            try:
                worker = Worker(case, folder / f"{case.shown}.npz")
            except InputError as error:
                notes.append(f"{case.shown}: {error}")
                continue
            workers[case.shown] = stack.enter_context(contextlib.closing(worker))
        if {PYTORCH, PYTORCH_KEEPING} & workers.keys():
            results = {name: worker.results() for name, worker in workers.items()}
            pytorch.check_agreement(competitors[0], results)
        times = interleaved({name: worker.sample for name, worker in workers.items()}, repeats)
        return {w.case: (times[name], w.floors, w.answer["measured"]) for name, w in workers.items()}, notes


def _row(
    case: Case,
    times: Times,
    floors: Mapping[str, Floor | None],
    memory: Mapping[str, int | None],
    machine: Machine,
    first: Times | None,
) -> dict[str, Any]:
    """A row of the table and of the JSON file: times in seconds, memory in bytes, None for what is unknown."""
    known = {order: floor for order, floor in floors.items() if floor is not None}
    least = {order: floor.seconds(*machine) for order, floor in known.items()}
    unknown = dict.fromkeys(floors)
    return {
        **case.described(),
        "shown": case.shown,
        "sizes": case.sizes,
        **times._asdict(),
        "floor": unknown
        | {order: dataclasses.asdict(floor) | {"seconds": least[order]} for order, floor in known.items()},
        "fraction_of_floor": unknown | {order: seconds / times.median for order, seconds in least.items()},
        "faster_than_first": None if first is None else first.median / times.median,
        **{"state": None, "extra_memory": None, "process_peak": None},
        **memory,
    }
