"""Runs a model over a text, and keeps the routing of each of its blocks, the losses, and some of the layers' inputs.

b  batch     s  sequence     h  heads     k  top-k     N  experts     d  d_model
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from peer_jax.analysis.experts.trace import Text, Trace
from peer_jax.data.pipeline import Batch, PackedText, shift_right
from peer_jax.errors import InputError
from peer_jax.layers import Aux, FeedForward, Routing
from peer_jax.models import Transformer
from peer_jax.training.metrics import ProgressBar

# Tokens of which the layers' inputs are kept.
SAMPLED = 256


class Change(NamedTuple):
    """What is changed about a layer whose experts are N; ``unchanged`` is the layer as it is.

    Attributes:
        scale: what the output is multiplied by.
        kept: what the weights of each expert are multiplied by: 0 knocks an expert out.
        instead: the expert that is used in the place of each expert.
        shuffled: whether the weights of a head are given to its experts in random order.
        alone: whether only the expert with the largest weight of each head is used, with the weight of all.
    """

    scale: Float[Array, ""]
    kept: Float[Array, " N"]
    instead: Int[Array, " N"]
    shuffled: Bool[Array, ""]
    alone: Bool[Array, ""]


def unchanged(num_experts: int, **changes: Any) -> Change:
    """A change that changes nothing but what is given."""
    nothing = {"scale": 1.0, "kept": jnp.ones(num_experts), "instead": jnp.arange(num_experts, dtype=jnp.int32)}
    given = nothing | {"shuffled": False, "alone": False} | changes
    return Change(**{name: jnp.asarray(value) for name, value in given.items()})


class Seen(NamedTuple):
    """The input of a layer and its routing."""

    x: Float[Array, "b s d"]
    routing: Routing


class _Probe:
    """Takes the place of a layer during one forward pass: it keeps what the layer sees, and may change what it does.

    ``seen`` stays None if the layer does not route. Such a layer can only be scaled.
    """

    def __init__(self, layer: FeedForward, change: Change | None) -> None:
        self.layer, self.change = layer, change
        self.seen: Seen | None = None

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"] | None = None
    ) -> tuple[Float[Array, "b s d"], Aux]:
        y = None
        if self.layer.routes:
            self.seen = Seen(x, self.layer.route(x, mask))
        if self.seen is not None and self.change is not None:
            clean = x if mask is None else jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
            y = self.layer.mix(clean, changed(self.seen.routing, self.change))
        if y is None:
            y, _ = self.layer(x, mask)
        scale = 1.0 if self.change is None else self.change.scale.astype(y.dtype)
        return y * scale, Aux(jnp.zeros(()), {})


def takes_routings(layer: FeedForward, d_model: int) -> bool:
    """Whether a layer can compute its output for another routing than its own."""
    routing = Routing(jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1, 1)))
    return layer.mix(jnp.zeros((1, d_model)), routing) is not None


def changed(routing: Routing, change: Change) -> Routing:
    """The routing that a change makes of another one. Random orders are the same for the same shape."""
    indices, gates = routing
    largest = jax.nn.one_hot(jnp.argmax(gates, axis=-1), gates.shape[-1], dtype=bool)
    alone = jnp.where(largest, jnp.sum(gates, axis=-1, keepdims=True), 0.0)
    gates = jnp.where(change.alone, alone, gates)
    gates = jnp.where(change.shuffled, _shuffled(gates), gates)
    return Routing(change.instead[indices], gates * change.kept[indices])


def _shuffled(gates: Float[Array, "*tokens h k"]) -> Float[Array, "*tokens h k"]:
    """Each head's weights above zero, in random order at the places where they were."""
    places, others = (
        jnp.argsort(jnp.where(gates > 0, jax.random.uniform(key, gates.shape), 2.0), axis=-1)
        for key in jax.random.split(jax.random.key(0))
    )
    return jnp.take_along_axis(jnp.take_along_axis(gates, others, axis=-1), jnp.argsort(places, axis=-1), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graph: nnx.GraphDef, state: nnx.State, batch: Batch, changes: Mapping[int, Change]
) -> tuple[Float[Array, "b s"], dict[int, Seen]]:
    """The losses of a batch, and what each layer that routes has seen."""
    model = nnx.merge(graph, state, copy=True)
    model.remat = False
    probes = {
        index: _Probe(block.ffw, changes.get(index))
        for index, block in enumerate(model.blocks)
        if block.ffw.routes or index in changes
    }
    for index, probe in probes.items():
        model.blocks[index].ffw = probe
    losses = model.losses(batch["inputs"], batch["targets"], batch["segment_ids"])
    return losses, {index: probe.seen for index, probe in probes.items() if probe.seen is not None}


class Rows(NamedTuple):
    """Rows of one or several texts, as a model reads them, and the number of the text that each row is of."""

    batch: Batch
    texts: Int[np.ndarray, " rows"]

    @property
    def real(self) -> Bool[np.ndarray, "rows s"]:
        """Which places hold tokens and no padding."""
        return self.batch["segment_ids"] > 0


def draw(sources: Sequence[PackedText], tokens: int, seed: int) -> Rows:
    """Random rows of several texts, the same number of each, that have about so many tokens together.

    Raises:
        InputError: if rows of the texts differ in length.
    """
    lengths = {source.seq_len for source in sources}
    if len(lengths) > 1:
        raise InputError(f"the texts have rows of {sorted(lengths)} tokens: give texts with the same TextTask.seq_len")
    rng = np.random.default_rng(seed)
    found, texts = [], []
    for number, source in enumerate(sources):
        wanted = max(1, round(tokens / len(sources) / source.seq_len))
        rows = np.sort(rng.permutation(source.rows)[:wanted])
        found.append(source.take(rows))
        texts.append(np.full(len(rows), number))
    targets, segment_ids = (np.concatenate([one[name] for one in found]) for name in ("tokens", "segment_ids"))
    inputs = shift_right(targets, segment_ids)
    return Rows(Batch(inputs=inputs, targets=targets, segment_ids=segment_ids), np.concatenate(texts))


class Passes(NamedTuple):
    """Runs a model over rows, in batches of the same size."""

    model: Transformer
    rows: Rows
    batch_size: int
    progress: bool = False

    def batches(
        self, description: str, changes: Mapping[int, Change]
    ) -> Iterator[tuple[Bool[np.ndarray, "b s"], Float[np.ndarray, "b s"], dict[int, Seen]]]:
        """Yields, for each batch, which places hold tokens, their losses, and what the layers have seen."""
        graph, state = nnx.split(self.model)
        real = self.rows.real
        starts = range(0, len(real), self.batch_size)
        with ProgressBar(description, len(starts), enabled=self.progress) as bar:
            for done, start in enumerate(starts, start=1):
                part = slice(start, start + self.batch_size)
                own = real[part]
                missing = ((0, self.batch_size - len(own)), (0, 0))
                batch = {name: np.pad(array[part], missing) for name, array in self.rows.batch.items()}
                losses, seen = _forward(graph, state, batch, changes)
                yield own, np.asarray(losses)[: len(own)], seen
                bar.update(done)

    def losses(self, description: str, changes: Mapping[int, Change]) -> Float[np.ndarray, " T"]:
        """The loss of every token, with layers changed."""
        found = [losses[real] for real, losses, _ in self.batches(description, changes)]
        return np.concatenate(found).astype(np.float64)


def collect(passes: Passes, *, seed: int, sampled: int = SAMPLED) -> tuple[Text, list[Trace]]:
    """The tokens of the rows and the routing of each block that routes. The text has no names of documents or domains.

    It takes 8 bytes of memory for each use of an expert: T * h * k for each block.
    """
    real = passes.rows.real
    total = int(real.sum())
    sample = np.sort(np.random.default_rng(seed).permutation(total)[:sampled])
    losses, routings, vectors, start = [], {}, {}, 0
    for own, batch_losses, seen in passes.batches("look", {}):
        count = int(own.sum())
        here = sample[(sample >= start) & (sample < start + count)] - start
        losses.append(batch_losses[own])
        for block, (x, (indices, gates)) in seen.items():
            parts = routings.setdefault(block, ([], []))
            for part, array in zip(parts, (indices, gates), strict=True):
                part.append(np.asarray(array)[: len(own)][own])
            vectors.setdefault(block, []).append(np.asarray(x.astype(jnp.float32))[: len(own)][own][here])
        start += count
    traces = [
        Trace(
            block,
            passes.model.blocks[block].ffw.num_experts,
            np.concatenate(indices).astype(np.int32),
            np.concatenate(gates).astype(np.float32),
            sample,
            np.concatenate(vectors[block]),
        )
        for block, (indices, gates) in routings.items()
    ]
    pieces, positions = _pieces(passes.rows.batch["segment_ids"])
    inputs, targets = passes.rows.batch["inputs"][real], passes.rows.batch["targets"][real]
    return Text(inputs, targets, positions, pieces, pieces, np.concatenate(losses).astype(np.float64)), traces


def _pieces(
    segment_ids: Int[np.ndarray, "rows s"],
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """The number of each token's piece, and the token's place in it."""
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = begins[segment_ids > 0]
    pieces = np.cumsum(begins) - 1
    return pieces, np.arange(len(begins)) - np.flatnonzero(begins)[pieces]


def pieces(text: Text) -> list[Int[np.ndarray, " _"]]:
    """The tokens of each piece."""
    return np.split(text.targets, np.flatnonzero(np.diff(text.pieces)) + 1)


def text_of_pieces(rows: Rows, pieces: Int[np.ndarray, " T"]) -> Int[np.ndarray, " pieces"]:
    """The number of the text that each piece is of."""
    of_token = np.broadcast_to(rows.texts[:, None], rows.real.shape)[rows.real]
    return of_token[np.flatnonzero(np.diff(pieces, prepend=-1))]
