"""What a compiled program sends between devices, read from its text."""

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
    """``size`` is the bytes of its result on one device."""

    kind: str
    size: int


def collectives(text):
    """A ``Collective`` for each collective instruction of ``compiled.as_text()``, in its order.

    Its result is as large as its operand, but for an all-gather, whose operand is one device's part of it, and a
    reduce-scatter, whose result is one device's part of the operand. What XLA has combined into one is one, with the
    sum of the bytes; one in the body of a loop counts once, however often it runs; of an asynchronous one the end
    counts, not the start. On CPU, XLA reduces bfloat16 as float32.
    """
    matches = (_INSTRUCTION.search(line) for line in text.splitlines())
    return [Collective(match[2], _bytes(match[1])) for match in matches if match and match[3] != "-start"]


def _bytes(result):
    """Of an array as XLA writes its type, "f32[48,16]{1,0}", or of a tuple of them."""
    arrays = ((int(bits or 8), shape) for _, bits, shape in _ARRAY.findall(result))  # "pred" has no number
    return sum(math.prod(int(size) for size in shape.split(",") if size) * bits // 8 for bits, shape in arrays)
