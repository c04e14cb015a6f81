"""Loss, and of images accuracy, on whole validation splits, and how evenly the experts are used.

b  batch     s  sequence     N  experts
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from peer_jax.data.pipeline import Batch, Rows, eval_batches
from peer_jax.models import Model
from peer_jax.sharding import constrain, current, split_batch
from peer_jax.training.metrics import ProgressBar


def evaluate(
    model: Model, source: Rows, *, batch_size: int, routing: bool = True, progress: bool = False
) -> dict[str, Any]:
    """Evaluates on every row of a split.

    Args:
        model: in evaluation mode.
        source: a split of a prepared cache.
        batch_size: rows per batch; the last batch is filled up with padding, which counts nowhere.
        routing: also measure how the sparse layers' experts are used.
        progress: show a bar.

    Returns:
        The means of ``Model.scores``: ``loss`` (nats per token, or per image), and of images ``accuracy``; and what the
        source adds by ``Rows.measures``. With ``routing`` also ``experts``, by block: ``usage``, the share of experts
        that was retrieved at least once with a weight above zero, and ``unevenness``, KL(p || uniform) in nats, where p
        is the weight mass per expert.
    """
    graph, state = nnx.split(model)
    batches = eval_batches(
        source, batch_size=batch_size, process_index=jax.process_index(), process_count=jax.process_count()
    )
    masses = jax.tree.map(_zeros, _masses(model)) if routing else {}
    sums, count = defaultdict(float), 0.0
    with ProgressBar("evaluate", len(batches), enabled=progress) as bar:
        for done, batch in enumerate(batches, start=1):
            scores, targets, masses = _evaluate_batch(graph, state, split_batch(batch), masses)
            count += float(targets)
            for name, score in scores.items():
                sums[name] += float(score)
            bar.update(done, f"loss {sums['loss'] / max(count, 1):.4f}")
    result = {name: total / count for name, total in sums.items()} | source.measures(sums["loss"], int(count))
    if masses:
        result["experts"] = {f"block_{block}": usage(np.asarray(mass)) for block, mass in masses.items()}
    return result


def usage(mass: Float[np.ndarray, " N"]) -> dict[str, float]:
    """Usage and unevenness of the experts, from the weight mass that each received."""
    p = mass.astype(np.float64) / mass.sum(dtype=np.float64)
    p = p[p > 0]
    return {"usage": p.size / mass.size, "unevenness": float(np.sum(p * np.log(p * mass.size)))}


def lower(model: Model, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
    """The program that ``evaluate`` runs for each batch, of a model and a batch without values."""
    return _evaluate_batch.lower(*nnx.split(model), batch, _masses(model))


def _masses(model: Model) -> dict[int, jax.ShapeDtypeStruct]:
    """A float for each expert of each block that routes, [N]."""
    sparse = {index: block.ffw for index, block in enumerate(model.blocks) if block.ffw.routes}
    replicated = None if current() is None else current().sharding()
    return {
        index: jax.ShapeDtypeStruct((layer.num_experts,), jnp.float32, sharding=replicated)
        for index, layer in sparse.items()
    }


def _zeros(a: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(a.shape, a.dtype, device=a.sharding)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _evaluate_batch(graph: nnx.GraphDef, state: nnx.State, batch: Batch, masses: dict[int, Array]):
    """The model's scores, the number of targets that count, and the masses with those of this batch added.

    The masses are vectors of N sums. Nothing here has the size [tokens, N], unless a layer routes each token to all
    experts.
    """
    model = nnx.merge(graph, state, copy=True)
    scores = model.scores(batch["inputs"], batch["targets"], batch["segment_ids"])
    real = batch["segment_ids"] > 0
    if masses:
        by_token = real if real.ndim == 2 else real[:, None]  # an image's is that of all its patches
        for block, (indices, gates) in model.route(batch["inputs"], batch["segment_ids"]).items():
            gates = jnp.where(by_token[:, :, None, None], gates, 0.0)
            masses = masses | {block: masses[block].at[indices].add(gates, mode="drop")}
    return jax.tree.map(constrain, (scores, jnp.sum(real), masses))
