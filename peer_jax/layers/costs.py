"""What ``peer-jax plan`` asks a layer: its memory and its exchanges on one device of a mesh.

t  tokens of a device     E  devices along ``expert``     D  data * fsdp, devices that hold the same part of a table
"""

from typing import NamedTuple

from peer_jax.ops.traffic import Collectives

FLOAT = 4  # bytes of an element of float32


class DeviceLoad(NamedTuple):
    """The work that one device of a mesh has in a micro-batch.

    Attributes:
        tokens: t.
        seq_len: tokens per sequence.
        expert: E.
        copies: D.
        tables: whether tables are split by "rows" or by "columns".
        size: bytes of an element of the computation.
        budget: bytes that a chunk of gathered rows may hold, see ``peer_jax.ops.chunks``.
        remat: whether the backward pass computes the layer's forward pass again.
    """

    tokens: int
    seq_len: int
    expert: int
    copies: int
    tables: str
    size: int
    budget: int
    remat: bool


class LayerCosts(NamedTuple):
    """Bytes per device and micro-batch, parameters and dense gradients of parameters not counted.

    Attributes:
        kept: what the forward pass leaves for the backward pass. Elementwise functions are taken to be computed again.
        working: what the backward pass holds beside ``kept``, where that is most.
        rows_read: rows of tables that the forward and the backward pass read.
        exchanged: collectives of the forward and the backward pass; ``exchanged.copies`` are table gradients.
    """

    kept: float
    working: float
    rows_read: float = 0.0
    exchanged: Collectives = Collectives()
