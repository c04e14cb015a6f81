"""MoE routing in closed form: capacity, ties, losses, collapse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peer_jax.layers import MoE

D, E = 4, 4


def moe(router=None, **options):
    layer = MoE(D, E, 3, **options, rngs=nnx.Rngs(0))
    if router is not None:
        layer.router.kernel.set_value(jnp.asarray(router, jnp.float32))
    return layer


def route(layer, x, mask=None):
    routing = nnx.jit(lambda layer, x, mask: layer.route(x, mask))(layer, jnp.asarray(x, jnp.float32), mask)
    return np.asarray(routing.indices), np.asarray(routing.gates)


def forward(layer, x, mask=None):
    y, aux = nnx.jit(lambda layer, x, mask: layer(x, mask))(layer, jnp.asarray(x, jnp.float32), mask)
    return np.asarray(y), aux


TO_EXPERT_2 = np.eye(E)[2] * np.ones((D, 1))  # tokens of ones prefer expert 2, and then 0, 1, 3 by the tie rule


def test_capacity_is_filled_in_token_order():
    layer = moe(TO_EXPERT_2, routing="token_choice", top_k=1)
    x = np.ones((2, 10, D))
    mask = jnp.ones((2, 10), bool).at[1, 1].set(False)
    indices, gates = route(layer, x, mask)
    assert (indices[np.asarray(mask)] == 2).all()
    # C = ceil(10 / 4) = 3; padding takes no place.
    np.testing.assert_array_equal(np.flatnonzero(gates[0]), [0, 1, 2])
    np.testing.assert_array_equal(np.flatnonzero(gates[1]), [0, 2, 3])
    y, _ = forward(layer, x, mask)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(y[0]).max(-1)), [0, 1, 2])


def test_all_choices_of_a_token_come_before_the_next_token_s():
    """With choices filled rank by rank instead, expert 0 would go to the first choices of later tokens."""
    # Token 0 prefers expert 1, then 0; the others prefer expert 0, then 1. C = ceil(4 * 2 / 4) = 2.
    x = np.zeros((1, 4, D))
    x[0, 0, 0], x[0, 1:, 1] = 1, 1
    router = np.zeros((D, E))
    router[0, :2], router[1, :2] = [1, 2], [2, 1]
    indices, gates = route(moe(router, routing="token_choice", top_k=2), x)
    np.testing.assert_array_equal(indices[0, :, 0], [[1, 0], [0, 1], [0, 1], [0, 1]])
    np.testing.assert_array_equal(gates[0, :, 0] > 0, [[True, True], [True, True], [False, False], [False, False]])


def test_kept_gates_are_not_renormalised_over_what_was_dropped():
    x = np.ones((1, 8, D))
    indices, gates = route(moe(TO_EXPERT_2, routing="token_choice", top_k=2, capacity_factor=0.5), x)
    first, second = math.exp(4), 1  # logits 4 and 0
    np.testing.assert_array_equal(indices[0, :, 0], [[2, 0]] * 8)
    np.testing.assert_allclose(gates[0, :2, 0], [[first / (first + second), second / (first + second)]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(gates[0, 2:], 0)


def test_top_1_gate_is_the_probability():
    _, gates = route(moe(TO_EXPERT_2, routing="token_choice", capacity_factor=None), np.ones((1, 3, D)))
    np.testing.assert_allclose(gates, np.full((1, 3, 1, 1), math.exp(4) / (math.exp(4) + 3)), rtol=1e-6)


def test_ties_go_to_the_lower_expert():
    indices, _ = route(moe(np.zeros((D, E)), routing="token_choice", top_k=3, capacity_factor=None), np.ones((1, 2, D)))
    np.testing.assert_array_equal(indices[0, :, 0], [[0, 1, 2]] * 2)


def test_expert_choice_ties_go_to_the_lower_position_and_never_to_padding():
    layer = moe(np.zeros((D, E)), routing="expert_choice")
    mask = jnp.ones((3, 8), bool).at[1, 0].set(False).at[2, 1:].set(False)
    indices, gates = route(layer, np.ones((3, 8, D)), mask)
    np.testing.assert_array_equal(indices[0, 0, 0], np.arange(E))
    taken = gates[:, :, 0].max(-1) > 0  # C = 2, by every expert alike
    np.testing.assert_array_equal([list(np.flatnonzero(row)) for row in taken[:2]], [[0, 1], [1, 2]])
    np.testing.assert_array_equal(np.flatnonzero(taken[2]), [0])
    np.testing.assert_allclose(gates[0, 0, 0], np.full(E, 1 / E), rtol=1e-6)  # the probability, over experts
    y, aux = forward(layer, np.ones((3, 8, D)), mask)
    np.testing.assert_array_equal(np.abs(y).max(-1) > 0, taken)
    assert float(aux.loss) == 0


@pytest.mark.parametrize(("capacity_factor", "top_k"), [(1.0, 1), (None, 2)])
def test_losses_in_closed_form(capacity_factor, top_k):
    """At the default weights: a uniform router has balance 1 and z log(E)^2; a collapsed one has balance E p_2."""
    options = {"routing": "token_choice", "capacity_factor": capacity_factor, "top_k": top_k}
    _, aux = forward(moe(np.zeros((D, E)), **options), np.ones((2, 8, D)))
    # Ties send all first choices to expert 0: f is as uneven as can be, but p = 1/E makes E sum f p = 1 all the same.
    np.testing.assert_allclose(aux.loss, 0.01 + 0.001 * math.log(E) ** 2, rtol=1e-6)
    _, aux = forward(moe(TO_EXPERT_2, **options), np.ones((2, 8, D)))
    total = math.exp(4) + 3
    shares = [(math.exp(4), 1.0)] if top_k == 1 else [(math.exp(4), 0.5), (1.0, 0.5)]
    balance = E * sum(share * weight / total for weight, share in shares)
    np.testing.assert_allclose(aux.loss, 0.01 * balance + 0.001 * math.log(total) ** 2, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"routing": "expert_choice"},
        {"routing": "token_choice", "top_k": 2},
        {"routing": "token_choice", "top_k": 2, "capacity_factor": None},
    ],
)
def test_a_sequence_of_padding_only_stays_finite(rng, options):
    layer = moe(**options)
    x = jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32)
    mask = jnp.ones((2, 5), bool).at[0].set(False)

    @nnx.jit
    def run(layer, x):
        def total(layer, x):
            y, aux = layer(x, mask)
            return jnp.sum(y) + aux.loss, (y, aux)

        return nnx.value_and_grad(total, argnums=(0, 1), has_aux=True)(layer, x)

    for leaf in jax.tree.leaves(run(layer, x)):
        assert np.isfinite(leaf).all()


def test_router_noise_is_for_training_only(rng):
    x = rng.normal(size=(2, 16, D))
    quiet, noisy = moe(), moe(router_noise=1.0)
    noisy.router.kernel.set_value(quiet.router.kernel.get_value())
    for name in ("up", "down"):
        getattr(noisy, name).set_value(getattr(quiet, name).get_value())
    first, second = forward(noisy, x)[0], forward(noisy, x)[0]
    assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()  # drawn anew in each step
    noisy.eval()
    np.testing.assert_allclose(forward(noisy, x)[0], forward(quiet, x)[0], atol=1e-6)
