"""Values and gradients of the ops against NumPy in float64, on some tokens and rows of problems of real size.

python -m gpu_check.correctness IMPLEMENTATION ... [--smoke]    prints rows as lines of JSON
python -m gpu_check.correctness mosaic_gpu large
"""

import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpu_check.ops import SMOKE, bag_by, both, draw, emit, emit_error, mix_by, verdict
from peer_jax.ops import mosaic_gpu, product_key_top_k
from peer_jax.ops.cross_entropy import linear_cross_entropy
from peer_jax.ops.parts import Xla

# Errors are relative to the largest value. In float32, results are products of some hundred terms and sums of some
# hundred pairs, and each term rounds off 6e-8 of a partial sum. In bfloat16, a rounding costs 2^-9 of a value; the
# result is rounded once, and each term of its sum up to twice.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}

BFLOAT16 = ("bfloat16", "bfloat16")
REPEATS = 1 if SMOKE else 20


class Case(NamedTuple):
    name: str
    t: int
    d: int
    N: int
    r: int
    dtype: str
    rows: str
    hot: float = 0.0


def cases(implementation: str) -> Iterator[Case]:
    """Real sizes, sizes that no block size divides, and cases where one row has many pairs or all."""
    types = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
    for dtype, rows in types[2:] if SMOKE else types:
        yield Case("ragged", *((3, 64, 23, 6) if SMOKE else (1037, 320, 5003, 21)), dtype, rows)
        if SMOKE:
            continue
        yield Case("T=4096 d=1024 N=16384", 4096, 1024, 16384, 32, dtype, rows)
        if implementation == "mosaic_gpu" or (implementation == "xla" and dtype != rows):
            yield Case("T=32768 d=768 N=1024^2", 32768, 768, 1024**2, 128, dtype, rows)
    if not SMOKE:
        yield Case("one row has 1/64", 4096, 1024, 16384, 32, "float32", "float32", 1 / 64)
        yield Case("one row has 1/2", 4096, 1024, 16384, 32, *BFLOAT16, 1 / 2)
        if implementation == "mosaic_gpu":
            yield Case("one row has all", 4096, 1024, 16384, 32, *BFLOAT16, 1.0)


def gelu(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tanh form of gelu, and its derivative."""
    c = np.sqrt(2 / np.pi)
    tanh = np.tanh(c * (s + 0.044715 * s**3))
    return 0.5 * s * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * s * (1 - tanh**2) * c * (1 + 3 * 0.044715 * s**2)


def take(array: jax.Array, index: np.ndarray) -> np.ndarray:
    """The rows ``index`` of an array; only these are copied to the host."""
    return wide(array[jnp.asarray(index)])


def wide(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def sample(indices: np.ndarray, N: int, hot: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and rows of the table to check: first, last and random ones, the hot row, and an unused row if any."""
    t = indices.shape[0]
    rng = np.random.default_rng(0)
    tokens = np.unique([0, t - 1, *rng.integers(0, t, 30)])
    unused = np.setdiff1d(np.arange(min(N, 10**5)), indices)[:1]
    return tokens, np.unique([0, N - 1, *unused, *rng.integers(0, N, 30), *([N // 2] if hot else [])])


def expected_mix(x, down, up, gates, indices, dy, tokens, rows) -> dict[str, np.ndarray]:
    """Expected y, dx and d_gates of the tokens, and d_down and d_up of the rows."""
    # All but the tables are copied to the host: indexing them on the device would compile for each number of pairs.
    x, gates, indices, dy = map(np.asarray, (x, gates, indices, dy))
    u, v = take(down, indices[tokens]), take(up, indices[tokens])
    xs, g, dys = wide(x[tokens]), wide(gates[tokens]), wide(dy[tokens])
    a, slope = gelu(np.einsum("trd,td->tr", u, xs))
    q = np.einsum("trd,td->tr", v, dys)
    found = {
        "y": np.einsum("tr,trd->td", g * a, v),
        "dx": np.einsum("tr,trd->td", q * g * slope, u),
        "d_gates": q * a,
        "d_down": np.zeros((len(rows), x.shape[1])),
        "d_up": np.zeros((len(rows), x.shape[1])),
    }
    for place, (row, u, v) in enumerate(zip(rows, take(down, rows), take(up, rows), strict=True)):
        token, slot = np.nonzero(indices == row)
        xs, dys, g = wide(x[token]), wide(dy[token]), wide(gates[token, slot])
        a, slope = gelu(xs @ u)
        found["d_down"][place] = (dys @ v * g * slope) @ xs
        found["d_up"][place] = (g * a) @ dys
    return found


def expected_bag(values, gates, indices, dy, tokens, rows) -> dict[str, np.ndarray]:
    """Expected y and d_gates of the tokens, and d_values of the rows."""
    gates, indices, dy = map(np.asarray, (gates, indices, dy))
    v, g, dys = take(values, indices[tokens]), wide(gates[tokens]), wide(dy[tokens])
    found = {"y": np.einsum("tr,trd->td", g, v), "d_gates": np.einsum("trd,td->tr", v, dys)}
    found["d_values"] = np.zeros((len(rows), values.shape[1]))
    for place, row in enumerate(rows):
        token, slot = np.nonzero(indices == row)
        found["d_values"][place] = wide(gates[token, slot]) @ wide(dy[token])
    return found


def compare(
    part: str,
    case: str,
    implementation: str,
    actual: dict,
    expected: dict,
    tolerance: float,
    against: str = "float64",
) -> None:
    """Prints a row with the largest error, and which result has it."""
    errors = {}
    for name, value in actual.items():
        wanted = expected[name]
        errors[name] = float(np.max(np.abs(value - wanted)) / (np.max(np.abs(wanted)) or 1.0))
    worst = max(errors, key=lambda name: np.inf if np.isnan(errors[name]) else errors[name])
    result = f"{errors[worst]:.1e} ({worst} of {', '.join(errors)})"
    passed = all(error <= tolerance for error in errors.values())
    emit(part, case, implementation, f"error against {against}", result, f"<= {tolerance:.1e}", verdict(passed))


def check(part: str, implementation: str, case: Case) -> None:
    """Compares with NumPy, and compares the bits of a second run with those of the first."""
    types = case.dtype if case.dtype == case.rows else f"{case.dtype}, rows {case.rows}"
    name = f"{case.name}, {types}"
    what = "error against float64"
    try:
        x, down, up, gates, indices, dy = draw(*case[1:7], case.hot)
        tokens, rows = sample(np.asarray(indices), case.N, case.hot)
        if part == "expert_mix":
            function, primals, names = mix_by(implementation), (x, down, up, gates), ("dx", "d_down", "d_up", "d_gates")
            expected = expected_mix(*primals, indices, dy, tokens, rows)
        else:
            function, primals, names = bag_by(implementation), (down, gates), ("d_values", "d_gates")
            expected = expected_bag(*primals, indices, dy, tokens, rows)
        run = jax.jit(both(function))
        y, gradients = first = jax.block_until_ready(run(*primals, indices, dy))
        actual = {"y": take(y, tokens)}
        for gradient, of in zip(gradients, names, strict=True):
            actual[of] = take(gradient, tokens if of in ("dx", "d_gates") else rows)
        # The gradient of the hot row is a sum over this many pairs; its rounding grows with the root of their number.
        pairs = case.hot * case.t * case.r
        compare(part, name, implementation, actual, expected, max(TOLERANCE[case.dtype], 2.4e-7 * pairs**0.5))
        repeats = REPEATS if implementation == "mosaic_gpu" else 1
        what = f"equal in {repeats + 1} runs"
        equal = all(
            bool(jnp.array_equal(a, b))
            for _ in range(repeats)
            for a, b in zip(*map(jax.tree.leaves, (first, run(*primals, indices, dy))), strict=True)
        )
        promised = implementation == "mosaic_gpu"
        emit(
            part, name, implementation, what, str(equal), "True" if promised else "", verdict(equal) if promised else ""
        )
    except Exception as error:  # whatever it is, the next case may work
        emit_error(part, name, implementation, what, error)


def check_parts(t: int, d: int, rows: int, r: int, dtype: str) -> None:
    """What a device does that holds a quarter of a table's rows: the kernels against XLA, which has tests on CPU."""
    name = f"part of a table, T={t} d={d} N={4 * rows} hk={r}, {dtype}"
    x, down, up, gates, indices, dy = draw(t, d, rows, r, dtype, dtype, 0.0)
    indices = indices * 4 - rows  # from the first row of this device; three quarters are elsewhere

    def run(parts, x, down, up, gates, indices, dy):
        y, kept = parts.mix(x, down, up, indices, gates, jax.nn.gelu)
        mix = parts.mix_backward(x, down, up, indices, gates, jax.nn.gelu, kept, dy)
        bag = parts.bag(up, indices, gates), *parts.bag_backward(up, indices, gates, dy)
        near = jnp.clip(indices, 0, rows - 1)
        return y, *mix, *bag, parts.dots(x, down, near), parts.sums(gates, up, near, x.dtype)

    try:
        found, wanted = (
            jax.device_get(jax.jit(functools.partial(run, parts))(x, down, up, gates, indices, dy))
            for parts in (mosaic_gpu.KernelParts(interpret=jax.default_backend() == "cpu"), Xla())
        )
        names = ["y", "dx", "d_down", "d_up", "d_gates", "bag", "d_values", "d_bag_gates", "dots", "sums"]
        pair = (dict(zip(names, map(wide, arrays), strict=True)) for arrays in (found, wanted))
        compare("expert_mix", name, "mosaic_gpu", *pair, TOLERANCE[dtype], against="xla")
    except Exception as error:
        emit_error("expert_mix", name, "mosaic_gpu", "error against xla", error)


def check_top_k(implementation: str, t: int, h: int, n: int, d_key: int, k: int, dtype: str) -> None:
    """Compares scores against all N keys and query gradients for some tokens, and the gradients of some sub-keys."""
    part, name = "product_key_top_k", f"T={t} h={h} n={n} k={k}, {dtype}"
    try:
        keys = jax.random.split(jax.random.key(1), 3)
        queries, sub_keys, dy = (
            jax.random.normal(key, shape, dtype)
            for key, shape in zip(keys, [(t, h, d_key), (2, n, d_key // 2), (t, h, k)], strict=True)
        )
        dy = dy.astype(jnp.float32)

        @jax.jit
        def run(queries, sub_keys, dy):
            def retrieve(*arguments):
                return product_key_top_k(*arguments, k, implementation=implementation)

            scores, pullback, indices = jax.vjp(retrieve, queries, sub_keys, has_aux=True)
            return scores, indices, *pullback(dy)

        scores, indices, d_queries, d_sub_keys = jax.block_until_ready(run(queries, sub_keys, dy))
        chosen = np.asarray(indices)
        tokens = np.unique([0, t - 1, *np.random.default_rng(0).integers(0, t, 4)])
        halves = take(queries, tokens).reshape(len(tokens), h, 2, -1)
        table = np.asarray(sub_keys, np.float64)
        half_scores = np.einsum("thsc,snc->sthn", halves, table)
        sums = (half_scores[0][..., :, None] + half_scores[1][..., None, :]).reshape(len(tokens), h, n * n)
        best = -np.sort(np.partition(-sums, k - 1, axis=-1)[..., :k], axis=-1)
        # Keys may rank otherwise if their sums differ only by rounding, so the chosen keys are compared by their sums.
        actual = {"scores": take(scores, tokens), "keys": np.take_along_axis(sums, chosen[tokens], axis=-1)}
        expected = {"scores": best, "keys": best}
        used = np.stack(np.divmod(chosen, n))  # [half, t, h, k]
        weights = np.asarray(dy, np.float64)
        found = np.einsum("thk,sthkc->thsc", weights[tokens], np.stack([table[s][used[s, tokens]] for s in (0, 1)]))
        actual["d_queries"], expected["d_queries"] = take(d_queries, tokens), found.reshape(len(tokens), h, d_key)
        rows = np.unique([0, n - 1, n // 2, n // 3])
        wanted = np.zeros((2, len(rows), d_key // 2))
        split = queries.reshape(t, h, 2, -1)
        for half in (0, 1):
            for place, row in enumerate(rows):
                token, head, slot = np.nonzero(used[half] == row)
                wanted[half, place] = weights[token, head, slot] @ np.asarray(split[token, head, half], np.float64)
        actual["d_sub_keys"], expected["d_sub_keys"] = np.asarray(d_sub_keys, np.float64)[:, rows], wanted
        compare(part, name, implementation, actual, expected, TOLERANCE[dtype])
    except Exception as error:
        emit_error(part, name, implementation, "error against float64", error)


def check_cross_entropy(t: int, d: int, V: int, dtype: str) -> None:
    """Compares the loss and its gradients; the op has one implementation."""
    part, name = "cross_entropy", f"T={t} d={d} V={V}, {dtype}"
    try:
        keys = jax.random.split(jax.random.key(2), 3)
        x, kernel = jax.random.normal(keys[0], (t, d), dtype), jax.random.normal(keys[1], (d, V), dtype) * d**-0.5
        targets, weights = jax.random.randint(keys[2], (t,), 0, V), jnp.ones(t) / t
        run = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))
        loss, (dx, d_kernel) = run(x, kernel, targets, weights)
        logits = wide(x) @ wide(kernel)
        logits -= np.max(logits, axis=1, keepdims=True)
        wrong = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
        of = np.arange(t), np.asarray(targets)
        expected = {"loss": -np.mean(np.log(wrong[of]))}
        wrong[of] -= 1
        expected |= {"dx": wrong @ wide(kernel).T / t, "d_kernel": wide(x).T @ wrong / t}
        actual = {"loss": wide(loss), "dx": wide(dx), "d_kernel": wide(d_kernel)}
        compare(part, name, "xla", actual, expected, TOLERANCE[dtype])
    except Exception as error:
        emit_error(part, name, "xla", "error against float64", error)


def main(implementation: str, size: str) -> None:
    if size == "large":  # tables of 8 GiB, which nothing fits beside
        check("expert_mix", implementation, Case("T=16384 d=256 N=4096^2", 16384, 256, 4096**2, 128, *BFLOAT16))
        return
    if implementation == "mosaic_gpu" and not SMOKE:
        x, table = (jax.ShapeDtypeStruct((rows, 768), jnp.bfloat16) for rows in (32768, 1024**2))
        reason = mosaic_gpu.why_not(x, table, 128)
        emit("machine", "this one", implementation, "can run", reason or "yes", "yes", verdict(reason is None))
    # By default a GPU may round the inputs of float32 products to 10 bits. Only "reference" has such products.
    with jax.default_matmul_precision("highest"):
        for case in cases(implementation):
            check("expert_mix", implementation, case)
        sizes = ((3, 64, 23, 6),) if SMOKE else ((1037, 320, 5003, 21), (4096, 1024, 65536, 32))
        for t, d, N, r in sizes:
            for dtype in ("bfloat16",) if SMOKE else ("float32", "bfloat16"):
                check("value_bag", implementation, Case(f"T={t} d={d} N={N}", t, d, N, r, dtype, dtype))
        if implementation == "mosaic_gpu":  # has no kernel for product_key_top_k
            for dtype in ("float32",) if SMOKE else ("float32", "bfloat16"):
                check_parts(*((3, 64, 6, 4) if SMOKE else (4096, 768, 16384, 128)), dtype)
            return
        for sizes in (
            ((9, 2, 5, 8, 4),) if SMOKE else ((1037, 3, 37, 24, 7), (1037, 2, 600, 24, 32), (4096, 8, 1024, 128, 16))
        ):
            for dtype in ("float32",) if SMOKE else ("float32", "bfloat16"):
                check_top_k(implementation, *sizes, dtype)
        if implementation == "xla":
            for dtype in ("float32", "bfloat16"):
                check_cross_entropy(*((5, 8, 13) if SMOKE else (1536, 512, 32000)), dtype)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("--smoke", "large")]
    for word in words:
        main(word, "large" if "large" in sys.argv else "")
