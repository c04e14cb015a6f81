"""The compiled program of a case, with random arguments."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from peer_jax.bench.cases import BOTH, COMPARED, STEP_OTHERS, Case, build_layer, floors, layer_factory
from peer_jax.errors import InputError
from peer_jax.layers import families
from peer_jax.ops import expert_mix, mosaic_gpu, product_key_top_k, value_bag
from peer_jax.ops.floor import Floor, training_step


class Program(NamedTuple):
    """``call`` runs it; ``results`` returns y and gradients, for a program that is compared with another."""

    call: Callable[[], Any]
    floors: dict[str, Floor | None]  # by order; None if unknown
    memory: int | None  # bytes of outputs and temporary arrays, according to the compiler
    results: Callable[[], dict[str, np.ndarray]] | None = None
    state: int | None = None  # bytes that a step keeps from one call to the next


def program(case: Case) -> Program:
    """Compiles the case.

    Raises:
        InputError: if the implementation can't take the sizes.
    """
    _check_is_taken(case)
    if case.what == "step":
        return _step(case)
    function, variables, fixed = _op(case) if case.what == "op" else layer_function(case)
    y = jax.eval_shape(lambda variables, fixed: function(variables, fixed)[0], variables, fixed)
    dy = jax.random.normal(jax.random.key(1), y.shape, y.dtype)

    def forward(variables, fixed, dy):
        return function(variables, fixed)

    def both(variables, fixed, dy):
        y, pull, aux = jax.vjp(lambda variables: function(variables, fixed), variables, has_aux=True)
        return y, aux, pull(dy)

    compiled = jax.jit(both if case.direction == BOTH else forward).lower(variables, fixed, dy).compile()

    def results() -> dict[str, np.ndarray]:
        y, _, *pulled = compiled(variables, fixed, dy)
        if not pulled:
            return {"y": np.asarray(y)}
        ((params, x),) = pulled[0]
        return {"y": np.asarray(y), "dx": np.asarray(x), "d_up": np.asarray(params["up"].get_value())}

    call = functools.partial(compiled, variables, fixed, dy)
    return Program(call, floors(case), compiled_memory(compiled), results if case.name == COMPARED else None)


def _check_is_taken(case: Case) -> None:
    """Raises InputError if the op would fall back to another implementation, whose time would have the wrong name."""
    if case.implementation != "mosaic_gpu":
        return
    if case.name == "product_key_top_k":
        raise InputError("product_key_top_k has no kernel of that kind")
    x = jax.ShapeDtypeStruct((case.tokens, case.d_model), case.dtype)
    table = jax.ShapeDtypeStruct((case.num_experts, case.d_model), case.table_dtype)
    if reason := mosaic_gpu.why_not(x, table, case.heads * case.top_k):
        raise InputError(reason)


def compiled_memory(compiled: Any) -> int | None:
    """Bytes of a program beside its arguments; None if the backend doesn't tell."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


Function = Callable[[Any, Any], tuple[Array, Any]]


def _op(case: Case) -> tuple[Function, Any, Any]:
    """The op as ``function(variables, fixed) -> (y, what has no gradient)``, and its arguments."""
    t, h, k, d, N = case.tokens, case.heads, case.top_k, case.d_model, case.num_experts
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape: int, dtype: str = case.dtype) -> Array:
        return jax.random.normal(next(keys), shape, dtype)

    how = {"implementation": case.implementation}
    if case.name == "product_key_top_k":
        variables = (normal(t, h, case.d_key), normal(2, round(N**0.5), case.d_key // 2))
        return lambda arrays, _: product_key_top_k(*arrays, k, **how), variables, ()
    # Indices are an argument of the program, because XLA would sort constant ones at compile time.
    indices = jax.random.randint(next(keys), (t, h, k), 0, N)
    gates = jax.nn.softmax(normal(t, h, k))
    if case.name == "value_bag":
        return (
            lambda a, i: (value_bag(a[0], i, a[1], **how), ()),
            (normal(N, d, dtype=case.table_dtype), gates),
            indices,
        )
    tables = [normal(N, d, dtype=case.table_dtype) for _ in range(2)]

    def mix(arrays, indices):
        x, down, up, gates = arrays
        return expert_mix(x, down, up, indices, gates, jax.nn.gelu, **how), ()

    return mix, (normal(t, d), *tables, gates), indices


def layer_function(case: Case) -> tuple[Function, Any, Any]:
    t, d = case.tokens, case.d_model
    x = jax.random.normal(jax.random.key(2), (1, t, d), case.dtype)
    layer = build_layer(case)
    graph, params, others = nnx.split(layer, nnx.Param, ...)
    if case.name == COMPARED:
        given = compared_weights(case)
        x = given.pop("x")
        params["query_proj"]["kernel"].set_value(jnp.asarray(given.pop("query_proj")))
        for name, value in given.items():
            params[name].set_value(jnp.asarray(value))
        x = jnp.asarray(x)

    def function(variables, others):
        params, x = variables
        layer = nnx.merge(graph, params, others, copy=True)
        y, _ = layer(x)
        return y, nnx.split(layer, nnx.Param, ...)[2]

    return function, (params, x), others


def compared_weights(case: Case) -> dict[str, np.ndarray]:
    """Float32 weights and input for both sides of a comparison, the same in every process."""
    rng = np.random.default_rng(0)
    n, c = round(case.num_experts**0.5), case.d_key // 2
    d, N, h = case.d_model, case.num_experts, case.heads

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    return {
        "x": normal(1, case.tokens, d, scale=1),
        "query_proj": normal(d, h * case.d_key, scale=d**-0.5),
        "sub_keys": normal(h, 2, n, c, scale=c**-0.5),
        "down": normal(N, d, scale=d**-0.5),
        "up": normal(N, d, scale=d**-0.5),
    }


BLOCKS, SEQUENCE, VOCABULARY = 8, 256, 259


def _step(case: Case) -> Program:
    """A step of AdamW on rows of up to 256 bytes; the case's layer is in the middle one of a transformer's 8 blocks."""
    from peer_jax.models import Transformer
    from peer_jax.training.flops import training_flops
    from peer_jax.training.optimizer import AdamW
    from peer_jax.training.step import Trainer

    length = min(SEQUENCE, case.tokens)
    layers = {"ffw": families()[STEP_OTHERS], "sparse_ffw": layer_factory(case)}
    build = functools.partial(Transformer, VOCABULARY, case.d_model, BLOCKS, 4, **layers, dtype=case.dtype)
    by_row = {"table_b1": 0.0, "table_second_moment": "row", "table_updates": "touched"}
    by_row["touched_share"] = case.touched_share
    trainer = Trainer(build, AdamW(learning_rate=1e-3, **(by_row if case.table_updates == "touched" else {})))
    state = trainer.init(0)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (case.tokens // length, length)).astype(np.int32)
    data = {"inputs": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens)}
    rates = trainer.optimizer.rates(trainer.labels, 0, 10)
    compiled = trainer.compiled_step().lower(state, data, rates).compile()
    memory = compiled.memory_analysis()

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, data, rates)
        return metrics

    metrics = call()
    if not np.isfinite(metrics["loss"]):
        raise InputError(
            f"touched_share={case.touched_share} leaves too little room for the rows that a step touches: raise it"
        )
    whole, tables = trainer.touched.split(trainer.abstract_state().params, tokens.size)
    least = training_step(
        sum(p.size for p in jax.tree.leaves(whole)), training_flops(trainer.abstract_model, tokens.size, length)
    )
    for table in jax.tree.leaves(tables):
        # A row and its second moment, which is one number, are read and written once.
        row = table.shape[1] * table.dtype.itemsize + 4
        least += Floor(2.0 * row * float(metrics["touched_rows"]), 0.0)
    # The outputs need no memory: they are written into the arrays of the state.
    temporary = None if memory is None else int(memory.temp_size_in_bytes)
    kept = sum(a.nbytes for a in jax.tree.leaves(state))
    return Program(call, {"token": least, "expert": least}, temporary, state=kept)
