"""The "xla" path lowers for TPU and CUDA from a CPU, at the paper's sizes and without [t, r, d].

This proves that JAX has a lowering rule on these platforms for every operation, and shows the sizes of the arrays that
XLA is given. It does not prove that XLA compiles the programs there, that they fit the memory or that they are fast.
"""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from devices import Device

import peer_jax
from peer_jax.layers import PEER, Dense
from peer_jax.models import Transformer
from peer_jax.ops import expert_mix, product_key_top_k, value_bag
from peer_jax.sharding import compiled_for
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

T, D, SIDE, H, K, D_KEY = 32768, 768, 1024, 8, 16, 128
N = SIDE * SIDE
PLATFORMS = ["tpu", "cuda"]


def lower(platform, function, *arguments):
    """The program's text, with the choices of the platform."""
    with compiled_for(Device({"cuda": "gpu"}.get(platform, platform))):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def largest(text):
    """Elements of the largest array in the program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]+\d*>", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def op(name, dtype):
    """The op as a function of the arrays that have gradients and of the indices; its arguments."""
    x, table, gates = like(dtype, T, D), like(dtype, N, D), like(dtype, T, H, K)
    indices = like(jnp.int32, T, H, K)
    if name == "expert_mix":
        return lambda primals, i: expert_mix(*primals[:3], i, primals[3], jax.nn.gelu), (
            (x, table, table, gates),
            indices,
        )
    if name == "value_bag":
        return lambda primals, i: value_bag(primals[0], i, primals[1]), ((table, gates), indices)
    keys = like(dtype, 2, SIDE, D_KEY // 2)
    return lambda primals, _: product_key_top_k(*primals, K)[0], ((like(dtype, T, H, D_KEY), keys), indices)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["expert_mix", "value_bag", "product_key_top_k"])
def test_op(name, dtype, platform):
    """No array is larger than a table or than the pairs; scores of all sub-keys exist for a chunk at a time."""
    function, arguments = op(name, dtype)

    def gradient(primals, indices):
        y, pullback = jax.vjp(lambda primals: function(primals, indices), primals)
        return pullback(y)

    bound = T * H * D_KEY if name == "product_key_top_k" else N * D
    # A chunk's scores take 256 MiB; the scores of one half are there a second time.
    bound = max(bound, 2 * 256 * 2**20 // 4)
    for direction in (function, gradient):
        assert largest(lower(platform, direction, *arguments)) <= bound


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_training_step(platform):
    """A block before PEER, and PEER with a million experts; bfloat16."""
    peer = functools.partial(PEER, num_experts=N, num_heads=H, top_k=K, d_key=D_KEY)
    build = functools.partial(
        Transformer, 32000, D, 2, 12, ffw=Dense, sparse_ffw=peer, sparse_blocks=(1,), dtype=jnp.bfloat16
    )
    trainer = Trainer(build, AdamW(learning_rate=1e-3))
    batch = {name: like(jnp.int32, 16, 2048) for name in ("inputs", "targets", "segment_ids")}
    rates = jax.tree.map(jnp.asarray, trainer.optimizer.rates(trainer.labels, 0, 10))
    with jax.numpy_dtype_promotion("standard"):  # Flax adds bfloat16 to float32
        text = lower(platform, trainer.step, trainer.abstract_state(), batch, rates)
    assert largest(text) < T * H * K * D
    assert f"tensor<{N}x{D}xf32>" in text


@pytest.mark.parametrize("module", ["peer_jax.ops", "peer_jax.sharding"])
def test_ops_and_placements_need_neither_flax_nor_gin_nor_optax(module):
    program = f"import sys, {module}; print(sorted({{'flax', 'gin', 'optax'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(peer_jax.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"
