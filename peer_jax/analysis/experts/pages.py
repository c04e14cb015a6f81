"""A page for each of some experts: what fires it, what its output promotes, and how it is used; and a search by token.

T  tokens     m  experts that have a page     d  d_model     V  vocabulary
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from peer_jax.analysis.experts.information import Uses, joint, specialists
from peer_jax.analysis.experts.mean_outputs import MeanOutputs
from peer_jax.analysis.experts.trace import UNKNOWN, Labels, Text, Trace
from peer_jax.data.vocabulary import Vocabulary
from peer_jax.layers import FeedForward
from peer_jax.models import Transformer

OF_EACH_KIND = 16  # experts: most used, most specialised, random
TOKENS, PROMOTED, CONTEXTS = 10, 10, 8
BEFORE, AFTER = 48, 16  # tokens of a context
SEARCHED = 5000  # tokens of the vocabulary that can be searched for, the most frequent ones
FOUND = 10  # experts that a search finds for a token


def choose(trace: Trace, labels: Labels, *, seed: int, size: int = OF_EACH_KIND) -> dict[int, list[str]]:
    """The experts that get a page, and why: the most used, the most specialised by ``labels``, and random used ones."""
    used = np.flatnonzero(trace.counts())
    special, _ = specialists(trace, labels)
    kinds = {
        "most used": np.argsort(-trace.masses(), kind="stable")[: min(size, len(used))],
        f"most specialised by {labels.kind}": special[:size],
        "random": np.sort(np.random.default_rng(seed).permutation(used)[:size]),
    }
    found: dict[int, list[str]] = {}
    for kind, experts in kinds.items():
        for expert in experts:
            found.setdefault(int(expert), []).append(kind)
    return found


def pages(
    model: Transformer,
    trace: Trace,
    text: Text,
    chosen: dict[int, list[str]],
    vocabulary: Vocabulary,
    means: MeanOutputs | None = None,
) -> list[dict[str, Any]]:
    """What is known of each expert, as plain values.

    Args:
        model: the model.
        trace: the routing of a block.
        text: the tokens.
        chosen: the experts, and what they were chosen for.
        vocabulary: writes the tokens.
        means: of the outputs of these experts, if their outputs have no fixed direction.
    """
    layer: FeedForward = model.blocks[trace.block].ffw
    numbers = np.array(list(chosen), np.int32)
    tokens, experts, gates = trace.pairs()
    is_chosen = np.zeros(trace.num_experts, bool)
    is_chosen[numbers] = True
    kept = is_chosen[experts]
    tokens, experts, gates = tokens[kept], experts[kept], gates[kept]
    order = np.argsort(experts, kind="stable")
    tokens, experts, gates = tokens[order], experts[order], gates[order]
    starts, ends = (np.searchsorted(experts, numbers, side) for side in ("left", "right"))
    directions = layer.expert_outputs(jnp.asarray(numbers))
    if directions is None and means is not None:
        directions = jnp.asarray(means.directions, jnp.float32)
    lens = None if directions is None else logit_lens(model, directions)
    found = []
    total = float(trace.masses().sum())
    for place, (number, kinds) in enumerate(chosen.items()):
        own = slice(starts[place], ends[place])
        at, weights = tokens[own], gates[own]
        page = {
            "block": trace.block,
            "expert": number,
            "kinds": kinds,
            "uses": len(at),
            "share": float(weights.sum()) / total,
            "mean_weight": float(weights.mean()) if len(at) else None,
            "largest_weight": float(weights.max()) if len(at) else None,
            "norm": None if directions is None else float(np.linalg.norm(_plain(directions[place]))),
            "mean_norm": None if means is None else float(means.norms[place]),
            "inputs": _most(text.inputs[at], weights, vocabulary),
            "targets": _most(text.targets[at], weights, vocabulary),
            "domains": {labels.kind: _domains(labels, at, weights) for labels in text.domains},
            "contexts": contexts(text, at, weights, vocabulary),
            "promotes": None if lens is None else _lens(lens[place], vocabulary, largest=True),
            "suppresses": None if lens is None else _lens(lens[place], vocabulary, largest=False),
        }
        found.append(page)
    return found


def logit_lens(model: Transformer, directions: Float[Array, "m d"]) -> Float[np.ndarray, "m V"]:
    """The logits of each direction alone, through the final norm and the head.

    The norm makes the length of a direction irrelevant. The residual stream that the direction is added to, and the
    blocks between, are left out: this is what the direction promotes by itself.
    """
    return _plain(_logits(*nnx.split(model), directions))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, state: nnx.State, directions: Float[Array, "m d"]) -> Float[Array, "m V"]:
    model = nnx.merge(graph, state)
    return model.logits(directions.astype(model.dtype))


def _lens(logits: Float[np.ndarray, " V"], vocabulary: Vocabulary, *, largest: bool) -> list[tuple[str, float]]:
    centred = logits - logits.mean()
    order = np.argsort(-centred if largest else centred, kind="stable")[:PROMOTED]
    return [(vocabulary.piece(int(i)), float(centred[i])) for i in order]


def _most(ids: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"], vocabulary: Vocabulary):
    """The tokens with the largest share of the weights, and their shares."""
    if not len(ids):
        return []
    mass = np.bincount(ids, weights)
    order = np.argsort(-mass, kind="stable")[:TOKENS]
    return [(vocabulary.piece(int(i)), float(mass[i] / mass.sum())) for i in order if mass[i] > 0]


def _domains(labels: Labels, at: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> list[tuple[str, float]]:
    """The labels with the largest share of the weights, and their shares."""
    of = labels.of[at]
    known = of != UNKNOWN
    if not known.any():
        return []
    mass = np.bincount(of[known], weights[known], minlength=len(labels.names))
    order = np.argsort(-mass, kind="stable")[:5]
    return [(labels.names[i], float(mass[i] / mass.sum())) for i in order if mass[i] > 0]


def contexts(
    text: Text, at: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"], vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """The places where an expert has its largest weights, one per document while there are enough: text around them."""
    order = np.argsort(-weights, kind="stable")
    documents = text.documents[at[order]]
    first = np.sort(np.unique(documents, return_index=True)[1])
    rest = np.setdiff1d(np.arange(len(order)), first)
    found = []
    for place in [*first, *rest][:CONTEXTS]:
        token = int(at[order[place]])
        begin, end = np.searchsorted(text.pieces, text.pieces[token] + np.array([0, 1]))
        lower, upper = max(begin, token - BEFORE), min(end, token + 1 + AFTER)
        found.append(
            {
                "before": vocabulary.decode(text.inputs[lower:token].tolist()),
                "token": vocabulary.piece(int(text.inputs[token])),
                "after": vocabulary.decode(text.inputs[token + 1 : upper].tolist()),
                "weight": float(weights[order[place]]),
                "domains": [labels.names[labels.of[token]] for labels in text.domains if labels.of[token] != UNKNOWN],
            }
        )
    return found


def index(trace: Trace, text: Text, vocabulary: Vocabulary) -> dict[str, list[tuple[int, float]]]:
    """For each of the most frequent tokens that a model reads, its experts, and their shares of its weight."""
    kinds, places = np.unique(text.inputs, return_inverse=True)
    uses = Uses.of(trace)
    of = joint(uses, places, len(kinds))
    totals = np.bincount(of.labels, of.weights, minlength=len(kinds))
    order = np.lexsort((of.places, -of.weights, of.labels))
    starts = np.searchsorted(of.labels[order], np.arange(len(kinds)))
    ends = np.searchsorted(of.labels[order], np.arange(len(kinds)), side="right")
    frequent: Sequence[int] = np.argsort(-np.bincount(places), kind="stable")[:SEARCHED].tolist()
    found = {}
    for kind in frequent:
        own = order[starts[kind] : min(ends[kind], starts[kind] + FOUND)]
        experts = uses.experts[of.places[own]]
        shares = of.weights[own] / max(totals[kind], np.finfo(float).tiny)
        found[vocabulary.piece(int(kinds[kind]))] = [(int(e), float(s)) for e, s in zip(experts, shares, strict=True)]
    return found


def _plain(array: Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32))
