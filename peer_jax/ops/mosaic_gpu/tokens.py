"""The kernel that works token by token: dot products with retrieved rows, and weighted sums of retrieved rows.

t  tokens     r  rows per token     d  row width     N  rows of a table
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.mosaic_gpu.inline import interpreter, without_rules
from peer_jax.ops.mosaic_gpu.ring import count_stages, pick

WARPS = 4  # in the 128 threads that Pallas schedules as one; each warp takes a row, so no dot product crosses warps
REGISTER_WIDTH = 1024  # a wider x does not fit the registers beside the sum, and is read from shared memory each time


def mix_tokens(
    x: Float[Array, "t d"] | None,
    read: Float[Array, "N d"] | None,
    write: Float[Array, "N d"] | None,
    indices: Int[Array, "t r"],
    gates: Float[Array, "t r"] | None,
    activation: Callable[[Array], Array] | None,
    dtype: Any,
    interpret: Any,
    *,
    counts: Int[Array, " t"] | None = None,
    y_dtype: Any = None,
) -> tuple[Float[Array, "t d"] | None, Float[Array, "t r"] | None]:
    """y = sum over r of gates * activation(s) * write[indices], with s = read[indices] . x in float32.

    Without ``write``, only s is computed; without ``read``, y = sum over r of gates * write[indices]. Rows are cast to
    ``dtype``, and so is y unless ``y_dtype`` is given. With ``counts``, a token has that many rows, the first of its
    ``indices``; the gates behind them must be zero and the indices repeat the last one; s is not defined there.

    Each block works on one token. Its rows come through a ring in shared memory, each by one bulk copy, some steps
    ahead of the arithmetic. Blocks are small enough for about four per multiprocessor, which together have nearly
    200 KB of copies under way. That is several times what bandwidth times latency asks for (36 KB at 4.8 TB/s,
    132 multiprocessors and 1 us), so a block may start, end, wait for a barrier or compute while the others keep the
    memory busy.

    The kernel works in token order even if many tokens share few experts (N = 1024 .. 65536, d = 1024, 2 .. 128 MB per
    table in bfloat16). Tables that fit the L2 cache (50 MB) are read from there, at two to three times the memory's
    speed; and expert order would have to add up t * r partial outputs, which are as many bytes, read and written.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    t, r = indices.shape
    tables = {name: table for name, table in [("read", read), ("write", write)] if table is not None}
    d = next(iter(tables.values())).shape[1]
    # Pads r to whole steps of one row per warp. The padding repeats the last row: any other may hold an infinity.
    padding = ((0, 0), (0, -r % WARPS))
    steps = -(-r // WARPS)
    operands = {**tables, "indices": jnp.pad(indices, padding, mode="edge")}
    if x is not None:
        operands["x"] = x
    if gates is not None:
        operands["gates"] = jnp.pad(gates.astype(jnp.float32), padding)
    if counts is not None:
        operands["counts"] = counts
    y_dtype = y_dtype or dtype
    outputs, scratch = {}, {"indices_smem": plgpu.SMEM((steps * WARPS,), jnp.int32), "listed": plgpu.Barrier()}
    stages = count_stages(WARPS * d * sum(table.dtype.itemsize for table in tables.values()), steps)
    for name, table in tables.items():
        scratch[f"{name}_ring"] = plgpu.SMEM((stages, WARPS, d), table.dtype)
    scratch["full"] = plgpu.Barrier(num_arrivals=WARPS * len(tables), num_barriers=stages)
    scratch["ready"] = plgpu.Barrier(num_arrivals=(x is not None) + (gates is not None))
    if x is not None:
        scratch["x_smem"] = plgpu.SMEM((d,), x.dtype)
        scratch["s_smem"] = plgpu.SMEM((steps * WARPS,), jnp.float32)
        outputs["s"] = jax.ShapeDtypeStruct((t, steps * WARPS), jnp.float32)
    if gates is not None:
        scratch["gates_smem"] = plgpu.SMEM((steps * WARPS,), jnp.float32)
        if x is None or x.dtype != y_dtype:
            scratch["y_smem"] = plgpu.SMEM((d,), y_dtype)
        outputs["y"] = jax.ShapeDtypeStruct((t, d), y_dtype)

    # Up to d = 3072 a lane's part of a row fits its registers; at 4096 (128 numbers) ptxas spills some 40 bytes.
    vector = 4 if d % 128 == 0 else 2
    tiling = plgpu.Tiling(((WARPS, 32 * vector), (vector,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def kernel(*refs):
        ref = dict(zip([*operands, *outputs, *scratch], refs, strict=True))
        ref.setdefault("y_smem", ref.get("x_smem"))  # x is no longer needed when y is written
        token = jax.lax.axis_index("token")
        own_steps = steps if counts is None else jax.lax.div(ref["counts"][token] + WARPS - 1, WARPS)

        def fetch(step, stage):
            four = [ref["indices_smem"][step * WARPS + warp] for warp in range(WARPS)]

            @plgpu.warp_map
            def _(warp):
                row = pick(four, warp)
                for name in tables:
                    copy(ref[name].at[row], ref[f"{name}_ring"].at[stage, warp], ref["full"].at[stage])

        def rows(name, stage):
            return plgpu.load(ref[f"{name}_ring"].at[stage], layout=layout).astype(dtype).astype(jnp.float32)

        def load_x():
            x_row = plgpu.load(ref["x_smem"], layout=layout.reduce(0)).astype(jnp.float32)
            return jax.lax.broadcast_in_dim(x_row, (WARPS, d), (1,))

        copy(ref["indices"].at[token], ref["indices_smem"], ref["listed"])
        for name in ("x", "gates"):
            if name in operands:
                copy(ref[name].at[token], ref[f"{name}_smem"], ref["ready"])
        plgpu.barrier_wait(ref["listed"])
        for stage in range(stages):
            pl.when(stage < own_steps)(functools.partial(fetch, stage, stage))
        plgpu.barrier_wait(ref["ready"])
        x_rows = load_x() if x is not None and d <= REGISTER_WIDTH else None

        def body(step, total):
            stage = jax.lax.rem(step, stages)
            four = pl.ds(step * WARPS, WARPS)
            plgpu.barrier_wait(ref["full"].at[stage])
            weights = None
            if gates is not None:
                weights = plgpu.load(ref["gates_smem"].at[four], layout=layout.reduce(1), optimized=False)
            if x is not None:
                dots = jnp.sum(rows("read", stage) * (load_x() if x_rows is None else x_rows), axis=1)
                ref["s_smem"][four] = dots
                weights = weights if weights is None else weights * without_rules(activation)(dots)
            if weights is not None:
                total += jax.lax.broadcast_in_dim(weights, (WARPS, d), (0,)) * rows("write", stage)
            plgpu.commit_smem()  # every warp has read its rows

            @pl.when(step + stages < own_steps)
            def _():
                fetch(step + stages, stage)

            return total

        total = None
        if gates is not None:
            total = plgpu.layout_cast(jnp.zeros((WARPS, d), jnp.float32), layout)
        total = jax.lax.fori_loop(0, own_steps, body, total)
        if gates is not None:
            ref["y_smem"][...] = jnp.sum(total, axis=0).astype(y_dtype)
        plgpu.commit_smem()
        for name in outputs:
            plgpu.copy_smem_to_gmem(ref[f"{name}_smem"], ref[name].at[token])
        plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(t,),
        grid_names=("token",),
        kernel_name="_".join(["mix_tokens", *outputs]),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpreter(interpret),
    )(*operands.values())
    out = dict(zip(outputs, out, strict=True))
    return out.get("y"), out["s"][:, :r] if "s" in out else None
