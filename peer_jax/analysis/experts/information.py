"""What an expert tells about a token: mutual information, and how much of it chance would give.

The joint distribution is that of a random token with a label and of one of its experts, drawn in proportion to the
weights. With many experts and few tokens, mutual information is large even if experts and labels have nothing to do
with each other. So it is compared with that of shuffled labels.

T  tokens     P  uses of experts by tokens     E  experts that were used     C  labels
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from peer_jax.analysis.experts.trace import UNKNOWN, Labels, Trace

PERMUTATIONS = 8
# Joint distributions with at most so many entries are held whole, which is faster than sorting.
WHOLE = 2**23
# Fewer documents can't be shuffled in enough ways to say what chance is.
FEWEST_DOCUMENTS = 12


@dataclasses.dataclass(frozen=True)
class Uses:
    """Every use of an expert by a token that has a label: its probability, with experts numbered from 0 to E - 1.

    Attributes:
        experts: the numbers in the layer of experts 0 to E - 1.
        tokens, places, weights: of each use, the token, the number of the expert, and the probability.
    """

    experts: Int[np.ndarray, " E"]
    tokens: Int[np.ndarray, " P"]
    places: Int[np.ndarray, " P"]
    weights: Float[np.ndarray, " P"]

    @classmethod
    def of(cls, trace: Trace, counted: np.ndarray | None = None) -> "Uses":
        """The uses by ``counted`` tokens, by default all; every token that uses an expert counts the same."""
        tokens, experts, gates = trace.pairs()
        if counted is not None:
            kept = counted[tokens]
            tokens, experts, gates = tokens[kept], experts[kept], gates[kept]
        total = np.bincount(tokens, gates, minlength=len(trace.gates))
        is_used = np.bincount(experts, minlength=trace.num_experts) > 0
        number = np.cumsum(is_used) - 1
        weights = gates / total[tokens] / max(1, np.count_nonzero(total))
        return cls(np.flatnonzero(is_used), tokens, number[experts], weights)


@dataclasses.dataclass(frozen=True)
class Joint:
    """The entries above zero of the joint distribution of experts and labels, sorted by expert."""

    places: Int[np.ndarray, " J"]
    labels: Int[np.ndarray, " J"]
    weights: Float[np.ndarray, " J"]


def _sums(of: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"], size: int = 0) -> Float[np.ndarray, " numbers"]:
    """The sum of the weights of each number. NumPy's own sums are integers if there are no weights."""
    return np.bincount(of, weights, minlength=size).astype(np.float64)


def joint(uses: Uses, labels: Int[np.ndarray, " T"], num_labels: int) -> Joint:
    """The joint distribution of experts and labels, without an array of [tokens, experts]."""
    keys = uses.places.astype(np.int64) * num_labels + labels[uses.tokens]
    if len(uses.experts) * num_labels <= WHOLE:
        whole = _sums(keys, uses.weights, len(uses.experts) * num_labels)
        found = np.flatnonzero(whole)
        weights = whole[found]
    else:
        found, inverse = np.unique(keys, return_inverse=True)
        weights = _sums(inverse, uses.weights)
    return Joint(found // num_labels, found % num_labels, weights)


def mutual_information(of: Joint) -> float:
    """Mutual information of expert and label in nats."""
    return float(
        _sum_p_log_p(of.weights)
        - _sum_p_log_p(_sums(of.places, of.weights))
        - _sum_p_log_p(_sums(of.labels, of.weights))
    )


def _sum_p_log_p(p: Float[np.ndarray, " n"]) -> float:
    p = p[p > 0]
    return float(np.sum(p * np.log(p)))


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """How much experts tell about labels of one kind.

    Attributes:
        block, kind, labels: the block, the kind of the labels and their number.
        entropy: of the labels, in nats: the most that can be told.
        information: mutual information of expert and label, in nats.
        chance, spread: mean and standard deviation of the mutual information with shuffled labels.
        shuffled: what was shuffled, "tokens" or "documents".
        units: how many of these there are.
    """

    block: int
    kind: str
    labels: int
    entropy: float
    information: float
    chance: float
    spread: float
    shuffled: str
    units: int

    @property
    def share(self) -> float:
        """The share of the labels' entropy that experts tell beyond chance."""
        return (self.information - self.chance) / self.entropy if self.entropy > 0 else 0.0

    @property
    def verdict(self) -> str:
        """ "yes" if experts tell more than chance would, "no" if they don't, "unknown" if it can't be known."""
        if self.labels < 2 or (self.shuffled == "documents" and self.units < FEWEST_DOCUMENTS):
            return "unknown"
        return "yes" if self.information > self.chance + 4 * max(self.spread, 1e-12) else "no"

    @property
    def sentence(self) -> str:
        """The finding in one sentence."""
        if not self.labels:
            return f"No token uses an expert, so experts tell nothing about its {self.kind}."
        if self.labels < 2:
            return f"All of the text has one {self.kind}, so experts can't specialise by it."
        numbers = (
            f"{self.information:.3f} of {self.entropy:.3f} nats, and {self.chance:.3f} ± {self.spread:.3f} with "
            f"shuffled {self.shuffled}"
        )
        about = f"The expert of a token tells about its {self.kind}"
        if self.verdict == "unknown":
            return f"{about} {numbers}, but {self.units} documents are too few to say what chance would give."
        if self.verdict == "no":
            return f"{about} no more than chance would: {numbers}."
        return f"{about} {numbers}: {self.share:.1%} of what there is to tell, beyond chance."


def specialisation(
    trace: Trace,
    labels: Labels,
    documents: Int[np.ndarray, " T"],
    *,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> Specialisation:
    """The mutual information of expert and label, and that with labels shuffled over tokens.

    Labels that are the same throughout a document are shuffled over documents: its tokens are alike in more than the
    label, and experts that follow a document's topic would otherwise seem to follow the label.

    Args:
        trace: the routing of a block.
        labels: a label for each token; tokens whose label is unknown are left out.
        documents: the document of each token: all pieces of a file, if it is known, and not each by itself.
        seed: of the permutations.
        permutations: how often labels are shuffled.
    """
    rng = np.random.default_rng(seed)
    known = labels.of != UNKNOWN
    uses = Uses.of(trace, known)
    of, num_labels = np.where(known, labels.of, 0), len(labels.names)
    measured = joint(uses, of, num_labels)
    if labels.by_document:
        unit = np.unique(documents, return_inverse=True)[1]
        units = np.flatnonzero(np.bincount(unit[known], minlength=unit.max(initial=-1) + 1))
        label_of = np.zeros(unit.max(initial=-1) + 1, of.dtype)
        label_of[unit[known]] = of[known]
    else:
        unit, units, label_of = np.arange(len(of)), np.flatnonzero(known), of.copy()
    shuffled = []
    for _ in range(permutations):
        moved = label_of.copy()
        moved[units] = label_of[rng.permutation(units)]
        shuffled.append(mutual_information(joint(uses, moved[unit], num_labels)))
    by_label = _sums(measured.labels, measured.weights, num_labels)
    return Specialisation(
        trace.block,
        labels.kind,
        int(np.count_nonzero(by_label)),
        -_sum_p_log_p(by_label),
        mutual_information(measured),
        float(np.mean(shuffled)),
        float(np.std(shuffled, ddof=1)) if permutations > 1 else 0.0,
        "documents" if labels.by_document else "tokens",
        len(units),
    )


def specialists(trace: Trace, labels: Labels, *, least: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """The experts that were used at least ``least`` times, most specialised first, and their specialisation in nats.

    That is KL(labels of its tokens || labels of all tokens), less what as many random tokens would give to first order,
    (C' - 1) / 2n for n uses and the C' labels that the expert has met.
    """
    known = labels.of != UNKNOWN
    uses = Uses.of(trace, known)
    of = joint(uses, np.where(known, labels.of, 0), len(labels.names))
    mass = _sums(of.places, of.weights)
    prior = _sums(of.labels, of.weights)
    given = of.weights / mass[of.places]
    divergence = _sums(of.places, given * np.log(given / prior[of.labels]))
    met, uses_of = np.bincount(of.places), np.bincount(uses.places)
    divergence -= (met - 1) / (2 * uses_of)
    able = np.flatnonzero(uses_of >= least)
    order = able[np.argsort(-divergence[able], kind="stable")]
    return uses.experts[order], divergence[order]
