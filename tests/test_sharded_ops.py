"""The ops on 8 devices: forward and gradient against loops and against one device, both table forms, however skewed.

T  tokens     d  width     N  rows     h, k  heads, top-k     n  sub-keys in a half     c  d_key / 2
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from eight_devices import measured
from reference import relative_error

from peer_jax import ops
from peer_jax.ops import chunks
from peer_jax.sharding import Sharding, use

# As in test_expert_mix: float32 and bfloat16 against float64.
FP32, BF16 = 1e-5, 2**-7
# Sums of a dozen or, for a row of a table, some hundred terms in another order, a rounding of 6e-8 each.
EQUAL = 1e-6

T, D, N, H, K = 16, 16, 64, 2, 4
# Devices along data, fsdp and expert, and the form of the tables.
SPLIT = [
    ((data, fsdp, 8 // (data * fsdp)), form)
    for data, fsdp in [(1, 1), (2, 1), (2, 2), (1, 4), (4, 1)]
    for form in ("rows", "columns")
]
WHOLE = [((8, 1, 1), "rows"), ((1, 8, 1), "rows"), ((2, 4, 1), "columns")]
OPS = ["expert_mix", "value_bag"]


def draw_indices():
    """Which rows the tokens retrieve, of which each of 8 devices may have 8, of 4 16 and of 2 32."""
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
    """x, down, up, gates, dy; x, gates and dy of the type."""
    rng = np.random.default_rng(0)
    x, down, up, gates, dy = (rng.normal(size=shape) for shape in [(T, D), (N, D), (N, D), (T, H, K), (T, D)])
    down /= np.sqrt(D)  # arguments of gelu of about 1: at 10, its float32 derivative rounds off all of its 1 - tanh^2
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
    """Those without a bad index."""
    return ((indices >= 0) & (indices < N)).all(axis=(1, 2))


def loops(op, x, down, up, gates, dy, indices):
    """The same by loops, as if tokens with a bad index were none."""
    good = good_tokens(indices)
    gates, indices = np.where(good[:, None, None], gates, 0), np.where(good[:, None, None], indices, 0)
    if op == "expert_mix":
        y = reference.expert_mix(x, down, up, indices, gates, "gelu")
        return y, *reference.expert_mix_grad(x, down, up, indices, gates, "gelu", np.where(good[:, None], dy, 0))
    return reference.value_bag(up, indices, gates), *reference.value_bag_grad(up, indices, gates, dy)


def error(actual, expected, indices):
    """The largest relative error of good tokens and of rows that only they retrieve; infinite unless others are NaN."""
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
    chunks.CPU_BUDGET = 256  # 4 pairs of a token and a row, or one token: several chunks, most of them not full
    report = {}

    def add(op, mesh, form, case, function, arguments, alone):
        out = [function(*arguments, INDICES[case]) for _ in range(2)]
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.device_get, out), strict=True))
        primals = {"expert_mix": (0, 0, 1, 2, 3), "value_bag": (3, 2, 3)}[op]
        typed = all(a.dtype == arguments[i].dtype for a, i in zip(out[0], primals, strict=True))
        report[key(op, mesh, form, case)] = [
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
        for (mesh, form), implementation in zip(WHOLE, (None, "xla", "reference"), strict=True):
            with use(place(mesh, form)):
                add(op, mesh, form, "spread", run(op, implementation), arguments, alone["spread"])
        arguments = draw(jnp.bfloat16)
        alone = function(*arguments, INDICES["spread"])
        for form in ("rows", "columns"):
            with use(place((2, 2, 2), form)):
                add(op, "bfloat16", form, "spread", function, arguments, alone)
    report["product_key_top_k"] = retrieval()
    return report


def place(mesh, form):
    data, fsdp, expert = mesh
    return Sharding(data=data, fsdp=fsdp, expert=expert, tables=form).place()


def retrieval():
    """Of the retrieval on 8 devices: whether its indices are one device's, and by how much all else differs."""
    rng = np.random.default_rng(2)
    queries, sub_keys = (np.float32(rng.normal(size=shape)) for shape in [(T, H, 4), (2, 8, 2)])
    d_scores = np.float32(rng.normal(size=(T, H, K)))

    def run(queries, sub_keys):
        top_k = lambda *arguments: ops.product_key_top_k(*arguments, K)  # noqa: E731
        scores, pullback, indices = jax.vjp(top_k, queries, sub_keys, has_aux=True)
        return scores, indices, *pullback(jnp.asarray(d_scores))

    alone = jax.jit(run)(queries, sub_keys)
    with use(place((2, 2, 2), "rows")):
        shared = jax.jit(run)(queries, sub_keys)
    differences = [relative_error(a, b) for a, b in zip(shared, alone, strict=True)]
    return [bool(differences.pop(1) == 0), float(np.max(differences))]


@pytest.fixture(scope="module")
def report():
    return measured("test_sharded_ops", "measure")


def faults(report, op, mesh, form, cases):
    """What was measured, by case, where it is not as it should be."""
    found = {}
    for case in cases:
        against_loops, against_one, same = report[key(op, mesh, form, case)]
        if not (same and against_loops < FP32 and against_one < EQUAL):
            found[case] = (against_loops, against_one, same)
    return found


@pytest.mark.parametrize(("mesh", "form"), SPLIT)
@pytest.mark.parametrize("op", OPS)
def test_split_tables(report, op, mesh, form):
    """Also bit for bit the same in a second run; and a bad index is NaN for its token and for nothing else."""
    assert faults(report, op, mesh, form, INDICES) == {}


@pytest.mark.parametrize(("mesh", "form"), WHOLE)
@pytest.mark.parametrize("op", OPS)
def test_whole_tables(report, op, mesh, form):
    """Of which every device has a copy, and its own tokens."""
    assert faults(report, op, mesh, form, ["spread"]) == {}


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("op", OPS)
def test_bfloat16(report, op, form):
    against_loops, against_one, same = report[key(op, "bfloat16", form, "spread")]
    assert same
    assert max(against_loops, against_one) < BF16


def test_retrieval_is_one_device_s(report):
    same, difference = report["product_key_top_k"]
    assert same
    assert difference < EQUAL
