"""What a compiled program does, read from its text: collectives, loops, and the compiler's estimate by part.

A program is a set of computations, each a list of instructions. The text of ``compiled.as_text()`` has one instruction
per line. The TPU's compiler writes its estimate of cycles beside most instructions, but not for sorts and SparseCores.
"""

import collections
import dataclasses
import math
import os
import re
from collections.abc import Iterator

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
OTHERS = "other"

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (\S.*?) ([a-z][\w\-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")
_COMPUTATIONS = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)"
    r"=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ABOUT = re.compile(r'op_name="[^"]*\babout_(\d+)_turns\)*/while"')

# Files of the package that serve several parts of the model: what they do counts for their callers.
_SHARED = ("layers/linear.py", "layers/checks.py", "sharding.py")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collective instructions of one kind; ``size`` is the bytes of their results on one device, ``number`` of calls.

    The operand of an all-gather is one device's part of its result; the result of a reduce-scatter is one device's
    part of its operand; other results are as large as their operands.
    """

    kind: str
    number: int
    size: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that is not within another one; ``cycles`` are those of one turn.

    ``turns`` is None if the data decide, unless a scope named ``about_N_turns`` around the loop says what to expect;
    ``about`` tells that it does.
    """

    part: str
    turns: int | None
    cycles: int
    about: bool = False


@dataclasses.dataclass(frozen=True)
class Account:
    """What ``read`` finds. Loops are counted as often as they turn, or for one turn if their number is unknown.

    Attributes:
        collectives: by kind.
        loops: in the order of the program.
        cycles: the compiler's estimate by part of the model, which is a file of the package; empty without an estimate.
        unestimated: how many instructions of which kind have no estimate but take time.
    """

    collectives: list[Collective]
    loops: list[Loop]
    cycles: dict[str, int]
    unestimated: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    opcode: str
    rest: str
    root: bool

    @property
    def called(self) -> dict[str, list[str]]:
        """The computations that it calls, by the attribute that names them."""
        return {how: re.findall(r"[\w.\-]+", names) for how, names in _COMPUTATIONS.findall(self.rest)}


def read(text: str) -> Account:
    """What the program of this text does."""
    return _Reader(text).account()


class _Reader:
    def __init__(self, text: str) -> None:
        self._frames = _Frames(text)
        self._computations: dict[str, list[_Instruction]] = {}
        self._entry = ""
        instructions: list[_Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                instructions = self._computations[header[2]] = []
                self._entry = header[2] if header[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                root, name, result, opcode, rest = found.groups()
                instructions.append(_Instruction(name, result, opcode, rest, bool(root)))

    def account(self) -> Account:
        number, size = collections.Counter(), collections.Counter()
        cycles, unestimated, loops = collections.Counter(), collections.Counter(), []
        for instruction, turns, in_loop, scheduled in self._reached(self._entry, 1, False, True):
            opcode = instruction.opcode.removesuffix("-done")
            if opcode in COLLECTIVES:  # one that has been started counts where it is done
                number[opcode] += turns
                size[opcode] += turns * _bytes(instruction.result)
            if not scheduled:
                continue
            part = self._frames.part(instruction.rest)
            if opcode == "while" and not in_loop:
                about = bool(_ABOUT.search(instruction.rest))
                loops.append(Loop(part, self._turns(instruction), self._cycles(instruction.called["body"][0]), about))
            if (estimate := _estimate(instruction)) is not None:
                cycles[part] += turns * estimate
            elif kind := _kind_without_estimate(instruction):
                unestimated[kind] += turns
        found = [Collective(kind, number[kind], size[kind]) for kind in COLLECTIVES if number[kind]]
        return Account(found, loops, dict(cycles.most_common()), dict(unestimated))

    def _cycles(self, computation: str) -> int:
        reached = self._reached(computation, 1, True, True)
        return sum(turns * (_estimate(instruction) or 0) for instruction, turns, _, scheduled in reached if scheduled)

    def _reached(
        self, computation: str, turns: int, in_loop: bool, scheduled: bool
    ) -> Iterator[tuple[_Instruction, int, bool, bool]]:
        """Every instruction that a computation runs: how often, whether in a loop, whether it takes time of its own.

        What is within a fusion or on a SparseCore takes no time of its own, but a collective may be there.
        """
        for instruction in self._computations.get(computation, ()):
            yield instruction, turns, in_loop, scheduled
            called, opcode = instruction.called, instruction.opcode
            if opcode == "while":
                times = turns * (self._turns(instruction) or 1)
                for inner in called["condition"] + called["body"]:
                    yield from self._reached(inner, times, True, scheduled)
            elif opcode.endswith(("-done", "-update")) or (set(called) == {"to_apply"} and "call" not in opcode):
                continue  # already seen where it started; or a combiner, such as that of a reduction
            else:
                apart = opcode == "fusion" or _is_on_sparse_core(instruction)
                for inner in (name for names in called.values() for name in names):
                    yield from self._reached(inner, turns, in_loop, scheduled and not apart)

    def _turns(self, loop: _Instruction) -> int | None:
        """How often a loop turns: as the compiler or a scope says, or as its condition ``counter < constant`` does, for
        a counter that starts at 0 and goes up by 1, as those of JAX do.
        """
        if known := _TURNS.search(loop.rest) or _ABOUT.search(loop.rest):
            return int(known[1])
        condition = {instruction.name: instruction for instruction in self._computations[loop.called["condition"][0]]}
        root = next(instruction for instruction in condition.values() if instruction.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        bound = condition.get(re.findall(r"%?([\w.\-]+)", root.rest)[1])
        constant = re.match(r"(\d+)\)", bound.rest) if bound is not None and bound.opcode == "constant" else None
        return int(constant[1]) if constant else None


def _estimate(instruction: _Instruction) -> int | None:
    found = _CYCLES.search(instruction.rest)
    return int(found[1]) if found and int(found[1]) < _NO_ESTIMATE else None


def _is_on_sparse_core(instruction: _Instruction) -> bool:
    return 'async_execution_thread="sparsecore"' in instruction.rest


def _kind_without_estimate(instruction: _Instruction) -> str | None:
    if (kind := instruction.opcode.removesuffix("-done")) in COLLECTIVES:
        return kind
    if instruction.opcode == "sort":
        return f"sort of {_ARRAY.search(instruction.result)[0]}"
    if instruction.opcode.endswith("-start") and _is_on_sparse_core(instruction):
        return f"{re.split(r'[_.-]', instruction.name)[0]} on SparseCores"
    return "kernel of Pallas" if 'custom_call_target="tpu_custom_call"' in instruction.rest else None


def _bytes(result: str) -> int:
    """Bytes of an array, or of a tuple of arrays, whose type XLA writes as "f32[48,16]{1,0}"."""
    arrays = ((int(bits or 8), shape) for _, bits, shape in _ARRAY.findall(result))  # "pred" has no number
    return sum(math.prod(int(size) for size in shape.split(",") if size) * bits // 8 for bits, shape in arrays)


class _Frames:
    """The tables at the head of a program that say where in the source an instruction comes from."""

    def __init__(self, text: str) -> None:
        table = {name: _table(text, name) for name in ("FileNames", "FileLocations", "StackFrames")}
        files = {number: line.strip('"') for number, line in table["FileNames"].items()}
        self._frames = {}
        for number, line in table["StackFrames"].items():
            location, parent = re.findall(r"=(\d+)", line)
            file = files[int(re.search(r"file_name_id=(\d+)", table["FileLocations"][int(location)])[1])]
            self._frames[number] = file, int(parent) - 1

    def part(self, rest: str) -> str:
        """The innermost file of an instruction's stack that belongs to the model; the text counts parents from 1."""
        found = re.search(r"stack_frame_id=(\d+)", rest)
        number = int(found[1]) if found else 0
        while number in self._frames:
            file, parent = self._frames[number]
            if (name := _name(file)) and name not in _SHARED:
                return name
            number = parent if parent < number else 0
        return OTHERS


def _table(text: str, name: str) -> dict[int, str]:
    section = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    lines = section[1].splitlines() if section else ()
    return {int(number): line for number, line in (line.split(" ", 1) for line in lines)}


def _name(file: str) -> str | None:
    """How a file of this package, or of a user, is called; None for the files of libraries."""
    _, package, within = file.rpartition(f"{os.sep}peer_jax{os.sep}")
    if package:
        return within
    is_library = re.search(r"/(site|dist)-packages/|/lib/python", file)
    return None if is_library else os.path.basename(file)
