"""The ops on 8 devices: forward and gradient against loops and one device, tables by rows and columns, skewed indices.

T  tokens     d  width     N  rows     h, k  heads, top-k     n  sub-keys in a half     c  d_key / 2
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from collectives import collectives
from eight_devices import measured
from reference import relative_error

from peer_jax import ops
from peer_jax.errors import InputError
from peer_jax.layers.interface import Table
from peer_jax.layers.touched import TouchedTable, retrieved
from peer_jax.ops import chunks, cross_entropy
from peer_jax.sharding import Sharding, current, use

# As in test_expert_mix: float32 and bfloat16 against float64.
FP32, BF16 = 1e-5, 2**-7
# Sums in another order, of a dozen terms or, for a row of a table, some hundred; each term rounds off 6e-8.
EQUAL = 1e-6

T, D, N, H, K = 16, 16, 64, 2, 4
# Devices along data, fsdp and expert, and the form of the tables.
SPLIT = [
    ((data, fsdp, 8 // (data * fsdp)), form)
    for data, fsdp in [(1, 1), (2, 1), (2, 2), (1, 4), (4, 1)]
    for form in ("rows", "columns")
]
WHOLE = [((8, 1, 1), "rows"), ((1, 8, 1), "rows"), ((2, 4, 1), "columns")]
# Where "reference" is asked for, which XLA partitions by itself.
PARTITIONED = [((1, 1, 8), "rows"), ((1, 1, 8), "columns"), ((2, 2, 2), "rows"), ((2, 2, 2), "columns")]
OPS = ["expert_mix", "value_bag"]
TOUCHED = [((1, 1, 8), "rows"), ((2, 2, 2), "rows"), ((2, 1, 4), "columns"), ((8, 1, 1), "rows")]


def draw_indices():
    """Indices of the rows that the tokens retrieve; each of 8 devices may hold 8 rows, each of 4 16, each of 2 32."""
    rng = np.random.default_rng(1)

    def draw(low, high):
        return rng.integers(low, high, (T, H, K), np.int32)

    bad = draw(1, N - 1)
    bad[3, 1, 2], bad[9, 0, 0] = N, -1
    return {
        "spread": draw(0, N),
        "all of the first device": draw(0, N // 8),
        "all of the last device": draw(N - N // 8, N),
        "none of the first device": draw(N // 2, N),
        "one row": np.full((T, H, K), 37, np.int32),
        "bad": bad,
    }


INDICES = draw_indices()


def draw(dtype=np.float32):
    """x, down, up, gates, dy, of which x, gates and dy are of type ``dtype``."""
    rng = np.random.default_rng(0)
    x, down, up, gates, dy = (rng.normal(size=shape) for shape in [(T, D), (N, D), (N, D), (T, H, K), (T, D)])
    down /= np.sqrt(D)  # keeps arguments of gelu near 1: at 10, 1 - tanh^2 in its derivative is lost in float32
    return x.astype(dtype), np.float32(down), np.float32(up), gates.astype(dtype), dy.astype(dtype)


def run(op, implementation=None):
    """(x, down, up, gates, dy, indices) -> the output and the gradients of all but the indices."""

    @jax.jit
    def run(x, down, up, gates, dy, indices):
        def mix(x, down, up, gates):
            return ops.expert_mix(x, down, up, indices, gates, jax.nn.gelu, implementation=implementation)

        def bag(up, gates):
            return ops.value_bag(up, indices, gates, implementation=implementation)

        y, pullback = jax.vjp(mix, x, down, up, gates) if op == "expert_mix" else jax.vjp(bag, up, gates)
        return y, *pullback(dy)

    return run


def good_tokens(indices):
    """The tokens without a bad index."""
    return ((indices >= 0) & (indices < N)).all(axis=(1, 2))


def loops(op, x, down, up, gates, dy, indices):
    """What ``run`` computes, by loops, as if tokens with a bad index retrieved nothing."""
    good = good_tokens(indices)
    gates, indices = np.where(good[:, None, None], gates, 0), np.where(good[:, None, None], indices, 0)
    if op == "expert_mix":
        y = reference.expert_mix(x, down, up, indices, gates, "gelu")
        return y, *reference.expert_mix_grad(x, down, up, indices, gates, "gelu", np.where(good[:, None], dy, 0))
    return reference.value_bag(up, indices, gates), *reference.value_bag_grad(up, indices, gates, dy)


def error(actual, expected, indices):
    """The largest relative error in good tokens and rows that only these retrieve; infinite unless others are NaN."""
    good = good_tokens(indices)
    judged = {T: good, N: np.setdiff1d(np.arange(N), indices[~good])}
    pairs = [[np.asarray(a, np.float64) for a in pair] for pair in zip(actual, expected, strict=True)]
    if not np.isnan(pairs[0][0][~good]).all():
        return np.inf
    return float(np.max([relative_error(a[judged[len(a)]], e[judged[len(a)]]) for a, e in pairs]))


def key(op, mesh, form, case):
    return f"{op}, {mesh}, {form}, {case}"


def measure():
    """{name: [error against loops, against one device, whether a second run gave the same bits and types fit]}."""
    chunks.CPU_BUDGET = 256  # room for 4 pairs, or one token: there are several chunks, most of them not full
    report = {}

    def add(op, mesh, form, case, function, arguments, alone, called=None):
        out = [function(*arguments, INDICES[case]) for _ in range(2)]
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.device_get, out), strict=True))
        primals = {"expert_mix": (0, 0, 1, 2, 3), "value_bag": (3, 2, 3)}[op]
        typed = all(a.dtype == arguments[i].dtype for a, i in zip(out[0], primals, strict=True))
        report[key(op, mesh, form, called or case)] = [
            error(out[0], loops(op, *arguments, INDICES[case]), INDICES[case]),
            error(out[0], alone, INDICES[case]),
            same and typed and len(out[0][0].sharding.device_set) == 8,
        ]

    for op in OPS:
        function, arguments = run(op), draw()
        alone = {case: function(*arguments, indices) for case, indices in INDICES.items()}
        for mesh, form in SPLIT:
            with use(place(mesh, form)):
                for case in INDICES:
                    add(op, mesh, form, case, function, arguments, alone[case])
        for mesh, form in PARTITIONED:
            with use(place(mesh, form)):
                for case in ("spread", "bad"):
                    add(op, mesh, form, case, run(op, "reference"), arguments, alone[case], f"reference, {case}")
        for (mesh, form), implementation in zip(WHOLE, (None, "xla", "reference"), strict=True):
            with use(place(mesh, form)):
                add(op, mesh, form, "spread", run(op, implementation), arguments, alone["spread"])
        arguments = draw(jnp.bfloat16)
        alone = function(*arguments, INDICES["spread"])
        for form in ("rows", "columns"):
            with use(place((2, 2, 2), form)):
                add(op, "bfloat16", form, "spread", function, arguments, alone)
    report["product_key_top_k"] = [retrieval(implementation) for implementation in (None, "reference", "mosaic_gpu")]
    report["linear_cross_entropy"] = losses()
    report["touched"] = {
        key("touched", mesh, form, case): found for mesh, form in TOUCHED for case, found in touched(mesh, form)
    }
    return report | choices()


def touched(mesh, form):
    """By indices: whether the touched rows of each part are NumPy's, and the error of a sum over a table of them."""
    values, gates = jnp.asarray(draw()[2]), draw()[3]

    @jax.jit
    def bag(indices, gates):
        table = Table(TouchedTable(values, (jnp.zeros((N, D)),)))  # room for all rows
        slots, compact = retrieved(indices, table)
        return table.get_value().rows[0], ops.value_bag(compact, slots, gates)

    parts = mesh[2] if form == "rows" else 1
    size = N // parts
    for case, indices in INDICES.items():
        with use(place(mesh, form)):
            rows, y = bag(indices, gates)
        of_parts = [np.unique(indices[indices // size == part]) - part * size for part in range(parts)]
        padded = [np.append(of, np.arange(size + len(of), 2 * size)) for of in of_parts]
        same = np.array_equal(rows, np.concatenate(padded))
        yield case, (same, error([y], loops("value_bag", *draw(), indices)[:1], indices))


def choices():
    """On split tables: warnings, whether "mosaic_gpu" gives the bits of "xla", what XLA partitions, what is refused."""
    said, equal, refused, by_xla = [], {}, {}, {}
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("peer_jax.ops.choice").addHandler(handler)
    arguments = *draw(), INDICES["spread"]
    for op in OPS:
        with use(place((2, 2, 2), "rows")):
            fallback, xla = (run(op, name)(*arguments) for name in ("mosaic_gpu", "xla"))
            equal[op] = all(map(np.array_equal, fallback, xla))
            by_xla[op] = {
                name: "shard_map" not in str(jax.make_jaxpr(run(op, name))(*arguments)) for name in ("reference", "xla")
            }
            refused[op] = refusal(run(op, "abacus"), *arguments)
    with use(place((2, 2, 2), "rows")):
        queries, sub_keys = jnp.zeros((T, H, 4)), jnp.zeros((2, 8, 2))
        top_k = lambda *arrays: ops.product_key_top_k(*arrays, K, implementation="abacus")  # noqa: E731
        refused["product_key_top_k"] = refusal(top_k, queries, sub_keys)
    return {"said": said, "equal": equal, "refused": refused, "by XLA": by_xla}


def refusal(function, *arguments):
    try:
        function(*arguments)
    except InputError as error:
        return str(error)
    return "nothing"


def place(mesh, form):
    data, fsdp, expert = mesh
    return Sharding(data=data, fsdp=fsdp, expert=expert, tables=form).place()


def retrieval(implementation):
    """Retrieval on 8 devices: whether its indices are those of one device, and by how much all else differs."""
    rng = np.random.default_rng(2)
    queries, sub_keys = (np.float32(rng.normal(size=shape)) for shape in [(T, H, 4), (2, 8, 2)])
    d_scores = np.float32(rng.normal(size=(T, H, K)))

    def run(queries, sub_keys):
        def top_k(*arguments):
            return ops.product_key_top_k(*arguments, K, implementation=implementation)

        scores, pullback, indices = jax.vjp(top_k, queries, sub_keys, has_aux=True)
        return scores, indices, *pullback(jnp.asarray(d_scores))

    alone = jax.jit(run)(queries, sub_keys)
    with use(place((2, 2, 2), "rows")):
        shared = jax.jit(run)(queries, sub_keys)
    differences = [relative_error(a, b) for a, b in zip(shared, alone, strict=True)]
    return [bool(differences.pop(1) == 0), float(np.max(differences))]


def losses():
    """By mesh and split of the kernel: how much loss and gradients differ from one device's, and what is sent."""
    cross_entropy.LOGITS_BUDGET = 4 * N  # a chunk for each of a device's tokens
    rng = np.random.default_rng(3)
    x, kernel, weights = (jnp.float32(rng.normal(size=shape)) for shape in [(2, 8, D), (D, N), (2, 8)])
    x, targets = jnp.tile(x, (4, 1, 1)), jnp.asarray(rng.integers(0, N, (8, 8)), jnp.int32)
    weights = jnp.tile(weights, (4, 1))
    gradient = jax.value_and_grad(cross_entropy.linear_cross_entropy, argnums=(0, 1))
    alone = jax.jit(gradient)(x, kernel, targets, weights)
    found = {}
    for mesh, axes in [
        ((8, 1, 1), ()),
        ((2, 2, 2), ("embed", "vocab")),
        ((1, 8, 1), ("embed", "vocab")),
        ((1, 1, 8), (None, "rows")),
    ]:
        with use(place(mesh, "rows")):
            split = jax.device_put(kernel, current().sharding(*axes))
            tokens = [jax.device_put(a, current().sharding("batch")) for a in (x, targets, weights)]
            compiled = jax.jit(gradient).lower(tokens[0], split, *tokens[1:]).compile()
            out = compiled(tokens[0], split, *tokens[1:])
        differences = [relative_error(a, b) for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(alone), strict=True)]
        found[f"{mesh}, {axes}"] = float(np.max(differences)), collectives(compiled.as_text())
    return found


@pytest.fixture(scope="module")
def report():
    return measured("test_sharded_ops", "measure")


def faults(report, op, mesh, form, cases):
    """By case, what was measured where it is not as it should be."""
    found = {}
    for case in cases:
        against_loops, against_one, same = report[key(op, mesh, form, case)]
        if not (same and against_loops < FP32 and against_one < EQUAL):
            found[case] = (against_loops, against_one, same)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "form"), SPLIT)
@pytest.mark.parametrize("op", OPS)
def test_split_tables(report, op, mesh, form):
    """A second run gives the same bits; a bad index gives NaN for its own token and for nothing else."""
    assert faults(report, op, mesh, form, INDICES) == {}


@pytest.mark.parametrize(("mesh", "form"), WHOLE)
@pytest.mark.parametrize("op", OPS)
def test_whole_tables(report, op, mesh, form):
    """Every device has a copy of the tables, and its own tokens."""
    assert faults(report, op, mesh, form, ["spread"]) == {}


@pytest.mark.parametrize(("mesh", "form"), TOUCHED)
def test_touched_rows_of_all_devices(report, mesh, form):
    """A bad index gives NaN for its token there, too."""
    for case in INDICES:
        same, difference = report["touched"][key("touched", mesh, form, case)]
        assert same, case
        assert difference < FP32, case


@pytest.mark.parametrize(("mesh", "form"), PARTITIONED)
@pytest.mark.parametrize("op", OPS)
def test_reference_on_split_tables(report, op, mesh, form):
    assert faults(report, op, mesh, form, ["reference, spread", "reference, bad"]) == {}


@pytest.mark.parametrize("op", OPS)
def test_what_is_asked_for_is_used_on_split_tables(report, op):
    """ "xla" says what each device does; "mosaic_gpu", which can't run here, is "xla"."""
    assert report["by XLA"][op] == {"reference": True, "xla": False}
    assert report["equal"][op]


def test_kernels_that_cannot_run_on_split_tables_are_named_once(report):
    (said,) = report["said"]
    assert "falls back to 'xla'" in said
    assert "not on 'cpu'" in said


@pytest.mark.parametrize("op", [*OPS, "product_key_top_k"])
def test_unknown_implementations_are_named_on_split_tables(report, op):
    assert "'abacus' is not one of" in report["refused"][op]


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("op", OPS)
def test_bfloat16(report, op, form):
    against_loops, against_one, same = report[key(op, "bfloat16", form, "spread")]
    assert same
    assert max(against_loops, against_one) < BF16


def test_retrieval_is_one_device_s(report):
    for same, difference in report["product_key_top_k"]:
        assert same
        assert difference < EQUAL


def test_the_loss_is_one_device_s_and_the_gradient_of_its_kernel_is_summed_once(report):
    """However the kernel is split: by no axis, by its width or by the vocabulary. No tokens or logits are sent."""
    whole = 4 * D * N
    assert len(report["linear_cross_entropy"]) == 4
    for mesh, (difference, sent) in report["linear_cross_entropy"].items():
        assert difference < EQUAL, mesh
        gathered = [size for kind, size in sent if kind == "all-gather"]
        assert gathered == ([] if mesh.endswith("()") else [whole]), mesh
        assert whole <= sum(size for kind, size in sent if kind != "all-gather") < 1.1 * whole, mesh
