"""What a compiled program sends between devices, and where it makes arrays of a table's size, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_INSTRUCTION = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(-start|-done)?\(")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective instruction; ``size`` is the bytes of its result on one device."""

    kind: str
    size: int


def collectives(text):
    """A ``Collective`` for each collective instruction of ``compiled.as_text()``, in the order of the text.

    The result of a collective is as large as its operand, with two exceptions: the operand of an all-gather is one
    device's part of the result, and the result of a reduce-scatter is one device's part of the operand. Collectives
    that XLA has combined count as one, with the sum of their bytes. A collective in the body of a loop counts once,
    however often it runs. An asynchronous collective counts where it ends. On CPU, XLA reduces bfloat16 as float32.
    """
    matches = (_INSTRUCTION.search(line) for line in text.splitlines())
    return [Collective(match[2], _bytes(match[1])) for match in matches if match and match[3] != "-start"]


def makers(text, rows, columns):
    """The kinds of instructions that make a float32 array of a table's size, apart from those that write rows in place.

    These are scatters, also within fusions.
    """
    made = re.findall(rf"= \(?f32\[{rows},{columns}\]\S* ([a-z-]+)\(", text)
    return sorted(set(made) - {"parameter", "get-tuple-element", "bitcast", "scatter", "fusion"})


def _bytes(result):
    """Bytes of an array, or of a tuple of arrays, whose type XLA writes as "f32[48,16]{1,0}"."""
    arrays = ((int(bits or 8), shape) for _, bits, shape in _ARRAY.findall(result))  # "pred" has no number
    return sum(math.prod(int(size) for size in shape.split(",") if size) * bits // 8 for bits, shape in arrays)
