"""A layer as compiled functions with random parameters, and what every layer owes: its oracle's outputs and gradients.

An oracle is a function (params, x, mask, running=None) -> y, loss in float64; ``running`` has the running statistics to
evaluate with, by path.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from reference import directional_derivative, relative_error

# float32 against float64 through three or four matrix products of width 16 at most, partial sums of the result's size.
# Batch norm divides by standard deviations of about 1 here and so doesn't magnify.
FP32 = 1e-5
# A leak moves an output by its own size; other shapes of the same sum move it by a few float32 roundings.
UNCHANGED = 2e-6

B, S, D = 2, 7, 6


class Compiled:
    """A layer as pure functions, its parameters random (norm scales and biases too) whatever their init."""

    def __init__(self, layer):
        rng = np.random.default_rng(1)
        self.graph, params, self.rest = nnx.split(layer, nnx.Param, ...)
        self.params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.7, p.dtype), params)
        layer.eval()
        self.eval_graph = nnx.graphdef(layer)
        self.layer = layer

    @functools.cached_property
    def train(self):
        """(params, x, mask, weights) -> y, loss, the rest of the state, (d_params, dx) of sum(weights * y) + loss."""

        @jax.jit
        def run(params, x, mask, weights):
            def total(params, x):
                layer = nnx.merge(self.graph, params, self.rest, copy=True)
                y, aux = layer(x, mask)
                return jnp.sum(y * weights) + aux.loss, (y, aux.loss, nnx.state(layer, nnx.Not(nnx.Param)))

            grads, results = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
            return *results, grads

        return run

    @functools.cached_property
    def evaluate(self):
        """(params, rest, x, mask) -> y, loss, metrics, the rest of the state."""

        @jax.jit
        def run(params, rest, x, mask):
            layer = nnx.merge(self.eval_graph, params, rest, copy=True)
            y, aux = layer(x, mask)
            return y, aux.loss, aux.metrics, nnx.state(layer, nnx.Not(nnx.Param))

        return run


def draw(rng):
    """x, a mask with padding in the middle and at the end, and the weights of a loss over real tokens."""
    x = rng.normal(size=(B, S, D)).astype(np.float32)
    mask = np.ones((B, S), bool)
    mask[0, 2] = mask[1, 5:] = False
    return x, mask, np.where(mask[..., None], rng.normal(size=(B, S, D)), 0).astype(np.float32)


def check_training(case, oracle, rng, params_of):
    """Output, loss and every gradient are the oracle's."""
    x, mask, weights = draw(rng)
    y, loss, _, (d_params, dx) = case.train(case.params, x, mask, weights)
    params = params_of(case.params)

    def total(params):
        y, loss = oracle(params, params["x"], mask)
        return np.sum(y * np.asarray(weights, np.float64)) + loss

    params["x"] = np.asarray(x, np.float64)
    expected_y, expected_loss = oracle(params, params["x"], mask)
    assert relative_error(np.asarray(y)[mask], expected_y[mask]) < FP32
    assert relative_error(loss, expected_loss) < FP32
    grads = {**params_of(d_params), "x": np.asarray(dx, np.float64)}
    assert grads.keys() == params.keys()
    for parameter, grad in grads.items():
        direction = rng.normal(size=grad.shape)
        expected = directional_derivative(total, params, parameter, direction)
        terms = grad * direction
        # Against the size of the terms, since their sum may cancel; all are zero where a parameter changes nothing.
        assert abs(terms.sum() - expected) <= FP32 * max(np.abs(terms).sum(), abs(expected)), parameter


def check_evaluation(case, oracle, rng, params_of):
    """After one training step, so that the running statistics are neither the batch's nor the initial ones."""
    x, mask, weights = draw(rng)
    _, _, rest, _ = case.train(case.params, x, mask, weights)
    x = rng.normal(size=(B, S, D)).astype(np.float32) + np.float32(0.5)
    y, loss, metrics, rest_after = case.evaluate(case.params, rest, x, mask)
    running = params_of(rest, nnx.BatchStat) or None
    expected_y, expected_loss = oracle(params_of(case.params), x.astype(np.float64), mask, running=running)
    assert relative_error(np.asarray(y)[mask], expected_y[mask]) < FP32
    assert relative_error(loss, expected_loss) < FP32
    jax.tree.map(np.testing.assert_array_equal, rest_after, rest)  # evaluation changes no state
    assert all(isinstance(key, str) and np.shape(value) == () for key, value in metrics.items())
    assert all(np.isfinite(value) for value in metrics.values())


def check_padding(case, rng):
    """Outputs of real tokens, loss, statistics and gradients with other (and large) contents in the padding."""
    x, mask, weights = draw(rng)
    other = np.where(mask[..., None], x, 30 * rng.normal(size=x.shape)).astype(np.float32)
    outcomes = []
    for contents in (x, other):
        y, loss, rest, (d_params, dx) = case.train(case.params, contents, mask, weights)
        evaluated, evaluation_loss, *_ = case.evaluate(case.params, rest, contents, mask)
        outputs = [np.asarray(a)[mask] for a in (y, evaluated, dx)]
        outcomes.append(jax.tree.leaves((outputs, loss, evaluation_loss, rest, d_params)))
    for before, after in zip(*outcomes, strict=True):
        if jnp.issubdtype(before.dtype, jnp.floating):
            assert relative_error(after, before) < UNCHANGED


def changes(case, x, positions, rng):
    """How much the output at each position moves, relative to the output, when x at `positions` is replaced."""
    mask = np.ones((B, S), bool)
    y = case.evaluate(case.params, case.rest, x, mask)[0]
    moved = x.copy()
    moved[:, positions] = 2 * rng.normal(size=x[:, positions].shape)
    difference = np.abs(case.evaluate(case.params, case.rest, moved, mask)[0] - y)
    return difference.max(axis=(0, 2)) / np.abs(y).max()
