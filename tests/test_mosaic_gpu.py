"""The Mosaic GPU kernels without a GPU: simulated with race detection against loops, and lowered at full size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from devices import Device
from eight_devices import measured
from reference import relative_error

from peer_jax.ops import mosaic_gpu, sharded
from peer_jax.ops.mosaic_gpu import copies, tables
from peer_jax.ops.mosaic_gpu.tokens import mix_tokens
from peer_jax.sharding import Sharding, compiled_for, use

# As in test_expert_mix: float32 sums of some hundred terms, and three roundings to bfloat16.
FP32 = 1e-5
BF16 = 2**-7

needs_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Pallas of JAX before 0.11 neither simulates nor lowers these kernels"
)
# A kernel with a wrong barrier hangs.
pytestmark = pytest.mark.timeout(120)

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "identity": lambda s: s}

# name: t, d, N, r, activation, type of x and gates, type of the tables
CASES = {
    "no size divides another": (3, 64, 13, 6, "gelu", jnp.float32, jnp.float32),
    "one token, one expert each": (1, 128, 7, 1, "relu", jnp.float32, jnp.float32),
    "a pool of one": (5, 64, 1, 3, "silu", jnp.bfloat16, jnp.bfloat16),
    "rings turn over": (2, 64, 11, 18, "gelu", jnp.bfloat16, jnp.float32),
    "everybody the same": (9, 64, 8, 3, "gelu", jnp.float32, jnp.float32),
    "a hot row": (7, 64, 12, 4, "identity", jnp.float32, jnp.float32),
    "wide": (2, 1088, 5, 3, "relu", jnp.float32, jnp.float32),
    # A row split over all warps, as at the target widths: two neighbours a lane (768) and four (1024).
    "split as at 768": (3, 256, 11, 6, "gelu", jnp.float32, jnp.float32),
    "split as at 1024": (3, 512, 11, 6, "gelu", jnp.bfloat16, jnp.float32),
}
# T, d, N, h * k
TARGETS = [(32768, 768, 1024**2, 128), (4096, 1024, 1024, 32)]


def draw(rng, t, d, N, r, dtype, table_dtype):
    """x, down, up, indices, gates, dy."""
    x, down, up, gates, dy = (rng.normal(size=shape) for shape in [(t, d), (N, d), (N, d), (t, r), (t, d)])
    indices = rng.integers(0, N, (t, r), np.int32)
    return (
        *(a.astype(b) for a, b in [(x, dtype), (down, table_dtype), (up, table_dtype)]),
        indices,
        *(a.astype(dtype) for a in (gates, dy)),
    )


@pytest.fixture
def simulated():
    """The argument `interpret`; the test fails if threads raced for memory."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not interpret_pallas_call.get_races().races_found


def gradients_of_mix(activation, interpret, x, down, up, indices, gates, dy):
    def mix(x, down, up, gates):
        return mosaic_gpu.expert_mix(x, down, up, indices, gates, ACTIVATIONS[activation], interpret=interpret)

    y, pullback = jax.vjp(mix, x, down, up, gates)
    return y, pullback(dy)


def gradients_of_bag(interpret, values, indices, gates, dy):
    y, pullback = jax.vjp(lambda v, g: mosaic_gpu.value_bag(v, indices, g, interpret=interpret), values, gates)
    return y, pullback(dy)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_expert_mix(rng, simulated, name, monkeypatch):
    *sizes, activation, dtype, table_dtype = CASES[name]
    monkeypatch.setattr(tables, "BLOCKS", 5)  # a block that owns two rows, where the pool has ten
    monkeypatch.setattr(tables, "PIECE", 4)
    x, down, up, indices, gates, dy = draw(rng, *sizes, dtype, table_dtype)
    hot = {"everybody the same": 4, "a hot row": 3}.get(name, 0)
    indices[:, :hot] = 5

    run = jax.jit(functools.partial(gradients_of_mix, activation, simulated))
    y, grads = run(x, down, up, indices, gates, dy)
    arguments = x, down, up, indices[:, None], gates[:, None], activation
    tolerance = FP32 if dtype == jnp.float32 else BF16
    assert y.dtype == dtype
    assert relative_error(y, reference.expert_mix(*arguments)) < tolerance
    expected = reference.expert_mix_grad(*arguments, dy)
    for of, primal, grad, wanted in zip(
        ("x", "down", "up", "gates"), (x, down, up, gates), grads, expected, strict=True
    ):
        assert grad.dtype == primal.dtype, of
        assert relative_error(grad, wanted.reshape(grad.shape)) < tolerance, of
    unused = np.setdiff1d(np.arange(len(down)), indices)
    assert not np.any(np.asarray(grads[1][unused])), "an expert nobody retrieved has a gradient"

    if name in ("rings turn over", "a hot row"):
        jax.tree.map(np.testing.assert_array_equal, run(x, down, up, indices, gates, dy), (y, grads))


@pytest.mark.parametrize("num_rows", [1, 9])
def test_rows_and_pieces_have_each_pair_once(rng, monkeypatch, num_rows):
    """Counted in plain Python: no pair is lost, and no row keeps two pieces' pairs or more."""
    monkeypatch.setattr(tables, "PIECE", 8)
    sort = jax.jit(tables.sort_by_row, static_argnums=1)
    for hot in [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]:
        indices = rng.integers(0, num_rows + 1, (61, 1), np.int32)  # num_rows is no row
        indices[rng.random(61) < hot] = rng.integers(num_rows + 1)
        check_pairs(jax.tree.map(np.asarray, sort(jnp.asarray(indices), num_rows)), indices[:, 0], num_rows)


def check_pairs(pairs, indices, num_rows):
    used = 0
    for row in range(num_rows):
        own = list(pairs.pair[pairs.starts[row] : pairs.starts[row + 1]])
        assert len(own) < 2 * tables.PIECE
        for i in range(pairs.row_pieces[row], pairs.row_pieces[row + 1]):
            own += list(pairs.pair[pairs.pieces[i] : pairs.pieces[i + 1]])
            used += tables.PIECE
        assert sorted(own) == list(np.flatnonzero(indices == row))
    assert pairs.pieces[-1] - pairs.pieces[0] == used, "pairs are summed that no row needs"


@needs_kernels
def test_the_roofline_counts_what_kernels_copy(rng, monkeypatch):
    """The bytes of all copies to shared memory in simulated kernels, a hot row and a row of no table included."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    copied = []

    def copy(source, *arguments, **more):
        size = source.dtype.itemsize * int(np.prod(source.shape))
        jax.debug.callback(lambda: copied.append(size))
        real(source, *arguments, **more)

    def bytes_copied(function, *arguments):
        copied.clear()
        jax.block_until_ready(jax.jit(function)(*arguments))
        jax.effects_barrier()
        return sum(copied)

    real = plgpu.copy_gmem_to_smem
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", copy)
    monkeypatch.setattr(tables, "PIECE", 8)
    t, d, N, r = 4, 64, 6, 5
    x, down, up, indices, gates, dy = draw(rng, t, d, N, r, jnp.bfloat16, jnp.float32)
    indices[:3], indices[3] = 2, [0, 2, 1, N, N]

    def mix(x, down, up, gates, read, write):
        near = np.minimum(indices, N - 1)
        return mix_tokens(
            *(x if read else None, down if read else None, up if write else None, jnp.asarray(near)),
            *(gates if write else None, lambda s: s, jnp.bfloat16, True),
        )

    for read, write in [(4, 4), (4, 0)]:
        wanted, _ = copies.mix_tokens(t, r, d, read=read, write=write, x=2 if read else 0, y=2 if write else 0)
        found = bytes_copied(functools.partial(mix, read=read, write=write), x, down, up, gates)
        assert found == wanted, (read, write)

    def table_gradients(gates, x, dy):
        terms = [(gates.astype(jnp.float32), x, jnp.float32), (gates.astype(jnp.float32), dy, jnp.float32)]
        return tables.sum_pairs(jnp.asarray(indices), N, terms, True)

    kernels = copies.sum_pairs(jnp.asarray(indices), N, d, [2, 2], [4, 4])
    added = 2 * 4 * d  # Row 2 has the pairs 2 to 17, and so one whole piece, whose sums are loaded and not copied.
    assert bytes_copied(table_gradients, gates, x, dy) == sum(reads for reads, _ in kernels.values()) - added


@needs_kernels
def test_value_bag(rng, simulated):
    _, values, _, indices, gates, dy = draw(rng, 3, 64, 7, 6, jnp.float32, jnp.float32)
    y, grads = jax.jit(functools.partial(gradients_of_bag, simulated))(values, indices, gates, dy)
    arguments = values, indices[:, None], gates[:, None]
    assert relative_error(y, reference.value_bag(*arguments)) < FP32
    for grad, wanted in zip(grads, reference.value_bag_grad(*arguments, dy), strict=True):
        assert relative_error(grad, wanted.reshape(grad.shape)) < FP32


def errors_on_split_tables(form):
    """Of y and the gradients of both ops against loops, within ``shard_map`` on two devices."""
    from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory

    # It asserts that no device has a barrier whenever one has finished, but others may be at work.
    GPUSharedMemory.assert_no_barriers_allocated = lambda self: None
    t, d, N, r = 4, {"rows": 64, "columns": 128}[form], 6, 5
    x, down, up, indices, gates, dy = draw(np.random.default_rng(0), t, d, N, r, jnp.float32, jnp.float32)
    indices[0], indices[3] = 5, [0, 4, 0, 5, 1]  # the first device has no row for the first token
    parts = mosaic_gpu.KernelParts(interpret=True)

    @jax.jit
    def run(x, down, up, gates):
        def mix(x, down, up, gates):
            return sharded.expert_mix(parts, x, down, up, jnp.asarray(indices), gates, jax.nn.gelu)

        y, pullback = jax.vjp(mix, x, down, up, gates)
        bag, bag_pullback = jax.vjp(lambda *a: sharded.value_bag(parts, a[0], jnp.asarray(indices), a[1]), up, gates)
        return y, *pullback(dy), bag, *bag_pullback(dy)

    with use(Sharding(data=1, expert=2, tables=form).place(jax.devices()[:2])):
        found = run(x, down, up, gates)
    mix, bag = (x, down, up, indices[:, None], gates[:, None], "gelu"), (up, indices[:, None], gates[:, None])
    wanted = reference.expert_mix(*mix), *reference.expert_mix_grad(*mix, dy)
    wanted += reference.value_bag(*bag), *reference.value_bag_grad(*bag, dy)
    return [float(relative_error(a, b.reshape(a.shape))) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("form", ["rows", "columns"])
def test_split_tables(form):
    assert max(measured("test_mosaic_gpu", "errors_on_split_tables", form)) < FP32


def sized(t, d, N, r, dtype):
    shapes = [((t, d), dtype), ((N, d), dtype), ((N, d), dtype), ((t, r), jnp.int32), ((t, r), dtype), ((t, d), dtype)]
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(("sizes", "activation"), [(TARGETS[0], "gelu"), (TARGETS[0], "silu"), (TARGETS[1], "relu")])
def test_lowers_at_full_size(sizes, activation):
    run = jax.jit(functools.partial(gradients_of_mix, activation, False))
    lowered = run.trace(*sized(*sizes, jnp.bfloat16)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 3


@needs_kernels
@pytest.mark.parametrize("d", [64, 640, 4096])
def test_lowers_at_every_kind_of_width(d):
    """The kernels of expert_mix in float32 and of value_bag in bfloat16."""
    x, down, up, indices, gates, dy = sized(5, d, 9, 3, jnp.float32)
    jax.jit(functools.partial(gradients_of_mix, "gelu", False)).trace(x, down, up, indices, gates, dy).lower(
        lowering_platforms=("cuda",)
    )
    _, values, _, indices, gates, dy = sized(5, d, 9, 3, jnp.bfloat16)
    jax.jit(functools.partial(gradients_of_bag, False)).trace(values, indices, gates, dy).lower(
        lowering_platforms=("cuda",)
    )


def largest(jaxpr):
    """Elements of the largest array that a program makes, kernels' insides apart."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        if "mpmd" not in equation.primitive.name and "pallas" not in equation.primitive.name:
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
            sizes += [largest(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns")]
    return max(sizes)


@needs_kernels
def test_memory_holds_no_rows_of_all_tokens():
    t, d, N, r = 1024, 64, 100, 16
    run = functools.partial(gradients_of_mix, "gelu", False)
    jaxpr = jax.make_jaxpr(run)(*sized(t, d, N, r, jnp.bfloat16)).jaxpr
    assert largest(jaxpr) <= max(4 * t * r, t * d, N * d) < t * r * d  # four floats per pair: its weights


def test_why_not(monkeypatch):
    def why_not(t=4, d=64, N=9, r=2, dtype=jnp.float32, table_dtype=jnp.float32, platform="gpu"):
        with compiled_for(Device(platform)):
            return mosaic_gpu.why_not(jax.ShapeDtypeStruct((t, d), dtype), jax.ShapeDtypeStruct((N, d), table_dtype), r)

    assert "'tpu'" in why_not(platform="tpu")
    assert "'cpu'" in mosaic_gpu.why_not(jnp.zeros((1, 64)), jnp.zeros((1, 64)), 1)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert "0.10.2" in why_not()
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert why_not() is None
    assert why_not(t=1, N=1, r=1, d=4096, dtype=jnp.bfloat16) is None
    assert "not 96" in why_not(d=96)
    assert "not 8192" in why_not(d=8192)
    assert "float16" in why_not(dtype=jnp.float16)
    assert "the table is float16" in why_not(table_dtype=jnp.float16)
    assert "nothing" in why_not(t=0)
    assert "not 5000" in why_not(r=5000)
    assert "32 bits" in why_not(t=2**24, r=128)


@needs_kernels
def test_refuses_what_it_cannot_take():
    x, down, up, indices, gates, _ = (jnp.zeros(a.shape, a.dtype) for a in sized(2, 96, 3, 1, jnp.float32))
    with pytest.raises(ValueError, match="not 96"):
        mosaic_gpu.expert_mix(x, down, up, indices, gates, jax.nn.gelu)
    with pytest.raises(ValueError, match="alike"):
        mosaic_gpu.expert_mix(x, down, up.astype(jnp.bfloat16), indices, gates, jax.nn.gelu)
