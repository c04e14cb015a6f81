"""PEER-pytorch with our weights: the same function, for `--against pytorch`.

The package is https://github.com/lucidrains/PEER-pytorch. It has no query norm, and each head has its own sub-keys.
"""

import functools
import importlib.util
from collections.abc import Mapping

import numpy as np

from peer_jax.bench.cases import BOTH, PYTORCH, PYTORCH_KEEPING, Case, floors
from peer_jax.bench.programs import Program, compared_weights
from peer_jax.errors import InputError

# Both sides add some hundred float32 products at most, in different orders. If the k-th and the next score of a token
# are closer than their rounding errors, the two sides may choose different experts.
TOLERANCE = 1e-4
MAY_DIFFER = 0.002  # share of the tokens


def check_installed() -> None:
    """Raises InputError, which says how to install it, if a package is missing."""
    for name in ("torch", "PEER_pytorch"):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"a comparison against pytorch needs {name}, which is not installed: uv pip install -e '.[bench]'",
                argument="against",
            )


def program(case: Case) -> Program:
    """PEER of PEER-pytorch, set to the paper's routing (softmax over the k scores of a head) and to our weights."""
    import torch
    from PEER_pytorch import PEER

    weights = compared_weights(case)
    h, c, d = case.heads, case.d_key // 2, case.d_model
    layer = PEER(
        d,
        heads=h,
        num_experts=case.num_experts,
        num_experts_per_head=case.top_k,
        # The tanh form, as in jax.nn.gelu.
        activation=functools.partial(torch.nn.GELU, approximate="tanh"),
        dim_key=c,
        non_competing_scores=False,
    )
    ours = {
        "to_queries.0.weight": weights["query_proj"].reshape(d, h, 2, c).transpose(2, 1, 3, 0).reshape(-1, d),
        "keys": weights["sub_keys"].transpose(0, 2, 1, 3),
        "weight_down_embed.weight": weights["down"],
        "weight_up_embed.weight": weights["up"],
    }
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(ours[name])))
    x = torch.from_numpy(weights["x"]).requires_grad_(case.direction == BOTH)
    dy = torch.from_numpy(np.array(_cotangent(case)))
    del weights, ours

    def call() -> tuple[torch.Tensor, ...]:
        if case.direction == BOTH:
            y = layer(x)
            return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)
        with torch.no_grad():
            return (layer(x),)

    def results() -> dict[str, np.ndarray]:
        y, *gradients = call()
        found = {"y": y} | dict(
            zip(("dx", *(name for name, _ in layer.named_parameters())), gradients, strict=bool(gradients))
        )
        kept = {"y": "y", "dx": "dx", "weight_up_embed.weight": "d_up"}
        return {kept[name]: a.detach().numpy() for name, a in found.items() if name in kept}

    return Program(call, floors(case), None, results)


def _cotangent(case: Case) -> np.ndarray:
    """The cotangent that ``programs.program`` takes."""
    import jax

    return np.asarray(jax.random.normal(jax.random.key(1), (1, case.tokens, case.d_model)))


def check_agreement(case: Case, results: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Raises InputError unless all outputs and gradients equal PyTorch's, except for rounding."""
    theirs = results[PYTORCH if PYTORCH in results else PYTORCH_KEEPING]
    for implementation, ours in results.items():
        for name, value in ours.items():
            error = np.max(np.abs(value - theirs[name]), axis=-1) / np.max(np.abs(theirs[name]))
            if (share := float(np.mean(error > TOLERANCE))) > MAY_DIFFER:
                raise InputError(
                    f"{name} of {case.name} differs from PEER-pytorch's in {share:.1%} of the tokens with "
                    f"implementation={implementation!r}: times of programs that compute different things can't be "
                    "compared"
                )
