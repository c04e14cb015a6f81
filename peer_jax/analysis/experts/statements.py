"""The statements of "A Closer Look into Mixture-of-Experts" (arXiv:2406.18219), checked on a model's own numbers."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from peer_jax.analysis.experts.similarity import Dynamic, Static

SIGNIFICANT = 0.05
ERRORS = 4  # standard errors that a difference must have
NO_OUTPUTS = "no layer can compute the outputs of single experts, or none was used"


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement, "yes", "no", "partly" or "unknown", and the numbers that say so."""

    claim: str
    verdict: str
    numbers: str


def check(statics: Sequence[Static], dynamics: Sequence[Dynamic], num_blocks: int) -> list[Statement]:
    """Checks the statements on the blocks that were compared.

    Args:
        statics, dynamics: of the blocks that route, in their order; blocks that can't say are missing.
        num_blocks: of the model.
    """
    return [neurons_are_experts(statics), norms_follow_the_router(dynamics), *diversity(dynamics, num_blocks)]


def neurons_are_experts(statics: Sequence[Static]) -> Statement:
    """Statement 1, by the regression of router rows on experts: both choose, so they should know similar things."""
    claim = "1. Neurons act like fine-grained experts: experts whose router rows are similar have similar neurons"
    found = [(of.block, name, one) for of in statics for name, one in of.regressions.items()]
    if not found:
        return Statement(
            claim, "unknown", "no layer tells the matrices and router rows of used experts, or they do not vary"
        )
    holds = [one.correlation > 0 and one.chance < SIGNIFICANT for _, _, one in found]
    told = "; ".join(
        f"block {block}, {name}: r = {one.correlation:+.3f}, R² = {one.r_squared:.3f}, p = {one.chance:.3f}"
        for block, name, one in found
    )
    return Statement(claim, _all_or_none(holds), f"{told} (p: share of shuffled experts with as large an R²)")


def norms_follow_the_router(dynamics: Sequence[Dynamic]) -> Statement:
    """Statement 2, by the norms of used experts against others, and by weight against norm within a head."""
    claim = "2. The router selects experts with larger output norms"
    holds, told = [], []
    for of in dynamics:
        if of.larger is None:
            continue
        holds.append(of.larger - 0.5 > ERRORS * of.larger_error)
        words = (
            f"block {of.block}: larger than that of a random other expert in {of.larger:.1%} ± {of.larger_error:.1%}"
        )
        if of.rank_correlation is not None:
            holds.append(of.rank_correlation > ERRORS * of.rank_error)
            words += f", rank correlation of weight and norm {of.rank_correlation:+.3f} ± {of.rank_error:.3f}"
        told.append(words)
    if not holds:
        return Statement(claim, "unknown", NO_OUTPUTS)
    return Statement(claim, _all_or_none(holds), "; ".join(told))


def diversity(dynamics: Sequence[Dynamic], num_blocks: int) -> list[Statement]:
    """Statement 3 in its two parts, by the mean cosine of outputs of random experts for the same token."""
    claims = (
        "3a. Experts get more diverse with depth, but for the last layer",
        "3b. The last layer is an outlier: its experts are less diverse again",
    )
    found = [(of.block, of.others) for of in dynamics if of.others is not None]
    if not found:
        return [Statement(claim, "unknown", NO_OUTPUTS) for claim in claims]
    told = ", ".join(f"{cosine:+.4f} in block {block}" for block, cosine in found)
    told = f"mean cosine of two experts' outputs: {told}"
    inner = [(block, cosine) for block, cosine in found if block != num_blocks - 1]
    grows = "unknown"
    if len(inner) >= 3:
        rho = float(spearmanr(*zip(*inner, strict=True)).statistic)
        grows = "yes" if rho < -0.5 else "no"
        told += f"; rank correlation with depth {rho:+.2f} without the last block"
    last = "unknown"
    if found[-1][0] == num_blocks - 1 and len(inner) >= 2:
        last = "yes" if found[-1][1] > inner[-1][1] else "no"
    few = f"; {len(inner)} such blocks before the last are too few to say"
    return [
        Statement(claims[0], grows, told + (few if grows == "unknown" else "")),
        Statement(
            claims[1], last, told if last != "unknown" else f"{told}; the last block does not route, or is alone"
        ),
    ]


def _all_or_none(holds: Sequence[bool]) -> str:
    return "yes" if all(holds) else "partly" if any(holds) else "no"


def depth(dynamics: Sequence[Dynamic]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks, and the mean cosine of the outputs of random experts in each."""
    found = [(of.block, of.others) for of in dynamics if of.others is not None]
    return np.array([block for block, _ in found]), np.array([cosine for _, cosine in found])
