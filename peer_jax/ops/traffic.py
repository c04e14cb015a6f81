"""What the ops on split tables exchange: bytes by collective (docs/sharding.md).

The ops are ``expert_mix`` and ``value_bag`` of ``peer_jax.ops.sharded``, with tables split by rows or by columns. A
collective is counted by the bytes of its whole array, which a device has after an all-gather or an all-reduce, before a
reduce-scatter, and before or after an all-to-all. ``received`` computes which part of it a device receives, and sends,
on a ring of the devices that take part: (E - 1) / E of it, and twice that for an all-reduce. Indices are int32; sums
are float32.

t  tokens of a device     r  rows retrieved per token     d  width of a row     N  rows of a table
E  devices along ``expert``     D  devices that hold the same part of a table, data * fsdp

In a step on touched rows the ops work on compact tables (``peer_jax.ops.touched``), whose rows are then their N.
"""

from typing import NamedTuple

INDEX, FLOAT, FLAG = 4, 4, 1  # bytes of an index, of an element of a sum, and of a flag


class Collectives(NamedTuple):
    """Bytes of one device by kind of collective, over ``expert``.

    ``copies`` are all-reduces over data and fsdp, ``everywhere`` those over all devices.
    """

    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_to_all: float = 0.0
    all_reduce: float = 0.0
    copies: float = 0.0
    everywhere: float = 0.0

    def plus(self, other: "Collectives", times: float = 1.0) -> "Collectives":
        """The sum of these and ``times`` times ``other``."""
        return Collectives(*(mine + times * more for mine, more in zip(self, other, strict=True)))

    def received(self, E: int, D: int) -> "Collectives":
        """The bytes that a device receives."""
        over_expert, over_copies, over_all = (E - 1) / E, (D - 1) / D, (E * D - 1) / (E * D)
        gathered, scattered, exchanged, summed, copies, everywhere = self
        return Collectives(
            over_expert * gathered,
            over_expert * scattered,
            over_expert * exchanged,
            2 * over_expert * summed,
            2 * over_copies * copies,
            2 * over_all * everywhere,
        )


def expert_mix(t: int, r: int, d: int, E: int, tables: str, *, size: int = 4, gate_size: int = 4) -> Collectives:
    """Forward pass; an element of x has ``size`` bytes, an element of the gates ``gate_size``.

    With tables by rows, tokens, indices and gates go to all devices, and sums of outputs come back. With tables by
    columns, tokens and outputs are exchanged by columns, and the products u . x are summed over devices.
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
    """Backward pass of the whole op, given its arguments, dy and, with tables by columns, u . x of the device's tokens.

    With tables by rows, x and dy go to all devices, and sums of dx and of the gates' gradients come back. With tables
    by columns, x, dy and dx are exchanged by columns, the products u . x are gathered, and dy . v is summed. In both
    cases the gradients of both tables are summed over their copies.
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
    """Forward pass: indices and gates go to all devices; sums of outputs (or columns of outputs) come back."""
    if E == 1:
        return Collectives()
    gathered = (INDEX + gate_size) * E * t * r
    if tables == "rows":
        return Collectives(all_gather=gathered, reduce_scatter=FLOAT * E * t * d)
    return Collectives(all_gather=gathered, all_to_all=size * t * d)


def value_bag_backward(
    t: int, r: int, d: int, N: int, E: int, D: int, tables: str, *, size: int = 4, gate_size: int = 4
) -> Collectives:
    """Backward pass: dy (or its columns) goes to all devices; sums of the gates' gradients come back."""
    copies = _copies(1, N, d, E, D)
    if E == 1:
        return Collectives(copies=copies)
    pairs, tokens = E * t * r, t * d
    gathered = (INDEX + gate_size) * pairs
    if tables == "rows":
        return Collectives(all_gather=size * E * tokens + gathered, reduce_scatter=FLOAT * pairs, copies=copies)
    return Collectives(all_gather=gathered, reduce_scatter=FLOAT * pairs, all_to_all=size * tokens, copies=copies)


def touched_rows(t: int, r: int, N: int, U: int, E: int, D: int, tables: str) -> Collectives:
    """What tells devices which rows a batch touches: at most U of the table, counting all parts.

    With tables by rows, indices go to all devices along ``expert``, and places in the compact table come back. Devices
    with the same rows combine a flag for each row that they have, and then the numbers of the touched ones.
    """
    known = FLAG * N + INDEX * U
    if tables == "columns":
        return Collectives(everywhere=known if E * D > 1 else 0.0)
    exchanged = INDEX * E * t * r if E > 1 else 0.0
    return Collectives(all_gather=exchanged, reduce_scatter=exchanged, copies=known / E if D > 1 else 0.0)


def _copies(number: int, N: int, d: int, E: int, D: int) -> float:
    """Bytes of the float32 gradients of a device's parts of ``number`` tables, if there are copies to sum over."""
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
    """Forward and backward pass in one program, where XLA exchanges x, indices and gates once for both.

    With ``remat`` the passes don't share them, because the forward pass doesn't keep them. Neither the products u . x,
    which are kept, nor the output, which the backward pass does not need, is computed again.
    """
    sizes = {"size": size, "gate_size": gate_size}
    both = expert_mix(t, r, d, E, tables, **sizes).plus(expert_mix_backward(t, r, d, N, E, D, tables, **sizes))
    if E == 1 or remat:
        return both
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
    """Forward and backward pass in one program. Indices and gates are gathered once, or twice with ``remat``."""
    sizes = {"size": size, "gate_size": gate_size}
    both = value_bag(t, r, d, E, tables, **sizes).plus(value_bag_backward(t, r, d, N, E, D, tables, **sizes))
    if E == 1 or remat:
        return both
    return both.plus(Collectives(all_gather=(INDEX + gate_size) * E * t * r), -1)
