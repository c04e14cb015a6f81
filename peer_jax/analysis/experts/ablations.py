"""What the model loses, and where, if a layer or some of its experts are changed.

T  tokens     N  experts
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from peer_jax.analysis.experts.information import specialists
from peer_jax.analysis.experts.passes import Change, Passes, takes_routings, unchanged
from peer_jax.analysis.experts.trace import UNKNOWN, Labels, Text, Trace

SHARE = 0.01  # of the used experts, that are knocked out together
EXPLAINED = {
    "zeroed": "the layer puts out nothing",
    "weights shuffled": "each head gives its weights to its experts in random order",
    "strongest alone": "each head uses only the expert with the largest weight, which gets the weight of all",
    "experts permuted": "each used expert is replaced by another used one, for all tokens alike",
    "one expert for all": "every expert is replaced by the most used one: only weights still depend on the token",
    "most used knocked out": "the most used 1% of the used experts, but at least one, put out nothing",
    "most specialised knocked out": "the most specialised 1% of the used experts, but at least one, put out nothing",
    "random knocked out": "a random 1% of the used experts, but at least one, put out nothing",
}


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What a change costs.

    Attributes:
        block: the block whose layer is changed.
        name: a key of ``EXPLAINED``.
        experts: how many experts are knocked out; None for changes of all.
        mass: the share of the weight mass that these experts have.
        cost: the mean loss of all tokens after the change, less that before, in nats per token.
        error: its standard error over documents.
        by_domain: the same for the tokens of each label, by the kind of label and its name.
    """

    block: int
    name: str
    experts: int | None
    mass: float | None
    cost: float
    error: float
    by_domain: dict[str, dict[str, float]]


def changes(
    trace: Trace, labels: Labels, *, can_mix: bool, seed: int
) -> dict[str, tuple[Change, Int[np.ndarray, " n"] | None]]:
    """The changes of a layer by name, and the experts that each knocks out. What can't change anything is left out.

    Args:
        trace: the routing of the layer.
        labels: what the most specialised experts are specialised by.
        can_mix: whether the layer can be given another routing; if not, it can only be zeroed.
        seed: of random experts.
    """
    n = trace.num_experts
    found: dict[str, tuple[Change, np.ndarray | None]] = {"zeroed": (unchanged(n, scale=0.0), None)}
    if not can_mix:
        return found
    rng = np.random.default_rng(seed)
    used = np.flatnonzero(trace.counts())
    if len(used) < 2:
        return found
    if ((trace.gates > 0).sum(axis=-1) > 1).any():
        found["weights shuffled"] = unchanged(n, shuffled=True), None
        found["strongest alone"] = unchanged(n, alone=True), None
    moved, order = np.arange(n, dtype=np.int32), rng.permutation(used)
    moved[order] = np.roll(order, 1)
    found["experts permuted"] = unchanged(n, instead=jnp.asarray(moved)), None
    same = jnp.full(n, np.argmax(trace.masses()), jnp.int32)
    found["one expert for all"] = unchanged(n, instead=same), None
    size = max(1, round(SHARE * len(used)))
    special, _ = specialists(trace, labels)
    sets = {
        "most used knocked out": np.argsort(-trace.masses(), kind="stable")[:size],
        "most specialised knocked out": special[:size],
        "random knocked out": rng.permutation(used)[:size],
    }
    for name, experts in sets.items():
        if len(experts):
            kept = np.ones(n, np.float32)
            kept[experts] = 0
            found[name] = unchanged(n, kept=jnp.asarray(kept)), np.sort(experts)
    return found


def ablate(passes: Passes, text: Text, trace: Trace, labels: Labels, *, seed: int) -> list[Ablation]:
    """Runs the model over the same rows with each change of one layer, and compares losses with those before.

    One program is compiled for all changes of a layer, so each costs one pass over the rows.
    """
    can_mix = takes_routings(passes.model.blocks[trace.block].ffw, trace.vectors.shape[-1])
    masses, found = trace.masses(), []
    for name, (change, experts) in changes(trace, labels, can_mix=can_mix, seed=seed).items():
        mass = None if experts is None else float(masses[experts].sum() / masses.sum())
        count = None if experts is None else len(experts)
        found.append(_ablation(passes, text, trace.block, name, change, count, mass))
    return found


def zero(passes: Passes, text: Text, block: int) -> Ablation:
    """The same for a layer that does not route, which can only be zeroed."""
    return _ablation(passes, text, block, "zeroed", unchanged(1, scale=0.0))


def _ablation(
    passes: Passes,
    text: Text,
    block: int,
    name: str,
    change: Change,
    experts: int | None = None,
    mass: float | None = None,
) -> Ablation:
    more = passes.losses(f"block {block}, {name}", {block: change}) - text.losses
    error = _error(more, text.documents)
    return Ablation(block, name, experts, mass, float(more.mean()), error, _split(more, text))


def _error(more: Float[np.ndarray, " T"], documents: Int[np.ndarray, " T"]) -> float:
    """The standard error of the mean over tokens, whose documents are the independent units."""
    sums = np.bincount(documents, more - more.mean())
    units = np.count_nonzero(np.bincount(documents))
    return float(np.sqrt(np.sum(sums**2) * units / max(1, units - 1)) / len(more)) if units > 1 else float("inf")


def _split(more: Float[np.ndarray, " T"], text: Text) -> dict[str, dict[str, float]]:
    """The mean for each label of each kind of domain."""
    found = {}
    for labels in text.domains:
        known = labels.of != UNKNOWN
        sums = np.bincount(labels.of[known], more[known], minlength=len(labels.names))
        sizes = np.bincount(labels.of[known], minlength=len(labels.names))
        found[labels.kind] = {
            name: float(total / size) for name, total, size in zip(labels.names, sums, sizes, strict=True) if size
        }
    return found
