"""AdamW with warm-up and cosine decay, where expert tables have rates, clipping and weight decay of their own."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import optax
from flax import nnx

from peer_jax.errors import InputError
from peer_jax.layers.interface import Table, check_positive

BACKBONE = "backbone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Decoupled AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) for a model of backbone and expert tables.

    The backbone is every parameter but the tables, which are ``down`` and ``up`` of PEER and ``values`` of PKM. Each
    group is clipped by its own global norm. Weight decay spares vectors (norm scales and biases).

    Args:
        learning_rate: peak rate of the backbone.
        table_learning_rate: peak rate of the tables: one for all, or one by name, {"down": ..., "up": ...}; None: as
            the backbone's.
        warmup_steps: of linear growth from zero; in a run that is shorter, all steps but the last.
        final_fraction: of the peak rate, reached by a cosine exactly at the last step.
        weight_decay, table_weight_decay: times the rate.
        clip_norm, table_clip_norm: largest global norm of the gradient; None: no clipping.
        b1, b2, eps: Adam's.
    """

    learning_rate: float
    table_learning_rate: float | Mapping[str, float] | None = None
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    table_weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    table_clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_positive(learning_rate=self.learning_rate)
        for name in ("clip_norm", "table_clip_norm"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        for name in ("warmup_steps", "weight_decay", "table_weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("final_fraction", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1]")

    def schedule(self, step: int, steps: int) -> float:
        """Rate at ``step``, counted from 0, of ``steps``, relative to the peak."""
        warmup = min(self.warmup_steps, steps - 1)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step + 1 - warmup) / (steps - warmup)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def rates(self, labels: nnx.State, step: int, steps: int) -> dict[str, float]:
        """The learning rate of each group at ``step``."""
        scale = self.schedule(step, steps)
        return {label: scale * self._peak(label) for label in sorted(set(jax.tree.leaves(labels)))}

    def _peak(self, label: str) -> float:
        table_rate = self.learning_rate if self.table_learning_rate is None else self.table_learning_rate
        if label == BACKBONE:
            return self.learning_rate
        if isinstance(table_rate, Mapping):
            if label not in table_rate:
                raise InputError(f"table_learning_rate={dict(table_rate)} has no rate for the table {label!r}")
            return table_rate[label]
        return table_rate

    def transformation(self, labels: nnx.State) -> optax.GradientTransformation:
        """Gradients to updates that ``scale`` then multiplies by the rates.

        Rates stay outside so that one compiled step serves all rates and lengths of a run.
        """

        named = self.table_learning_rate if isinstance(self.table_learning_rate, Mapping) else {}
        if unknown := sorted(named.keys() - set(jax.tree.leaves(labels))):
            raise InputError(f"table_learning_rate has a rate for {unknown[0]!r}, but the model has no such table")

        def group(clip: float | None, decay: float) -> optax.GradientTransformation:
            return optax.chain(
                optax.identity() if clip is None else optax.clip_by_global_norm(clip),
                optax.scale_by_adam(self.b1, self.b2, self.eps),
                optax.add_decayed_weights(decay, mask=_matrices) if decay else optax.identity(),
            )

        groups = {
            label: group(self.clip_norm, self.weight_decay)
            if label == BACKBONE
            else group(self.table_clip_norm, self.table_weight_decay)
            for label in sorted(set(jax.tree.leaves(labels)))
        }
        return optax.partition(groups, labels)


def _matrices(params: nnx.State) -> nnx.State:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def label_params(params: nnx.State) -> nnx.State:
    """The group of each parameter: a table's name, or "backbone"."""

    def label(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(str(path[-1].key) if isinstance(variable, Table) else BACKBONE)

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


def scale(updates: nnx.State, labels: nnx.State, rates: Mapping[str, jax.Array]) -> nnx.State:
    """Updates against the gradient, each group's at its own rate."""
    return jax.tree.map(lambda u, label: (-rates[label] * u).astype(u.dtype), updates, labels)
