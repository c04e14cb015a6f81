"""One training step: loss, gradients (accumulated), update; and the state it carries."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int

from peer_jax.data.pipeline import Batch
from peer_jax.errors import InputError
from peer_jax.models import Model
from peer_jax.ops.tpu import COMPILER_OPTIONS
from peer_jax.sharding import constrain, current, target
from peer_jax.training.frozen import FrozenExperts, Mask
from peer_jax.training.optimizer import NORMS, Optimizer, label_params
from peer_jax.training.touched import (
    TouchedTables,
    count_touched,
    retrieved_rows,
    sum_of_gradients,
    with_changes,
)

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that a step changes.

    ``others`` are batch-norm statistics and random streams, ``optimizer`` is the state that the optimiser's ``init``
    has made.
    """

    step: Int[Array, ""]
    params: nnx.State
    others: nnx.State
    optimizer: Any


class Trainer:
    """The functions of a run, and nothing that changes during it.

    Args:
        build: makes the model, ``build(rngs=)``.
        optimizer: what makes an update of gradients.
        accumulation: micro-batches that a step is split into; the update equals that of the whole batch.
        frozen_experts: the experts that don't change, see ``peer_jax.training.frozen``.

    Raises:
        InputError: if gradients are to be accumulated over a batch whose statistics the model needs whole, or if the
            optimiser does not fit the model.
    """

    def __init__(
        self,
        build: Callable[..., nnx.Module],
        optimizer: Optimizer,
        *,
        accumulation: int = 1,
        frozen_experts: int | Mask | None = None,
    ) -> None:
        self.build, self.optimizer, self.accumulation = build, optimizer, accumulation
        abstract = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
        if not isinstance(abstract, Model):
            found = type(abstract).__name__
            raise InputError(f"the model is a {found}, but only a Transformer or a ViT can be trained")
        layers = (block.ffw for block in abstract.blocks)
        needing = next((layer for layer in layers if layer.needs_whole_batch is not None), None)
        if accumulation > 1 and needing is not None:
            part, way_out = needing.needs_whole_batch
            raise InputError(
                f"accumulation={accumulation} can't give the {part} of {needing.name} the statistics of the "
                f"whole batch: {way_out}, or accumulation to 1"
            )
        wanted, share = getattr(optimizer, "updates_touched", None), getattr(optimizer, "touched_share", 1.0)
        self.touched = TouchedTables(abstract, wanted, share, accumulation)
        self.frozen = FrozenExperts(abstract, frozen_experts)
        self.abstract_model = abstract
        self.graph, params, others = nnx.split(abstract, nnx.Param, ...)
        self.labels = label_params(params)
        optimizer.check(self.labels)
        state = jax.eval_shape(functools.partial(optimizer.init, self.labels), params)
        self._shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, others, state)

    def init(self, seed: int) -> TrainState:
        """The state before the first step. Each device makes its own part of it and never holds more than that.

        It is bound to its devices as a restored state is: for any other, JAX would compile the step a second time.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(self._init, out_shardings=shardings)(jax.random.key(seed))

    def _init(self, key: Array) -> TrainState:
        _, params, others = nnx.split(self.build(rngs=nnx.Rngs(key)), nnx.Param, ...)
        return TrainState(jnp.zeros((), jnp.int32), params, others, self.optimizer.init(self.labels, params))

    def abstract_state(self) -> TrainState:
        """Shapes and types of the arrays of the state, with their shardings in the placement in use."""
        shardings = self.shardings() or jax.tree.map(lambda _: SingleDeviceSharding(target()), self._shapes)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self._shapes, shardings)

    def shardings(self) -> TrainState | None:
        """The sharding of each array of the state in the placement in use; None on one device."""
        placement = current()
        return None if placement is None else placement.shardings(self._shapes)

    def compiled_step(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """``step``, to be compiled at its first call. The state that it is given is used up."""
        shardings = self.shardings()
        return jax.jit(
            self.step,
            donate_argnums=0,
            out_shardings=None if shardings is None else (shardings, current().sharding()),
            compiler_options=COMPILER_OPTIONS if target().platform == "tpu" else None,
        )

    def model(self, state: TrainState) -> Model:
        """The model of a state, in evaluation mode."""
        model = nnx.merge(self.graph, state.params, state.others)
        model.eval()
        return model

    def step(self, state: TrainState, batch: Batch, rates: dict[str, Array]) -> tuple[TrainState, Metrics]:
        """The state after one update and the step's metrics. Compile it with the state donated."""
        total = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)
        gradient = functools.partial(self._gradient, total=total)
        if self.accumulation == 1:
            grads, metrics, others = gradient(state.params, state.others, batch)
        else:
            grads, metrics, others = self._accumulate(gradient, state, batch)
        metrics |= count_touched(state.params, grads)
        grads = self.frozen.without_gradients(grads, state.params)
        params, optimizer, norms = self.optimizer.update(self.labels, state.params, grads, state.optimizer, rates)
        params = self.frozen.put_back(state.params, params, grads)
        if missing := [name for name in NORMS if name not in norms]:
            raise InputError(
                f"{type(self.optimizer).__name__}.update returns no {missing[0]!r}: its third value must have "
                f"{', '.join(NORMS)}, see peer_jax.training.optimizer.Optimizer"
            )
        return TrainState(state.step + 1, params, others, optimizer), metrics | norms

    def _gradient(self, params: nnx.State, others: nnx.State, batch: Batch, *, total: Array):
        """The gradient of a micro-batch's share of the batch's loss, the metrics and the new ``others``."""
        tokens = self.abstract_model.num_tokens(batch["inputs"])
        whole, tables = self.touched.split(params, tokens)
        trained = whole, self.touched.changes(tables, tokens)
        loss = jax.value_and_grad(functools.partial(self._loss, total=total), has_aux=True)
        (_, (metrics, others, rows)), (grads, of_changes) = loss(trained, tables, others, batch)
        return nnx.merge_state(grads, self.touched.gradients(tables, rows, of_changes, tokens)), metrics, others

    def _loss(
        self, trained: tuple[nnx.State, nnx.State], tables: nnx.State, others: nnx.State, batch: Batch, *, total: Array
    ):
        """A micro-batch's share of the batch's loss.

        Args:
            trained: the parameters that are trained whole, and the changes of the tables that are not.
            tables: these tables.
            others, batch: the rest of the model's state, and the micro-batch.
            total: targets of the batch that count.
        """
        whole, changes = trained
        model = nnx.merge(self.graph, whole, with_changes(tables, changes), others, copy=True)
        summed, aux = model.cross_entropy(batch["inputs"], batch["targets"], batch["segment_ids"])
        loss = summed / total
        aux_loss = aux.loss / self.accumulation
        _, params, others = nnx.split(model, nnx.Param, ...)
        share = {name: value / self.accumulation for name, value in aux.metrics.items()}
        return loss + aux_loss, ({"loss": loss, "aux_loss": aux_loss} | share, others, retrieved_rows(params))

    def _accumulate(self, gradient: Callable, state: TrainState, batch: Batch):
        """The gradients, metrics and ``others`` of a batch that is worked through in micro-batches of rows.

        Gradients add up in float32.
        """
        split = jax.tree.map(lambda a: constrain(a.reshape(self.accumulation, -1, *a.shape[1:]), None, "batch"), batch)

        def add(carry, micro_batch):
            grads, others = carry
            new, metrics, others = gradient(state.params, others, micro_batch)
            return (jax.tree.map(sum_of_gradients, state.params, grads, new), others), metrics

        tokens = self.abstract_model.num_tokens(batch["inputs"])
        zeros = self.touched.zero_gradients(state.params, tokens // self.accumulation)
        (grads, others), metrics = jax.lax.scan(add, (zeros, state.others), split)
        return grads, jax.tree.map(jnp.sum, metrics), others
