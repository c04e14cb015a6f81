"""Times of expert_mix and value_bag against the floor, and of a training step.

python -m gpu_check.speed ops IMPLEMENTATION [--smoke]                prints rows as lines of JSON
python -m gpu_check.speed step IMPLEMENTATION ATTENTION [--smoke]
"""

import functools
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import peer_jax
from gpu_check.ops import SMOKE, TOP_K, bag_by, draw, emit, emit_error, mix_by, verdict
from peer_jax.ops import floor, mosaic_gpu

# Targets: the least floor / time of each pass, and the most temporary memory as a fraction of inputs and outputs.
FORWARD, BACKWARD, MEMORY = 0.60, 0.50, 0.10
LAST = 4096  # most tokens for which the gradient of "reference" fits the memory
MOST_ROWS = 1024**2

# op, t, d, N, r, type of x, type of the tables, share of the pairs that have one row
BFLOAT16 = ("bfloat16", "bfloat16")
SIZES = (
    [("expert_mix", 2, 64, 9, 4, "float32", "float32", 0.0), ("value_bag", 2, 64, 9, 4, *BFLOAT16, 0.5)]
    if SMOKE
    else [
        ("expert_mix", 32768, 768, 1024**2, 128, *BFLOAT16, 0.0),
        *(("expert_mix", 4096, 1024, N, 32, *BFLOAT16, 0.0) for N in (1024, 16384, 65536)),
        *(("expert_mix", 4096, 1024, 16384, 32, *BFLOAT16, hot) for hot in (0.5, 1.0)),
        ("value_bag", 32768, 768, 1024**2, 256, *BFLOAT16, 0.0),
        ("value_bag", 4096, 1024, 1024, 32, *BFLOAT16, 0.0),
        ("expert_mix", 32768, 768, 1024**2, 128, "float32", "float32", 0.0),
        ("expert_mix", 32768, 768, 1024**2, 128, "bfloat16", "float32", 0.0),
        ("expert_mix", 32768, 256, 4096**2, 128, *BFLOAT16, 0.0),
    ]
)


def timing() -> types.ModuleType:
    """Imports peer_jax.bench.timing without its package, which imports what this machine may lack."""
    path = Path(peer_jax.__file__).parent / "bench" / "timing.py"
    spec = importlib.util.spec_from_file_location("timing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


clock = timing()


def seconds(call: Callable[[], object]) -> float:
    if SMOKE:  # an interpreted kernel takes seconds, so one run has to do
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start
    return clock.interleaved({"": clock.sampler(call)}, 7)[""].median


def peak() -> str:
    stats = jax.devices()[0].memory_stats() or {}
    return f"{stats['peak_bytes_in_use'] / 2**30:.1f} GiB" if "peak_bytes_in_use" in stats else "not told"


def name_of(op: str, t: int, d: int, N: int, r: int, dtype: str, rows: str, hot: float) -> str:
    kind = dtype if dtype == rows else f"{dtype}, rows {rows}"
    skew = f", one row has {hot:g} of the pairs" if hot else ""
    return f"{op if op != 'expert_mix' else ''} T={t} d={d} N={N} hk={r}, {kind}{skew}".strip()


def ops(implementation: str) -> None:
    """Measures the device's bandwidth, then the forward and backward pass at each size."""
    machine = clock.measure_machine("bfloat16", megabytes=16 if SMOKE else 2048, width=256 if SMOKE else 8192)
    result = f"{machine.bandwidth / 1e9:.0f} GB/s, {machine.flops_per_second / 1e12:.1f} bf16 TFLOP/s"
    emit("machine", jax.devices()[0].device_kind, implementation, "measured in its process", result)
    for sizes in SIZES:
        for direction in ("forward", "backward"):
            # The gradients of "xla" are float32 until they are whole, which is too much for the largest tables.
            too_large = sizes[1] > LAST if implementation == "reference" else sizes[3] > MOST_ROWS
            if implementation != "mosaic_gpu" and direction == "backward" and too_large:
                continue
            try:
                time_op(implementation, direction, sizes, machine.bandwidth)
            except Exception as error:  # whatever it is, the next size may work
                emit_error("speed", name_of(*sizes), implementation, direction, error)
    emit("memory", "whole process", implementation, "peak of the allocator", peak())


def time_op(implementation: str, direction: str, sizes: tuple, bandwidth: float) -> None:
    """Prints rows with the time, the fraction of the floor that it reaches, and the memory."""
    op, t, d, N, r, dtype, rows, hot = sizes
    x, down, up, gates, indices, dy = draw(*sizes[1:])
    if op == "expert_mix":
        function, arguments = mix_by(implementation), (x, down, up, gates, indices)
    else:
        function, arguments = bag_by(implementation), (down, gates, indices)
    del x, down, up
    least = getattr(floor, op if direction == "forward" else f"{op}_backward")
    if direction == "backward":  # starts from what the forward pass kept, inputs included
        call = function
        forward = jax.jit(lambda *a: jax.vjp(lambda *primals: call(*primals, a[-1]), *a[:-1])[1])
        arguments = (forward(*arguments), dy)
        function = lambda pullback, dy: pullback(dy)  # noqa: E731
    compiled = jax.jit(function).lower(*arguments).compile()
    taken = seconds(functools.partial(compiled, *arguments))
    case = name_of(*sizes)
    emit("speed", case, implementation, direction, f"{taken * 1e3:.3f} ms", seconds=taken)
    if hot:  # the floor counts the rows of uniform draws
        return
    item, row_item = (np.dtype(jax.numpy.dtype(name)).itemsize for name in (dtype, rows))
    share = {
        order: least(t, r, d, N, order, size=item, row_size=row_item).seconds(bandwidth) / taken
        for order in floor.ORDERS
    }
    better = min(share, key=share.get)
    wanted = FORWARD if direction == "forward" else BACKWARD
    bound = implementation == "mosaic_gpu" and not SMOKE
    result = f"{share[better]:.0%} ({better} order); " + ", ".join(
        f"{value:.0%} ({order})" for order, value in share.items() if order != better
    )
    passed = verdict(share[better] >= wanted) if bound else ""
    target = f">= {wanted:.0%}" if bound else ""
    emit("speed", case, implementation, f"{direction}: floor / time", result, target, passed, fraction=share[better])
    memory = compiled.memory_analysis()
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        extra = memory.temp_size_in_bytes / held
        result = f"{held / 2**20:.0f} MiB + {extra:.1%}"
        target, passed = (f"<= + {MEMORY:.0%}", verdict(extra <= MEMORY)) if bound else ("", "")
        emit("memory", case, implementation, f"{direction}: in, out + temporary", result, target, passed)


def step(implementation: str, attention: str) -> None:
    """Times a step of AdamW: 8 blocks of d = 1024, the middle one PEER with 1024^2 experts; float32 parameters."""
    d, blocks, side, batch, length, vocabulary = (64, 2, 8, 2, 16, 64) if SMOKE else (1024, 8, 1024, 8, 1024, 32000)
    case = f"d={d} N={side}^2, {batch} x {length} tokens, bfloat16, parameters float32"
    both = f"{implementation}, attention {attention}"
    try:
        if importlib.util.find_spec("grain") is None:  # step.py imports only the type of a batch from the reader
            reader = types.ModuleType("peer_jax.data.pipeline")
            reader.Batch = dict
            sys.modules[reader.__name__] = reader
        from peer_jax.layers import PEER, Dense
        from peer_jax.models import Transformer
        from peer_jax.training.optimizer import AdamW
        from peer_jax.training.step import Trainer

        if SMOKE:  # the layer falls back, and there is no cuDNN
            attention = "xla"
        elif implementation == "mosaic_gpu":
            x, table = (
                jax.ShapeDtypeStruct((batch * length, d), "bfloat16"),
                jax.ShapeDtypeStruct((side**2, d), "float32"),
            )
            if reason := mosaic_gpu.why_not(x, table, 8 * TOP_K):  # the layer would fall back
                emit("step", case, implementation, "can run", reason, "yes", "FAIL")
                return
        peer = functools.partial(PEER, num_experts=side * side, top_k=TOP_K, implementation=implementation)
        build = functools.partial(
            Transformer,
            *(vocabulary, d, blocks, d // 64),
            ffw=Dense,
            sparse_ffw=peer,
            attention_implementation=attention,
            dtype=jax.numpy.bfloat16,
        )
        trainer = Trainer(build, AdamW(learning_rate=1e-3))
        state = trainer.init(0)
        tokens = np.random.default_rng(0).integers(1, vocabulary, (batch, length)).astype(np.int32)
        data = {"inputs": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": np.ones_like(tokens)}
        data = jax.device_put(data)
        rates = trainer.optimizer.rates(trainer.labels, 0, 10)
        program = jax.jit(trainer.step, donate_argnums=0)
        losses = []

        def call() -> object:
            nonlocal state
            state, metrics = program(state, data, rates)
            losses.append(metrics["loss"])
            return losses[-1]

        jax.block_until_ready(call())
        taken = seconds(call)
        tokens_per_second = batch * length / taken
        emit("step", case, both, "time", f"{taken * 1e3:.1f} ms, {tokens_per_second:.0f} tokens/s")
        first, last = float(losses[0]), float(losses[-1])
        falls = f"{first:.3f} to {last:.3f}, {len(losses)} steps on one batch"
        emit("step", case, both, "loss", falls, "falls", verdict(last < first), first_loss=first)
        emit("memory", case, both, "peak of the allocator", peak())
    except Exception as error:
        emit_error("step", case, both, "time", error)


if __name__ == "__main__":
    {"ops": ops, "step": step}[sys.argv[1]](*(word for word in sys.argv[2:] if word != "--smoke"))
