"""Experts compared with one another, by their parameters and by what they put out on real text.

Source: Lo et al. 2024, "A Closer Look into Mixture-of-Experts in Large Language Models" (arXiv:2406.18219).

m  experts of a sample     q  width of what is compared     f  neurons of an expert     d  d_model
S  tokens     r  experts per token     N  experts
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau, rankdata

from peer_jax.analysis.experts.matrices import Matrices
from peer_jax.analysis.experts.trace import Trace
from peer_jax.layers import FeedForward, Routing

SAMPLE = 256  # experts whose parameters are compared
MATCHED = 6  # experts whose neurons are matched, all with one another
MATCHED_NEURONS = 1024  # of an expert at most, the first ones, that are matched
COMPONENTS = 2000  # neurons at most, of which principal components are taken
SHUFFLES = 200
OUTPUT_TOKENS, OUTPUT_EXPERTS = 64, 8  # of which outputs are compared
NORM_EXPERTS = 128  # per token at most, of which output norms are taken


def cosines(rows: Float[np.ndarray, "m q"]) -> Float[np.ndarray, "m m"]:
    """The cosine of each pair of rows; 0 for a row of zeros."""
    rows = rows.astype(np.float64)
    return normalised(rows @ rows.T)


def normalised(products: Float[np.ndarray, "m m"]) -> Float[np.ndarray, "m m"]:
    """Cosines from inner products."""
    norms = np.sqrt(np.diag(products))
    lengths = norms[:, None] * norms
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)


def off_diagonal(of: Float[np.ndarray, "m m"]) -> Float[np.ndarray, " pairs"]:
    """The entries above the diagonal."""
    return of[np.triu_indices(len(of), 1)]


@dataclasses.dataclass(frozen=True)
class Regression:
    """How the similarity of router rows follows that of experts, over pairs of experts: least squares.

    ``chance`` is the share of ``SHUFFLES`` orders of the experts of one side in which the squared correlation is at
    least as large (a Mantel test: pairs that share an expert don't count as independent).
    """

    slope: float
    r_squared: float
    correlation: float
    chance: float


def regress(
    on: Float[np.ndarray, "m m"], of: Float[np.ndarray, "m m"], *, seed: int, shuffles: int = SHUFFLES
) -> Regression | None:
    """Regresses one similarity on another; None if one of them does not vary, or there are fewer than 4 experts."""
    x, y = off_diagonal(on), off_diagonal(of)
    if len(on) < 4 or x.std() < 1e-12 or y.std() < 1e-12:
        return None
    correlation = float(np.corrcoef(x, y)[0, 1])
    rng, larger = np.random.default_rng(seed), 0
    for _ in range(shuffles):
        order = rng.permutation(len(of))
        other = np.corrcoef(x, off_diagonal(of[np.ix_(order, order)]))[0, 1]
        larger += other**2 >= correlation**2
    slope = correlation * y.std() / x.std()
    return Regression(float(slope), correlation**2, correlation, float((larger + 1) / (shuffles + 1)))


@dataclasses.dataclass(frozen=True)
class Matching:
    """Two experts with the neurons of one in the order that fits those of the other best.

    ``before`` and ``after`` are mean cosines of neurons; ``tau`` is Kendall's tau of that order and the natural one: 1
    if neurons were in order.
    """

    first: int
    second: int
    before: float
    after: float
    tau: float


def match_neurons(first: int, second: int, a: Float[np.ndarray, "f q"], b: Float[np.ndarray, "f q"]) -> Matching:
    """Matches the neurons of two experts, each given by all of its weights, with the Hungarian method."""
    both = cosines(np.concatenate([a, b]))[: len(a), len(a) :]
    rows, order = linear_sum_assignment(-both)
    tau = float(kendalltau(rows, order).statistic)
    return Matching(first, second, float(np.mean(np.diag(both))), float(np.mean(both[rows, order])), tau)


@dataclasses.dataclass(frozen=True)
class Static:
    """The parameters of a sample of the experts of a block.

    Attributes:
        block: the block.
        experts: the sample, of those that were used.
        similar: cosines of flattened matrices by name, and of their means over neurons as "<name>, mean neuron".
        keys: cosines of router rows; None if unknown.
        regressions: of router rows on each of ``similar``.
        matchings: of at most the first ``MATCHED_NEURONS`` neurons, for experts with several neurons.
        components: the first two principal components of the neurons, [points, 2], and the expert of each point.
    """

    block: int
    experts: Int[np.ndarray, " m"]
    similar: dict[str, Float[np.ndarray, "m m"]]
    keys: Float[np.ndarray, "m m"] | None
    regressions: dict[str, Regression]
    matchings: list[Matching]
    components: tuple[Float[np.ndarray, "p 2"], Int[np.ndarray, " p"]] | None


def static(layer: FeedForward, trace: Trace, *, seed: int, size: int = SAMPLE) -> Static:
    """Compares the parameters of at most ``size`` random experts, of those that the text has used."""
    rng = np.random.default_rng(seed)
    experts = np.sort(rng.permutation(np.flatnonzero(trace.counts()))[:size])
    if not len(experts):
        return Static(trace.block, experts, {}, None, {}, [], None)
    matrices = Matrices(layer, experts)
    similar = {name: normalised(products) for name, products in matrices.products().items()}
    found = layer.expert_keys(jnp.asarray(experts, jnp.int32))
    keys = None if found is None else cosines(_plain(found))
    regressions = {}
    for name in {} if keys is None else similar:
        if (one := regress(similar[name], keys, seed=seed)) is not None:
            regressions[name] = one
    points = _principal(matrices, rng) if matrices.num_neurons else None
    return Static(trace.block, experts, similar, keys, regressions, _matchings(matrices), points)


def _matchings(matrices: Matrices) -> list[Matching]:
    """The first experts of a sample matched with one another, if they have several neurons."""
    if (f := min(matrices.num_neurons, MATCHED_NEURONS)) < 2:
        return []
    experts = matrices.experts[:MATCHED]
    places, numbers = np.repeat(np.arange(len(experts)), f), np.tile(np.arange(f), len(experts))
    neurons = matrices.neurons(places, numbers).reshape(len(experts), f, -1)
    pairs = zip(*np.triu_indices(len(experts), 1), strict=True)
    return [match_neurons(int(experts[a]), int(experts[b]), neurons[a], neurons[b]) for a, b in pairs]


def _principal(matrices: Matrices, rng: np.random.Generator):
    """The first two principal components of at most ``COMPONENTS`` random neurons, and their experts."""
    f = matrices.num_neurons
    chosen = np.sort(rng.permutation(len(matrices.experts) * f)[:COMPONENTS])
    centred = matrices.neurons(chosen // f, chosen % f).astype(np.float64)
    centred -= centred.mean(axis=0)
    if min(centred.shape) < 2:
        return None
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    # A direction has no sign of its own: its largest part is made positive.
    signs = np.sign(directions[np.arange(2), np.abs(directions[:2]).argmax(axis=1)])
    return centred @ (directions[:2] * signs[:, None]).T, matrices.experts[chosen // f]


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """What experts put out on real text.

    Attributes:
        block: the block.
        tokens: tokens of the sample.
        chosen, others: mean cosine of outputs, for the same token, of experts that it uses, and of random experts that
            any token uses; None if there are no two.
        larger: the share of (token, used expert, random other expert) in which the used one has the larger norm.
        larger_error: its standard error over tokens.
        rank_correlation: Spearman's correlation, within a head, of weight and output norm, as a mean; None if heads use
            one expert each.
        rank_error: its standard error over tokens and heads.
        ranks: how often the expert with the i-th largest weight of a head has the j-th largest norm, [k, k].
        norms, other_norms: norms of the outputs of used experts and of random others.
    """

    block: int
    tokens: int
    chosen: float | None
    others: float | None
    larger: float | None
    larger_error: float
    rank_correlation: float | None
    rank_error: float
    ranks: Int[np.ndarray, "k k"] | None
    norms: Float[np.ndarray, " n"]
    other_norms: Float[np.ndarray, " o"]


def outputs(layer: FeedForward, x: Float[np.ndarray, "S d"], experts: Int[np.ndarray, "S r"]) -> np.ndarray | None:
    """What each of these experts adds to the output of each token if its weight is 1, [S, r, d].

    None if the layer can't say. What the layer puts out without any of them, as a shared expert does, is left out.
    """
    found = _outputs(*nnx.split(layer), jnp.asarray(x), jnp.asarray(experts, jnp.int32))
    return None if found is None else _plain(found)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(
    graph: nnx.GraphDef, state: nnx.State, x: Float[Array, "S d"], experts: Int[Array, "S r"]
) -> Float[Array, "S r d"] | None:
    tiled = jnp.broadcast_to(x[:, None], (*experts.shape, x.shape[-1]))
    indices = experts[..., None, None]
    layer = nnx.merge(graph, state)
    each = layer.mix(tiled, Routing(indices, jnp.ones(indices.shape)))
    if each is None:
        return None
    nothing = Routing(jnp.zeros((len(x), 1, 1), jnp.int32), jnp.zeros((len(x), 1, 1)))
    return each - layer.mix(x, nothing)[:, None]


def dynamic(layer: FeedForward, trace: Trace, *, seed: int) -> Dynamic | None:
    """Compares outputs of experts at the sampled tokens; None if the layer can't compute them by themselves."""
    rng = np.random.default_rng(seed)
    used = np.flatnonzero(trace.counts())
    indices, gates = trace.indices[trace.sample], trace.gates[trace.sample]
    able = np.flatnonzero((gates > 0).any(axis=(1, 2)))
    if not len(able) or len(used) < 2:
        return None
    indices, gates, x = indices[able], gates[able], trace.vectors[able]
    chosen, weights = _strongest(indices, gates, max(1, NORM_EXPERTS // gates.shape[1]))
    s, h, k = chosen.shape
    flat, is_used = chosen.reshape(s, -1), (weights > 0).reshape(s, -1)
    others = used[rng.integers(len(used), size=flat.shape)]
    own = outputs(layer, x, flat)
    if own is None:
        return None
    of_others = outputs(layer, x, others)
    norms, other_norms = np.linalg.norm(own, axis=-1), np.linalg.norm(of_others, axis=-1)
    counted = is_used & ~_among(others, flat, is_used)
    per_token = _means(np.where(norms == other_norms, 0.5, norms > other_norms), counted)
    rows = weights.reshape(-1, k), norms.reshape(-1, k)
    correlations = np.array([one for one in map(_rank, *rows) if one is not None])
    few = slice(OUTPUT_TOKENS)
    return Dynamic(
        trace.block,
        s,
        _mean_cosine(own[few], flat[few], is_used[few], rng),
        _mean_cosine(of_others[few], others[few], np.ones_like(is_used[few]), rng),
        float(per_token.mean()) if len(per_token) else None,
        _error(per_token),
        float(correlations.mean()) if len(correlations) else None,
        _error(correlations),
        _rank_counts(*rows) if k > 1 else None,
        norms[is_used],
        other_norms[counted],
    )


def _strongest(indices: np.ndarray, gates: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each head with the largest weights, largest first, and these weights."""
    order = np.argsort(-gates, axis=-1, kind="stable")[..., :most]
    return np.take_along_axis(indices, order, -1), np.take_along_axis(gates, order, -1)


def _among(candidates: np.ndarray, experts: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Whether a token uses each of its candidates."""
    return ((candidates[:, :, None] == experts[:, None, :]) & used[:, None, :]).any(-1)


def _means(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The mean of the counted values of each row that has some."""
    some = counted.any(axis=1)
    return (values * counted)[some].sum(axis=1) / counted[some].sum(axis=1)


def _rank(weights: np.ndarray, norms: np.ndarray) -> float | None:
    """Spearman's correlation of the weights above zero and the norms; None if one of them does not vary."""
    weights, norms = weights[weights > 0], norms[weights > 0]
    if len(weights) < 2 or np.ptp(weights) == 0 or np.ptp(norms) == 0:
        return None
    return float(np.corrcoef(rankdata(weights), rankdata(norms))[0, 1])


def _rank_counts(weights: np.ndarray, norms: np.ndarray) -> Int[np.ndarray, "k k"]:
    """How often the i-th largest weight has the j-th largest norm, over rows whose weights are all above zero."""
    whole = (weights > 0).all(axis=1)
    k = weights.shape[1]
    by_weight, by_norm = (np.argsort(np.argsort(-a[whole], axis=1, kind="stable"), axis=1) for a in (weights, norms))
    return np.bincount((by_weight * k + by_norm).ravel(), minlength=k * k).reshape(k, k)


def _mean_cosine(
    of: Float[np.ndarray, "S r d"], experts: Int[np.ndarray, "S r"], counted: np.ndarray, rng: np.random.Generator
) -> float | None:
    """The mean cosine of the outputs of different experts for the same token; None if no token has two of them.

    Takes at most ``OUTPUT_EXPERTS`` random experts of a token.
    """
    found = []
    for one, numbers, kept in zip(of, experts, counted, strict=True):
        first = np.unique(np.where(kept, numbers, -1), return_index=True)
        places = first[1][first[0] >= 0]
        found.append(off_diagonal(cosines(one[rng.permutation(places)[:OUTPUT_EXPERTS]])))
    found = np.concatenate(found)
    return float(found.mean()) if len(found) else None


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")


def _plain(array: object) -> np.ndarray:
    return np.asarray(jnp.asarray(array).astype(jnp.float32))
