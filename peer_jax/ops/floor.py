"""The fewest bytes and FLOPs that the ops need; measured times are compared with the time that these take.

Every input is read once and every output is written once. In token order, rows of a table are read once per use; in
expert order they are read once per touched row, as a row is held while all its tokens pass by. Gradients of tables are
dense and written whole. Nothing else is counted: no sorting, no activation, no second pass.

t  tokens     r  rows retrieved per token, r = h * k     d  width of a row     N  rows of a table
n  sub-keys per half
"""

import dataclasses
import math

ORDERS = ("token", "expert")
INDEX = 4  # bytes of an index or a score


@dataclasses.dataclass(frozen=True)
class Floor:
    """Bytes to and from memory, and floating point operations; a multiply-add counts 2."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, flops_per_second: float = math.inf) -> float:
        """The time that no implementation can beat, with ``bandwidth`` in bytes per second."""
        return max(self.bytes / bandwidth, self.flops / flops_per_second)

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.bytes + other.bytes, self.flops + other.flops)


def touched_rows(num_rows: int, retrieved: int) -> float:
    """The expected number of rows that ``retrieved`` uniform independent draws touch, N (1 - (1 - 1/N)^retrieved)."""
    if num_rows == 1:
        return float(retrieved > 0)
    return -num_rows * math.expm1(retrieved * math.log1p(-1 / num_rows))


def rows_read(order: str, num_rows: int, retrieved: int) -> float:
    """Rows of one table that are read from memory: one per use in token order, touched rows once in expert order."""
    return float(retrieved) if order == "token" else touched_rows(num_rows, retrieved)


def product_key_top_k(t: int, h: int, n: int, d_key: int, k: int, *, key_sets: int = 1, size: int = 4) -> Floor:
    """Forward: queries and sub-keys in; k scores (float32) and indices per head out. It is the same in both orders."""
    moved = size * (t * h * d_key + key_sets * n * d_key) + 2 * INDEX * t * h * k
    return Floor(moved, 2.0 * t * h * n * d_key)


def product_key_top_k_backward(
    t: int, h: int, n: int, d_key: int, k: int, *, key_sets: int = 1, size: int = 4
) -> Floor:
    """Backward: queries, sub-keys, indices and the scores' gradients in; gradients of queries and sub-keys out.

    A retrieved score is a sum of two products of width d_key / 2, so its gradient costs a multiply-add per element of
    the query and another per element of the two sub-keys.
    """
    moved = 2 * size * (t * h * d_key + key_sets * n * d_key) + 2 * INDEX * t * h * k
    return Floor(moved, 4.0 * t * h * k * d_key)


def expert_mix(t: int, r: int, d: int, num_experts: int, order: str, *, size: int = 4, row_size: int = 4) -> Floor:
    """Forward: x, indices, gates and the rows of two tables in, y out."""
    rows = 2 * row_size * d * rows_read(order, num_experts, t * r)
    return Floor(2 * size * t * d + (INDEX + size) * t * r + rows, 4.0 * t * r * d)


def expert_mix_backward(
    t: int, r: int, d: int, num_experts: int, order: str, *, size: int = 4, row_size: int = 4
) -> Floor:
    """Backward: x, dy, indices, gates and the rows in; dx, the gates' gradients and both dense tables' gradients out.

    The projections u . x are assumed to be kept from the forward pass. The products are dy . v, dx, and the gradients
    of a row of either table.
    """
    rows = 2 * row_size * d * rows_read(order, num_experts, t * r)
    pairs = (INDEX + size + 4 + size) * t * r  # index, gate, projection; the gate's gradient
    return Floor(3 * size * t * d + pairs + rows + 2 * row_size * d * num_experts, 8.0 * t * r * d)


def value_bag(t: int, r: int, d: int, num_values: int, order: str, *, size: int = 4, row_size: int = 4) -> Floor:
    """Forward: indices, gates and the rows of one table in, y out."""
    rows = row_size * d * rows_read(order, num_values, t * r)
    return Floor(size * t * d + (INDEX + size) * t * r + rows, 2.0 * t * r * d)


def value_bag_backward(
    t: int, r: int, d: int, num_values: int, order: str, *, size: int = 4, row_size: int = 4
) -> Floor:
    """Backward: dy, indices, gates and the rows in; the gates' gradients and the dense table's gradient out."""
    rows = row_size * d * rows_read(order, num_values, t * r)
    pairs = (INDEX + 2 * size) * t * r
    return Floor(size * t * d + pairs + rows + row_size * d * num_values, 4.0 * t * r * d)


def linear(t: int, d_in: int, d_out: int, *, size: int = 4, weight_size: int = 4) -> Floor:
    """Forward of a matrix product: x and the weights in, y out."""
    return Floor(size * t * (d_in + d_out) + weight_size * d_in * d_out, 2.0 * t * d_in * d_out)


def linear_backward(t: int, d_in: int, d_out: int, *, size: int = 4, weight_size: int = 4) -> Floor:
    """Backward of a matrix product: x, dy and the weights in, dx and the weights' gradient out."""
    return Floor(size * t * (2 * d_in + d_out) + 2 * weight_size * d_in * d_out, 4.0 * t * d_in * d_out)


def linear_passes(t: int, d_in: int, d_out: int, *, backward: bool, size: int, weight_size: int) -> Floor:
    """Forward of a matrix product and, if asked for, its backward pass too."""
    least = linear(t, d_in, d_out, size=size, weight_size=weight_size)
    return least + linear_backward(t, d_in, d_out, size=size, weight_size=weight_size) if backward else least


def training_step(num_params: int, flops: float) -> Floor:
    """A step of AdamW in float32: gradients, parameters and both moments are written and read once each."""
    return Floor(8.0 * 4 * num_params, flops)
