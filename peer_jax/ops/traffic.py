"""What the ops on split tables exchange and hold, bytes by collective and memory a device, as in docs/sharding.md.

``expert_mix`` and ``value_bag`` of ``peer_jax.ops.sharded``, tables split by rows or by columns. A collective is
counted by the bytes of its whole array: of what a device has after an all-gather or an all-reduce, before a
reduce-scatter, and before or after an all-to-all. ``received`` says how much of it a device receives, and sends as
much, on a ring of the devices that take part: (E - 1) / E of it, an all-reduce twice that. Indices are int32; what is
summed is float32.

t  tokens of a device     r  retrieved rows a token     d  row width     N  rows of a table
E  devices along ``expert``     D  devices that hold the same part of a table, data * fsdp
"""

from typing import NamedTuple

INDEX, FLOAT = 4, 4  # bytes of an index, and of an element of what is summed


class Collectives(NamedTuple):
    """Bytes of one device by kind of collective: over ``expert``, but ``copies``, all-reduces over data and fsdp."""

    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_to_all: float = 0.0
    all_reduce: float = 0.0
    copies: float = 0.0

    def plus(self, other: "Collectives", times: float = 1.0) -> "Collectives":
        """Both, ``other`` as many times."""
        return Collectives(*(mine + times * more for mine, more in zip(self, other, strict=True)))

    def received(self, E: int, D: int) -> "Collectives":
        """The part of the arrays that a device receives."""
        over_expert, over_copies = (E - 1) / E, (D - 1) / D
        gathered, scattered, exchanged, summed, copies = self
        return Collectives(
            over_expert * gathered,
            over_expert * scattered,
            over_expert * exchanged,
            2 * over_expert * summed,
            2 * over_copies * copies,
        )


def expert_mix(t: int, r: int, d: int, E: int, tables: str, *, size: int = 4, gate_size: int = 4) -> Collectives:
    """Forward, with elements of x of ``size`` bytes and of gates of ``gate_size``.

    Rows: tokens, indices and gates go to all devices, sums of outputs back. Columns: tokens and outputs are exchanged
    by columns; of the products u . x, sums over devices are needed.
    """
    if E == 1:
        return Collectives()
    pairs, tokens = E * t * r, t * d
    gathered = (INDEX + gate_size) * pairs
    if tables == "rows":
        return Collectives(all_gather=size * E * tokens + gathered, reduce_scatter=FLOAT * E * tokens)
    return Collectives(all_gather=gathered, all_to_all=2 * size * tokens, all_reduce=FLOAT * pairs)


def expert_mix_backward(
    t: int, r: int, d: int, N: int, E: int, D: int, tables: str, *, size: int = 4, gate_size: int = 4
) -> Collectives:
    """Backward of the whole op, given its arguments, dy and, by columns, the products u . x of the device's tokens.

    Rows: x and dy go to all devices, sums of dx and of the gates' gradients back. Columns: x, dy and dx by columns; the
    products u . x, and sums of dy . v. Either: gradients of both tables, summed over their copies.
    """
    copies = _copies(2, N, d, E, D)
    if E == 1:
        return Collectives(copies=copies)
    pairs, tokens = E * t * r, t * d
    gathered = (INDEX + gate_size) * pairs
    if tables == "rows":
        summed = FLOAT * (E * tokens + pairs)
        return Collectives(all_gather=2 * size * E * tokens + gathered, reduce_scatter=summed, copies=copies)
    return Collectives(
        all_gather=gathered + FLOAT * pairs, all_to_all=3 * size * tokens, all_reduce=FLOAT * pairs, copies=copies
    )


def value_bag(t: int, r: int, d: int, E: int, tables: str, *, size: int = 4, gate_size: int = 4) -> Collectives:
    """Forward: indices and gates go to all devices; sums of outputs back by rows, their columns by columns."""
    if E == 1:
        return Collectives()
    gathered = (INDEX + gate_size) * E * t * r
    if tables == "rows":
        return Collectives(all_gather=gathered, reduce_scatter=FLOAT * E * t * d)
    return Collectives(all_gather=gathered, all_to_all=size * t * d)


def value_bag_backward(
    t: int, r: int, d: int, N: int, E: int, D: int, tables: str, *, size: int = 4, gate_size: int = 4
) -> Collectives:
    """Backward: dy goes to all devices, by columns its columns; sums of the gates' gradients come back."""
    copies = _copies(1, N, d, E, D)
    if E == 1:
        return Collectives(copies=copies)
    pairs, tokens = E * t * r, t * d
    gathered = (INDEX + gate_size) * pairs
    if tables == "rows":
        return Collectives(all_gather=size * E * tokens + gathered, reduce_scatter=FLOAT * pairs, copies=copies)
    return Collectives(all_gather=gathered, reduce_scatter=FLOAT * pairs, all_to_all=size * tokens, copies=copies)


def _copies(number: int, N: int, d: int, E: int, D: int) -> float:
    """Gradients of the device's parts of so many tables, in float32."""
    return number * FLOAT * N * d / E if D > 1 else 0.0


# Forward and backward in one program.


def expert_mix_step(
    t: int,
    r: int,
    d: int,
    N: int,
    E: int,
    D: int,
    tables: str,
    *,
    size: int = 4,
    gate_size: int = 4,
    remat: bool = False,
) -> Collectives:
    """Forward and backward in one program, where XLA exchanges once what both need: x, indices and gates.

    With ``remat`` they don't share it, as the forward pass forgets it; by columns the products u . x are then summed
    once more. Of the output, which the backward pass doesn't need, nothing is.
    """
    sizes = {"size": size, "gate_size": gate_size}
    both = expert_mix(t, r, d, E, tables, **sizes).plus(expert_mix_backward(t, r, d, N, E, D, tables, **sizes))
    if E == 1:
        return both
    if remat:
        return both.plus(Collectives(all_reduce=FLOAT * E * t * r)) if tables == "columns" else both
    gathered = (INDEX + gate_size) * E * t * r
    if tables == "rows":
        return both.plus(Collectives(all_gather=size * E * t * d + gathered), -1)
    return both.plus(Collectives(all_gather=gathered, all_to_all=size * t * d), -1)


def value_bag_step(
    t: int,
    r: int,
    d: int,
    N: int,
    E: int,
    D: int,
    tables: str,
    *,
    size: int = 4,
    gate_size: int = 4,
    remat: bool = False,
) -> Collectives:
    """Forward and backward in one program, where indices and gates are gathered once, but with ``remat``."""
    sizes = {"size": size, "gate_size": gate_size}
    both = value_bag(t, r, d, E, tables, **sizes).plus(value_bag_backward(t, r, d, N, E, D, tables, **sizes))
    if E == 1 or remat:
        return both
    return both.plus(Collectives(all_gather=(INDEX + gate_size) * E * t * r), -1)


# Memory.


class Memory(NamedTuple):
    """Bytes a device for an op's tables, and for what it holds beside them in the backward pass, where that is most.

    ``gradients`` has the device's part and, where there are copies to sum over, the part summed. ``gathered`` are
    tokens, pairs and their gradients; kept between the passes is ``kept`` of it. ``chunks`` are the rows that are
    worked on at a time.
    """

    tables: float
    gradients: float
    moments: float
    gathered: float
    kept: float
    chunks: float


def expert_mix_memory(
    t: int,
    r: int,
    d: int,
    N: int,
    E: int,
    D: int,
    tables: str,
    budget: int,
    *,
    size: int = 4,
    gate_size: int = 4,
    row_size: int = 4,
    moments: float = 2.0,
) -> Memory:
    """Of ``expert_mix``; ``budget`` is what a chunk of rows may hold (``peer_jax.ops.chunks``), a row float32.

    Rows: x, dy and the sum of dx of all g = E t tokens; index, gate, row, two places and the gate's gradient a pair.
    Columns: a device's columns of x, dy and dx of them; index, gate, u . x, dy . v, and two weights a pair.
    """
    g, pairs = E * t, E * t * r
    if tables == "rows" and E > 1:
        tokens = (2 * size + FLOAT) * g * d
        of_pairs = (4 * INDEX + gate_size + FLOAT) * pairs
        kept = size * g * d + (3 * INDEX + gate_size) * pairs
    else:
        tokens = 3 * size * g * d / E
        of_pairs = (INDEX + gate_size + 4 * FLOAT) * pairs
        kept = size * g * d / E + (INDEX + gate_size + FLOAT) * pairs
    return _memory(
        2, N, d, E, D, row_size, moments, tokens + of_pairs, kept, 4 * min(budget, FLOAT * pairs * _width(d, E, tables))
    )


def value_bag_memory(
    t: int,
    r: int,
    d: int,
    N: int,
    E: int,
    D: int,
    tables: str,
    budget: int,
    *,
    size: int = 4,
    gate_size: int = 4,
    row_size: int = 4,
    moments: float = 2.0,
) -> Memory:
    """Of ``value_bag``, as ``expert_mix_memory``; of tokens there is dy alone."""
    g, pairs = E * t, E * t * r
    by_rows = tables == "rows" and E > 1
    tokens = size * g * d / (1 if by_rows else E)
    of_pairs = ((4 if by_rows else 1) * INDEX + gate_size + FLOAT) * pairs
    kept = ((3 if by_rows else 1) * INDEX + gate_size) * pairs
    return _memory(
        1, N, d, E, D, row_size, moments, tokens + of_pairs, kept, 3 * min(budget, FLOAT * pairs * _width(d, E, tables))
    )


def _width(d: int, E: int, tables: str) -> float:
    """Of the rows that a device has."""
    return d if tables == "rows" else d / E


def _memory(
    number: int,
    N: int,
    d: int,
    E: int,
    D: int,
    row_size: int,
    moments: float,
    gathered: float,
    kept: float,
    chunks: float,
) -> Memory:
    """Of so many tables."""
    part = number * N * d / E
    return Memory(
        row_size * part, (2 if D > 1 else 1) * FLOAT * part, moments * row_size * part, gathered, kept, chunks
    )
