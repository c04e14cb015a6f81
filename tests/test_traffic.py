"""The formulas of what split tables exchange, against the collectives in compiled programs on 8 devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives
from eight_devices import measured

from peer_jax.ops import expert_mix, traffic, value_bag
from peer_jax.ops.touched import compact_size, touched_by_all
from peer_jax.sharding import AXES, Sharding, current, parts_of, use

# Sizes whose products all differ, so that one array can't pass for another. Tables are larger than anything of tokens.
T, H, K, D, N = 8, 2, 3, 16, 1024
FORMS = ["rows", "columns"]
OPS = ["expert_mix", "value_bag"]
PASSES = ["forward", "backward", "step"]
# Devices along data, fsdp and expert, and the type of tokens; gates of expert_mix are float32 always, as PEER's are.
# float16 stands for bfloat16, which XLA sends as float32 on CPU.
MESHES = [
    ((1, 1, 8), "float32"),
    ((2, 2, 2), "float32"),
    ((8, 1, 1), "float32"),
    ((2, 1, 4), "float16"),
]
CASES = [(op, form, *mesh) for op, form, mesh in itertools.product(OPS, FORMS, MESHES)]
FIELDS = {"all-gather": "all_gather", "reduce-scatter": "reduce_scatter", "all-to-all": "all_to_all"}


def name(op, form, mesh, dtype):
    return f"{op} {form} {'x'.join(map(str, mesh))} {dtype}"


NAMES = list(itertools.starmap(name, CASES))


def op_of(op, indices):
    if op == "expert_mix":
        return lambda x, gates, down, up: expert_mix(x, down, up, indices, gates, jax.nn.gelu)
    return lambda gates, values: value_bag(values, indices, gates)


def compiled(op, form, mesh, dtype):
    """Collectives of the forward pass, of the backward pass given what the forward one leaves, and of both in one."""
    with use(Sharding(**dict(zip(AXES, mesh, strict=True)), tables=form).place()):
        t = 8 * T

        def of(shape, *axes, dtype=dtype):
            return jax.device_put(jnp.ones(shape, dtype), current().sharding(*axes))

        table = functools.partial(of, (N, D), "rows", "columns", dtype="float32")
        indices, x = of((t, H, K), "batch", dtype="int32"), of((t, D), "batch")
        if op == "expert_mix":
            arguments = x, of((t, H, K), "batch", dtype="float32"), table(), table()
        else:
            arguments = of((t, H, K), "batch"), table()

        def forward(indices, *arguments):
            return jax.vjp(op_of(op, indices), *arguments)

        def backward(pull, dy):
            return pull(dy)

        def step(indices, dy, *arguments):
            y, pull = forward(indices, *arguments)
            return y, pull(dy)

        programs = {"forward": jax.jit(forward).lower(indices, *arguments).compile()}
        _, pull = programs["forward"](indices, *arguments)
        programs["backward"] = jax.jit(backward).lower(pull, x).compile()
        programs["step"] = jax.jit(step).lower(indices, x, *arguments).compile()
        return {direction: collectives(program.as_text()) for direction, program in programs.items()}


# For the rows that are touched, with room for fewer than all and for all of a part: the most that a batch can touch.
MOST = (40, N)


def touched(form, mesh, most):
    """Collectives of what tells devices which rows a batch touches."""
    with use(Sharding(**dict(zip(AXES, mesh, strict=True)), tables=form).place()):
        indices = jax.device_put(jnp.ones((8 * T, H, K), jnp.int32), current().sharding("batch"))
        size = compact_size(N, most, parts_of("rows"))
        program = jax.jit(lambda indices: touched_by_all(indices, N, size)).lower(indices).compile()
        return collectives(program.as_text())


def measure():
    found = {name(*case): compiled(*case) for case in CASES}
    for form, (mesh, _), most in itertools.product(FORMS, MESHES, MOST):
        found[f"{form} {mesh} {most}"] = touched(form, mesh, most)
    return found


@pytest.fixture(scope="module")
def programs():
    return measured("test_traffic", "measure")


def expected(op, form, mesh, dtype, direction):
    E, D_copies = mesh[2], mesh[0] * mesh[1]
    size = jnp.dtype(dtype).itemsize
    sizes = {"size": size, "gate_size": 4 if op == "expert_mix" else size}
    if direction == "forward":
        return getattr(traffic, op)(T, H * K, D, E, form, **sizes)
    return getattr(traffic, f"{op}_{direction}")(T, H * K, D, N, E, D_copies, form, **sizes)


def found(program, E):
    """As ``Collectives``, but with all of the all-reduces in one."""
    whole = dict.fromkeys((*FIELDS.values(), "all_reduce"), 0)
    for kind, size in program:
        # The result of a reduce-scatter is a device's part of the array.
        whole[FIELDS.get(kind, kind.replace("-", "_"))] += size * (E if kind == "reduce-scatter" else 1)
    return whole


def in_one(formula):
    """A formula's collectives, as ``found`` has them."""
    parts = formula._asdict()
    parts["all_reduce"] += parts.pop("copies") + parts.pop("everywhere")
    return parts


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_bytes_are_those_of_the_compiled_program(programs, case, direction):
    assert found(programs[name(*case)][direction], case[2][2]) == in_one(expected(*case, direction))


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("mesh", [mesh for mesh, _ in MESHES])
@pytest.mark.parametrize("form", FORMS)
def test_bytes_that_say_which_rows_are_touched_are_those_of_the_compiled_program(programs, form, mesh, most):
    (data, fsdp, E), parts = mesh, mesh[2] if form == "rows" else 1
    formula = traffic.touched_rows(T, H * K, N, parts * min(most, N // parts), E, data * fsdp, form)
    assert found(programs[f"{form} {mesh} {most}"], E) == in_one(formula)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_nothing_of_a_table_s_size_moves_but_gradients_over_copies(programs, case):
    mesh = case[2]
    for direction, program in programs[name(*case)].items():
        large = {kind for kind, size in program if size >= 4 * N * D // mesh[2]}
        copies = mesh[0] * mesh[1] > 1 and direction != "forward"
        assert large == ({"all-reduce"} if copies else set())


def test_a_ring_moves_all_but_the_own_part_and_sums_twice():
    whole = traffic.Collectives(all_gather=8, reduce_scatter=16, all_to_all=24, all_reduce=32, copies=40, everywhere=48)
    assert whole.received(8, 2) == (7, 14, 21, 56, 40, 90)
    assert whole.received(1, 1) == (0, 0, 0, 0, 0, 0)
