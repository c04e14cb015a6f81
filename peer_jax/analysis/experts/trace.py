"""What was seen of the experts of a model on a text: one entry per token, padding left out.

T  tokens     h  heads     k  top-k     S  tokens whose vectors were kept     d  d_model     N  experts
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class Labels:
    """A label for each token, such as the task that it comes from.

    Attributes:
        kind: what the labels are, in words, such as "task".
        names: the names of the labels.
        of: the number of each token's label, or UNKNOWN.
        by_document: whether all tokens of a document have the same label.
    """

    kind: str
    names: tuple[str, ...]
    of: Int[np.ndarray, " T"]
    by_document: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of a text.

    Attributes:
        inputs: the token that the model reads.
        targets: the token that it is to predict.
        positions: the place of a token in its piece.
        pieces: the number of each token's piece, a document or the part of one that is in a row; ascending.
        documents: the number of each token's document; where its name isn't known, each piece counts as one.
        losses: the negative log-likelihood of each target, in nats.
        domains: labels of where the tokens come from.
    """

    inputs: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    positions: Int[np.ndarray, " T"]
    pieces: Int[np.ndarray, " T"]
    documents: Int[np.ndarray, " T"]
    losses: Float[np.ndarray, " T"]
    domains: tuple[Labels, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """The routing of one block.

    Attributes:
        block: the index of the block.
        num_experts: N.
        indices, gates: the experts of each token and their weights; an expert whose weight is zero is not used.
        sample: the tokens whose vectors were kept.
        vectors: the inputs of the layer at these tokens.
    """

    block: int
    num_experts: int
    indices: Int[np.ndarray, "T h k"]
    gates: Float[np.ndarray, "T h k"]
    sample: Int[np.ndarray, " S"]
    vectors: Float[np.ndarray, "S d"]

    def pairs(self) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], Float[np.ndarray, " P"]]:
        """Token, expert and weight of every use of an expert by a token."""
        used = self.gates > 0
        tokens = np.broadcast_to(np.arange(len(self.gates))[:, None, None], self.gates.shape)
        return tokens[used], self.indices[used], self.gates[used].astype(np.float64)

    def counts(self) -> Int[np.ndarray, " N"]:
        """How often each expert was used; twice for a token of which two heads retrieve it."""
        return np.bincount(self.indices[self.gates > 0], minlength=self.num_experts)

    def masses(self) -> Float[np.ndarray, " N"]:
        """The sum of each expert's weights."""
        return np.bincount(self.indices.ravel(), self.gates.ravel().astype(np.float64), minlength=self.num_experts)
