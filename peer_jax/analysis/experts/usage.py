"""How evenly experts are used, which of them are retrieved together, and how much heads overlap.

T  tokens     h  heads     k  top-k     N  experts
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from peer_jax.analysis.experts.trace import Trace
from peer_jax.training.evaluate import usage as usage_of

# Pairs of experts of the same token that are counted at most; a sample of tokens keeps them so few.
MOST_PAIRS = 2**22
MOST_SLOTS = 256  # places of a token's experts that are counted at most, a sample of h * k
FEWEST_EXPECTED = 5  # occurrences by chance below which the lift of a single pair says nothing
MOST_SHOWN = 20


def summary(trace: Trace) -> dict[str, Any]:
    """Usage and unevenness as evaluations define them, dead experts, and how many experts the use amounts to.

    ``effective`` is exp of the entropy of the weight mass per expert: as many evenly used experts would be as uneven.
    ``half`` is the number of the most used experts that have half of the mass.
    """
    mass = trace.masses()
    found: dict[str, Any] = {"block": trace.block, "experts": trace.num_experts, "tokens": len(trace.gates)}
    if not mass.sum():
        return found | {"usage": 0.0, "unevenness": None, "dead": trace.num_experts, "effective": 0.0, "half": 0}
    found |= usage_of(mass)
    cumulative = np.cumsum(np.sort(mass)[::-1]) / mass.sum()
    return found | {
        "dead": int(np.count_nonzero(mass == 0)),
        "effective": float(trace.num_experts * np.exp(-found["unevenness"])),
        "half": int(np.searchsorted(cumulative, 0.5) + 1),
    }


def curve(trace: Trace, points: int = 200) -> tuple[Int[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Ranks of experts by their use, from 1, and the mass of the expert at that rank relative to an even share."""
    mass = np.sort(trace.masses())[::-1]
    ranks = np.unique(np.geomspace(1, trace.num_experts, points).round().astype(np.int64))
    return ranks, mass[ranks - 1] / max(mass.mean(), np.finfo(float).tiny)


@dataclasses.dataclass(frozen=True)
class Together:
    """Pairs of experts that a token uses both of.

    The lift of a pair is how many times as often it was found as if its experts were chosen independently.

    Attributes:
        tokens: tokens that were counted.
        slots: how many of the h * k places of a token's experts were counted.
        pairs: different pairs that were found.
        first, second, counts: the pairs that most tokens use.
        lift: of these pairs; NaN for a pair that chance would give fewer than ``FEWEST_EXPECTED`` times.
        excess: mean of the logarithm of the lift over all pairs found, weighted by their counts, in nats.
        chance: the same after each place's experts are shuffled over tokens. It is far above 0 if experts are many,
            because only pairs that occur have a lift.
    """

    tokens: int
    slots: int
    pairs: int
    first: Int[np.ndarray, " p"]
    second: Int[np.ndarray, " p"]
    counts: Int[np.ndarray, " p"]
    lift: Float[np.ndarray, " p"]
    excess: float
    chance: float

    @property
    def mean_lift(self) -> float | None:
        """The geometric mean of the lift over all pairs found, relative to that of chance; None if there are none."""
        return float(np.exp(self.excess - self.chance)) if self.pairs else None


def together(trace: Trace, *, seed: int, most: int = MOST_SHOWN) -> Together:
    """Counts, over a sample of the tokens, the pairs of experts that are used by the same token."""
    rng = np.random.default_rng(seed)
    slots = np.sort(rng.permutation(trace.gates[0].size)[:MOST_SLOTS])
    used = trace.gates.reshape(len(trace.gates), -1)[:, slots] > 0
    sizes = np.count_nonzero(used, axis=1)
    drawn = rng.permutation(np.flatnonzero(sizes))
    drawn = np.sort(drawn[: np.searchsorted(np.cumsum(sizes[drawn] * (sizes[drawn] - 1) // 2), MOST_PAIRS, "right")])
    indices = trace.indices.reshape(len(trace.indices), -1)[drawn[:, None], slots]
    used = used[drawn]
    pairs, counts, expected = _pairs(indices, used, trace.num_experts)
    order = rng.permuted(np.broadcast_to(np.arange(len(drawn))[:, None], indices.shape), axis=0)
    shuffled = _pairs(*(np.take_along_axis(array, order, axis=0) for array in (indices, used)), trace.num_experts)
    top = np.lexsort((pairs, -counts))[:most]
    lift = np.where(expected >= FEWEST_EXPECTED, counts / expected, np.nan)[top]
    shown = pairs[top] // trace.num_experts, pairs[top] % trace.num_experts, counts[top], lift
    return Together(len(drawn), len(slots), len(pairs), *shown, _excess(counts, expected), _excess(*shuffled[1:]))


def _pairs(
    indices: Int[np.ndarray, "t s"], used: Bool[np.ndarray, "t s"], num_experts: int
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """The pairs that occur, as first * N + second, the tokens that use them, and how many would by chance."""
    token = np.arange(len(indices), dtype=np.int64)[:, None]
    unique = np.unique((token * num_experts + indices)[used])  # an expert counts once for a token
    tokens, experts = unique // num_experts, unique % num_experts
    sizes = np.bincount(tokens, minlength=len(indices))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    keys = [np.zeros(0, np.int64)]
    for size in np.unique(sizes):  # tokens that use the same number of experts are counted at once
        of_token = experts[starts[np.flatnonzero(sizes == size)][:, None] + np.arange(size)]
        a, b = np.triu_indices(size, 1)
        keys.append((of_token[:, a] * num_experts + of_token[:, b]).ravel())
    pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
    often = np.bincount(experts, minlength=num_experts).astype(np.float64)
    return pairs, counts, often[pairs // num_experts] * often[pairs % num_experts] / max(1, len(indices))


def _excess(counts: Int[np.ndarray, " p"], expected: Float[np.ndarray, " p"]) -> float:
    return float(np.sum(counts * np.log(counts / expected)) / max(1, counts.sum()))


def overlap(trace: Trace, *, most: int = 2048, seed: int) -> dict[str, Any]:
    """How many experts two heads retrieve for the same token, over a sample of the tokens.

    ``heads`` [h, h] is the share of a head's experts that the other head retrieves too. ``chance`` [h, h] is the share
    that would be expected if both heads kept how often they retrieve each expert, but chose for different tokens.
    ``distinct`` is the number of different experts per token and ``used`` the number of uses, as means over tokens.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(trace.gates))[:most])
    indices, used = trace.indices[drawn], trace.gates[drawn] > 0
    h = indices.shape[1]
    shared, chance = np.ones((h, h)), np.ones((h, h))
    often = [np.bincount(indices[:, a][used[:, a]], minlength=trace.num_experts) for a in range(h)]
    for a in range(h):
        for b in range(h):
            if a == b:
                continue
            same = (indices[:, a, :, None] == indices[:, b, None, :]) & used[:, b, None, :]
            own = max(1, np.count_nonzero(used[:, a]))
            shared[a, b] = np.count_nonzero(same.any(-1) & used[:, a]) / own
            chance[a, b] = (often[a] @ often[b].astype(np.float64)) / own / max(1, len(drawn))
    token = np.arange(len(indices), dtype=np.int64)[:, None, None]
    distinct = np.unique((token * trace.num_experts + indices)[used])
    return {
        "tokens": len(drawn),
        "heads": shared,
        "chance": chance,
        "used": np.count_nonzero(used) / max(1, len(drawn)),
        "distinct": len(distinct) / max(1, len(drawn)),
    }
