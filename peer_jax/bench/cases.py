"""What is measured: an op, a layer or a training step, of given sizes, in a direction, by an implementation."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from peer_jax.ops import floor
from peer_jax.ops.floor import ORDERS, Floor

FORWARD, BOTH = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BOTH)
OPS = ("product_key_top_k", "expert_mix", "value_bag")
LAYERS = ("PEER", "PKM", "Dense")
# With the weights that PEER-pytorch can have, too: no query norm, and sub-keys a head.
COMPARED = "PEER without query norm"
STEP = "training step"
PYTORCH = "pytorch"
PYTORCH_KEEPING = "pytorch, keeping memory"  # with the settings of malloc that our commands have
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Plain values, so that it can be sent to another process."""

    what: str
    name: str
    direction: str
    tokens: int
    d_model: int
    num_experts: int
    heads: int
    top_k: int
    d_key: int = 128
    dtype: str = "float32"
    table_dtype: str = "float32"
    implementation: str = "xla"

    @property
    def sizes(self) -> dict[str, int | str]:
        """Those that matter to it, by their symbols."""
        n = f"{round(self.num_experts**0.5)}^2"
        named = {"T": self.tokens, "d": self.d_model, "N": n, "h": self.heads, "k": self.top_k}
        left_out = {"product_key_top_k": {"d"}, "Dense": {"N", "h", "k"}}.get(self.name, set())
        return {symbol: value for symbol, value in named.items() if symbol not in left_out}

    @property
    def problem(self) -> tuple:
        """What competitors share: equal for cases that differ in the implementation or in what doesn't matter."""
        return (self.what, self.name, self.direction, self.dtype, self.table_dtype, *self.sizes.items())


def cases(
    what: str,
    names: Sequence[str],
    implementations: Sequence[str],
    *,
    tokens: Sequence[int],
    d_model: Sequence[int],
    num_experts: Sequence[int],
    heads: Sequence[int],
    top_k: Sequence[int],
    dtype: str,
    table_dtype: str,
) -> Iterator[list[Case]]:
    """The competitors of each problem: names by directions by sizes, each problem once, from small to large."""
    seen = set()
    directions = (BOTH,) if what == "step" else DIRECTIONS
    for name, direction in itertools.product(names, directions):
        for sizes in itertools.product(tokens, d_model, num_experts, heads, top_k):
            case = Case(what, name, direction, *sizes, dtype=dtype, table_dtype=table_dtype)
            if case.problem in seen or case.top_k > case.num_experts:
                continue
            seen.add(case.problem)
            # A dense layer has one implementation.
            several = ("-",) if name == "Dense" else implementations
            yield [dataclasses.replace(case, implementation=implementation) for implementation in several]


def floors(case: Case) -> dict[str, Floor]:
    """The floor of an op or a layer, in token order and in expert order; a layer's is the sum of its parts'."""
    return {order: sum(_parts(case, order), Floor(0, 0)) for order in ORDERS}


def _parts(case: Case, order: str) -> Iterator[Floor]:
    t, d, N, h, k, d_key = case.tokens, case.d_model, case.num_experts, case.heads, case.top_k, case.d_key
    n = round(N**0.5)
    size, row_size = BYTES[case.dtype], BYTES[case.table_dtype]
    backward = case.direction == BOTH

    def linear(d_in: int, d_out: int) -> Iterator[Floor]:
        yield floor.linear(t, d_in, d_out, size=size, weight_size=row_size)
        if backward:
            yield floor.linear_backward(t, d_in, d_out, size=size, weight_size=row_size)

    if case.name == "Dense":
        yield from linear(d, 4 * d)
        yield from linear(4 * d, d)
        return
    if case.what == "layer":
        yield from linear(d, h * d_key)
    if case.name not in ("expert_mix", "value_bag"):
        key_sets = h if case.name == COMPARED else 1
        # In a layer, queries are float32 whatever its type, and sub-keys are of the type of the parameters.
        scored, key_size = (4, row_size) if case.what == "layer" else (size, size)
        narrower = Floor((key_size - scored) * key_sets * n * d_key, 0)
        yield floor.product_key_top_k(t, h, n, d_key, k, key_sets=key_sets, size=scored) + narrower
        if backward:
            both = floor.product_key_top_k_backward(t, h, n, d_key, k, key_sets=key_sets, size=scored)
            yield both + narrower + narrower  # the sub-keys and their gradients
    if case.name == "product_key_top_k":
        return
    is_bag = case.name in ("value_bag", "PKM")
    forward, gradient = (
        (floor.value_bag, floor.value_bag_backward) if is_bag else (floor.expert_mix, floor.expert_mix_backward)
    )
    yield forward(t, h * k, d, N, order, size=size, row_size=row_size)
    if backward:
        yield gradient(t, h * k, d, N, order, size=size, row_size=row_size)
