"""What is measured: an op, a layer or a training step, of given sizes, in a direction, by an implementation."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from peer_jax import memory
from peer_jax.errors import InputError
from peer_jax.fields import arguments_of
from peer_jax.layers import FeedForward
from peer_jax.ops import floor
from peer_jax.ops.floor import ORDERS, Floor

FORWARD, BOTH = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BOTH)
OPS = ("product_key_top_k", "expert_mix", "value_bag")
# PEER as PEER-pytorch can be set: without query norm, and with a set of sub-keys per head.
COMPARED = "PEER without query norm"
COMPARED_OPTIONS = {"query_norm": None, "share_sub_keys": False}
STEP, STEP_LAYER, STEP_OTHERS = "training step", "PEER", "Dense"  # the layers of a step's middle and other blocks
PYTORCH = "pytorch"
PYTORCH_KEEPING = "pytorch, keeping memory"  # with the settings of malloc that our commands have
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ONLY_ONE = "-"  # the implementation of a layer that has no choice of implementations
# The symbols of sizes in tables, by the names that the sizes have as arguments of layers.
SYMBOLS = {"tokens": "T", "d_model": "d", "num_experts": "N", "num_heads": "h", "top_k": "k"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one program computes; ``layer`` is the class to build, None for an op.

    With ``table_updates="touched"``, a step's tables have one second moment per row and no first moment; else they have
    Adam's moments.
    """

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
    layer: type[FeedForward] | None = None
    table_updates: str = "all"
    touched_share: float = 1.0

    @property
    def sizes(self) -> dict[str, int | str]:
        """The sizes that matter to the case, by their symbols."""
        N = self.num_experts
        side = round(N**0.5)
        values = (self.tokens, self.d_model, f"{side}^2" if side * side == N else N, self.heads, self.top_k)
        if self.layer is not None:
            taken = {"tokens", "d_model", *arguments_of(self.layer)} - {*self.layer.benchmark.ignored}
        else:
            taken = SYMBOLS.keys() - ({"d_model"} if self.name == "product_key_top_k" else set())
        return {symbol: value for (name, symbol), value in zip(SYMBOLS.items(), values, strict=True) if name in taken}

    @property
    def problem(self) -> tuple:
        """What competitors share: the case without how it is computed and without sizes that don't matter."""
        types = self.dtype, self.table_dtype
        return (self.what, self.name, self.direction, *types, *self.sizes.items())

    @property
    def shown(self) -> str:
        """How it is computed, as tables and figures call it."""
        return f"{self.implementation}, touched rows" if self.table_updates == "touched" else self.implementation

    def described(self) -> dict[str, Any]:
        """The fields as plain values, without the class."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "layer"}


def cases(
    what: str,
    name: str,
    layer: type[FeedForward] | None,
    implementations: Sequence[str],
    table_updates: Sequence[str] = ("all",),
    *,
    tokens: Sequence[int],
    d_model: Sequence[int],
    num_experts: Sequence[int],
    heads: Sequence[int],
    top_k: Sequence[int],
    dtype: str,
    table_dtype: str,
    touched_share: float = 1.0,
) -> Iterator[list[Case]]:
    """Yields the competitors of each problem (direction and sizes): a case per implementation and form of updates.

    Problems are unique.
    """
    if layer is not None and "implementation" not in arguments_of(layer):
        implementations = (ONLY_ONE,)
    seen = set()
    for direction in (BOTH,) if what == "step" else DIRECTIONS:
        for sizes in itertools.product(tokens, d_model, num_experts, heads, top_k):
            types = {"dtype": dtype, "table_dtype": table_dtype, "touched_share": touched_share}
            case = Case(what, name, direction, *sizes, **types, layer=layer)
            retrieves = {"N", "k"} <= case.sizes.keys()
            if case.problem in seen or (retrieves and case.top_k > case.num_experts):
                continue
            seen.add(case.problem)
            yield [
                dataclasses.replace(case, implementation=implementation, table_updates=updates)
                for implementation, updates in itertools.product(implementations, table_updates)
            ]


def layer_factory(case: Case) -> Callable[..., FeedForward]:
    """The class of the case with those sizes that its constructor takes; call it as a ``Transformer`` does.

    Raises:
        InputError: if the constructor needs what a case doesn't have.
    """
    assert case.layer is not None
    arguments = arguments_of(case.layer)
    given = {
        "num_experts": case.num_experts,
        "num_heads": case.heads,
        "top_k": case.top_k,
        "d_key": case.d_key,
        "implementation": case.implementation,
    }
    required = [name for name, argument in arguments.items() if argument.default is argument.empty][1:]
    if missing := [name for name in required if name not in (*given, "dtype", "param_dtype", "rngs")]:
        raise InputError(f"{case.layer.__name__} can't be measured: give its argument {missing[0]} a default value")
    options = {name: value for name, value in given.items() if name in arguments}
    return functools.partial(case.layer, **options, **(COMPARED_OPTIONS if case.name == COMPARED else {}))


def build_layer(case: Case) -> FeedForward:
    """The layer of a case.

    Raises:
        InputError: as ``layer_factory``, or if the sizes don't fit.
    """
    types = {"dtype": case.dtype, "param_dtype": case.table_dtype}
    types = {name: value for name, value in types.items() if name in arguments_of(case.layer)}
    return layer_factory(case)(case.d_model, **types, rngs=nnx.Rngs(0))


def check_memory(case: Case) -> None:
    """An InputError if the device can't hold a case."""
    sizes = ", ".join(f"{symbol}={value}" for symbol, value in case.sizes.items())
    largest = max(("tokens", "num_experts", "d_model", "heads", "top_k"), key=lambda name: getattr(case, name))
    memory.check(_least_bytes(case), f"{case.name} with {sizes}", "choose smaller sizes", largest)


def _least_bytes(case: Case) -> float:
    """Bytes of the arguments of a case, and for an op of what its reference holds for each retrieved row or score."""
    size, row_size = BYTES[case.dtype], BYTES[case.table_dtype]
    tokens = case.tokens * case.d_model * size
    if case.layer is not None:
        params = nnx.state(nnx.eval_shape(lambda: build_layer(case)), nnx.Param)
        return tokens + sum(math.prod(p.shape) * row_size for p in jax.tree.leaves(params))
    pairs = case.tokens * case.heads * case.top_k
    reference = case.implementation == "reference"
    if case.name == "product_key_top_k":
        n = math.isqrt(case.num_experts)
        queries = case.tokens * case.heads * (case.d_key + 2 * n * reference)
        return size * (queries + n * case.d_key) + pairs * (size + 4)
    tables = (1 if case.name == "value_bag" else 2) * case.num_experts * case.d_model * row_size
    return tokens + tables + pairs * (size + 4 + case.d_model * size * reference)


def floors(case: Case) -> dict[str, Floor | None]:
    """The floor of an op or a layer, in token order and in expert order; None if a layer doesn't know its own."""
    backward = case.direction == BOTH
    size, row_size = BYTES[case.dtype], BYTES[case.table_dtype]
    if case.layer is not None:
        layer = nnx.eval_shape(lambda: build_layer(case))
        how = {"backward": backward, "size": size, "weight_size": row_size}
        return {order: layer.floor(case.tokens, order, **how) for order in ORDERS}
    t, h, k = case.tokens, case.heads, case.top_k
    passes = (case.name, f"{case.name}_backward") if backward else (case.name,)
    if case.name == "product_key_top_k":
        sizes = t, h, round(case.num_experts**0.5), case.d_key, k
        return dict.fromkeys(ORDERS, sum((getattr(floor, one)(*sizes, size=size) for one in passes), Floor(0, 0)))
    sizes = t, h * k, case.d_model, case.num_experts
    return {
        order: sum((getattr(floor, one)(*sizes, order, size=size, row_size=row_size) for one in passes), Floor(0, 0))
        for order in ORDERS
    }
