"""What every feed-forward layer has in common."""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from peer_jax.errors import InputError
from peer_jax.fields import IDENTITY, arguments_of, kind_of
from peer_jax.ops.floor import Floor
from peer_jax.ops.traffic import Collectives
from peer_jax.sharding import EXPERT, RULES

T = TypeVar("T", bound=type)


def by_position(named_tuple: T) -> T:
    """Has JAX name the parts of a named tuple by their positions, as in any tuple: ``nnx.tabulate`` needs this."""
    jax.tree_util.register_pytree_with_keys(
        named_tuple,
        lambda parts: ([(jax.tree_util.SequenceKey(place), part) for place, part in enumerate(parts)], None),
        lambda _, parts: named_tuple(*parts),
        lambda parts: (tuple(parts), None),
    )
    return named_tuple


@by_position
class Aux(NamedTuple):
    """What a layer returns beside its output.

    ``loss`` is added to the training loss as it is; ``metrics`` are scalars to log.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


@by_position
class Routing(NamedTuple):
    """The experts of each token and their weights. An expert whose weight is zero is not used."""

    indices: Int[Array, "*tokens h k"]
    gates: Float[Array, "*tokens h k"]


class Table(nnx.Param):
    """A parameter whose rows are retrieved, [N, d]; the optimiser treats it apart from the backbone."""


# Logical axes of a table, by which ``peer_jax.sharding`` places it.
TABLE_AXES = ("rows", "columns")


class Benchmark(NamedTuple):
    """How ``peer-jax bench layer`` measures the layers of a class.

    Attributes:
        by_default: whether the class is measured when no layer is named.
        ignored: sizes that the constructor takes and the time doesn't depend on.
        num_experts: numbers of experts to measure when none is given; those of a fine-grained layer where empty.
    """

    by_default: bool = True
    ignored: tuple[str, ...] = ()
    num_experts: tuple[int, ...] = ()


class DeviceLoad(NamedTuple):
    """The work that one device of a mesh has in a micro-batch.

    Attributes:
        tokens: t, tokens of the device.
        seq_len: tokens per sequence.
        expert: E, devices along ``expert``.
        copies: D, devices that hold the same part of a table, data * fsdp.
        tables: whether tables are split by "rows" or by "columns".
        size: bytes of an element of the computation.
        remat: whether the backward pass computes the layer's forward pass again.
        touched: in layers that define ``rows_touched``, the share of the rows that the tokens of all devices could
            touch for which there is room; None: the step works on whole tables.
    """

    tokens: int
    seq_len: int
    expert: int
    copies: int
    tables: str
    size: int
    remat: bool
    touched: float | None = None


class FeedForward(nnx.Module):
    """A layer that takes a transformer's feed-forward slot.

    A subclass defines ``__init__(d_model, *, dtype, param_dtype, rngs)``, with what other arguments it likes,
    ``__call__`` and ``flops_per_token``. Everything else has a default; where the default is "unknown", plans and
    benchmarks say so.

    Modules start in training mode; ``.eval()`` and ``.train()`` switch.

    Attributes:
        is_causal: False if the output of a token can depend on later tokens.
        mixes_tokens: True if, at evaluation, the output of a token depends on other tokens at all. Such a layer can't
            generate token by token with a cache.
        needs_whole_batch: the part that, in training, takes statistics over the whole batch, which micro-batches don't
            have, and the way to do without it, both in words; None if no part does.
        is_baseline: True for the layer that others are compared with by default, the plain dense one.
        num_experts: number of experts; a layer that routes must set it.
        variant: a word for the most important option, which labels show without the option's name.
        variant_option: the name of that option.
        benchmark: how the class is benchmarked.
    """

    is_causal: bool = True
    mixes_tokens: bool = False
    needs_whole_batch: tuple[str, str] | None = None
    is_baseline: bool = False
    num_experts: int | None = None
    variant: str | None = None
    variant_option: ClassVar[str | None] = None
    benchmark: ClassVar[Benchmark] = Benchmark()

    @property
    def name(self) -> str:
        """The name of the layer's class."""
        return type(self).__name__

    @property
    def label(self) -> str:
        """What reports call a model with this layer: its name, variant, and options that differ from the defaults."""
        told = [] if self.variant is None else [self.variant]
        options = {name: value for name, value in self.options().items() if name != self.variant_option}
        told += [f"{name}={value!r}" for name, value in sorted(options.items())]
        return f"{self.name} ({', '.join(told)})" if told else self.name

    def options(self) -> dict[str, object]:
        """Options of the constructor that differ from their defaults, by name.

        An option is an argument whose default is a string, a number, a bool or None, and whose value the layer keeps
        as an attribute of the same name. Types, initialisers and arguments annotated ``Placed`` or ``Bookkeeping`` are
        not options. A layer that keeps an option in another form overrides this method.
        """
        found = {}
        for name, argument in arguments_of(type(self)).items():
            if kind_of(argument.annotation) is IDENTITY and not name.endswith("dtype") and _is_plain(argument.default):
                value = getattr(self, name, argument.default)
                if _is_plain(value) and value != argument.default:
                    found[name] = value
        return found

    @property
    def routes(self) -> bool:
        """Whether the layer routes tokens to experts, and so has ``route`` and ``num_experts``."""
        return type(self).route is not FeedForward.route

    def __call__(self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None) -> tuple[Array, Aux]:
        """Output and auxiliary loss. ``mask`` is True for real tokens.

        What the others hold, even NaN, reaches neither the outputs of real tokens nor statistics, losses or gradients.
        """
        raise NotImplementedError

    def route(self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None) -> Routing:
        """The experts of each token, without side effects; only of a layer that routes."""
        raise InputError(f"{self.name} does not route tokens to experts, so it has no route")

    def mix(self, x: Float[Array, "*tokens d"], routing: Routing) -> Float[Array, "*tokens d"] | None:
        """The output of the layer if tokens get these experts with these weights, instead of those of ``route``.

        Each token is computed on its own, so x may have any leading axes. Analyses change the routing by this method;
        None, the default, means that they can't.
        """
        return None

    def expert_keys(self, experts: Int[Array, " m"]) -> Float[Array, "m q"] | None:
        """What the router compares a token with to choose each of these experts; None if unknown."""
        return None

    def expert_matrices(self, experts: Int[Array, " m"]) -> dict[str, Float[Array, "m neurons d"]]:
        """The parameters of these experts by name, with a row for each of an expert's neurons; empty if unknown."""
        return {}

    def expert_outputs(self, experts: Int[Array, " m"]) -> Float[Array, "m d"] | None:
        """The direction of each of these experts' output, if it is the same for all tokens; None if not or unknown."""
        return None

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs per token in a sequence of ``seq_len`` tokens; a multiply-add counts 2.

        Raises:
            InputError: if the class doesn't define it.
        """
        raise InputError(
            f"{self.name} can't be compared by FLOPs: define flops_per_token(self, seq_len), the forward FLOPs per "
            "token, in that class"
        )

    def num_params(self) -> int:
        """All parameters of the layer."""
        return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def num_active_params(self) -> int:
        """The parameters that one token uses."""
        return self.num_params()

    def tables(self) -> dict[str, Table]:
        """Its tables by name: the attributes that are a ``Table``."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Table)}

    def share_with(self, first: "FeedForward") -> None:
        """Takes the tables of another layer in the place of its own: both then read, and train, the same rows.

        Everything else, such as the sub-keys by which rows are found, stays its own.

        Raises:
            InputError: if the layer has no tables, or the other has none of the same names and shapes.
        """
        if not (own := self.tables()):
            raise InputError(f"{self.name} has no tables for blocks to share: set Transformer.share_tables to False")
        shared = first.tables()
        for name, table in own.items():
            if name not in shared or shared[name].shape != table.shape:
                raise InputError(
                    f"{self.name} can't share its table {name!r} of the shape {list(table.shape)} with a layer without "
                    "such a table: make all sparse blocks alike, or set Transformer.share_tables to False"
                )
            setattr(self, name, shared[name])

    def rows_touched(self, tokens: int) -> int | None:
        """The most rows of each of its tables that ``tokens`` tokens retrieve.

        A layer that defines it reads its tables, which have the axes ``TABLE_AXES``, through
        ``peer_jax.layers.touched.retrieved``. None, the default, means that it reads whole tables: their gradients and
        updates are those of all rows.
        """
        return None

    def grow(self, smaller: "FeedForward") -> None:
        """Takes over all that a layer has learned which differs in nothing but a smaller ``num_experts``.

        The output is to be nearly that of the smaller layer: its experts keep their keys and their order, and new ones
        begin without an output.

        Raises:
            InputError: if the class doesn't define it.
        """
        raise InputError(
            f"{self.name} can't go on with more experts than the {smaller.num_experts} that it was trained with: leave "
            "num_experts as it was, or define grow(self, smaller) in that class"
        )

    def were_there(self, experts: Int[Array, "..."], num_experts: int) -> Bool[Array, "..."]:
        """Whether experts, given by their numbers, were there when the pool had ``num_experts``, before it grew.

        The experts of a pool that grows keep their order. By default, new ones come after them.
        """
        return experts < num_experts

    def exchanged(self, load: DeviceLoad) -> Collectives | None:
        """What a micro-batch exchanges, forward and backward, for parameters that are split over ``expert``.

        None means that it is unknown, as it is by default if the layer has such parameters. The gradients and gathered
        kernels of all other parameters are counted outside of the layer.
        """
        split = {axis for rules in RULES.values() for axis, over in rules.items() if over == EXPERT}
        axes = {axis for _, p in nnx.to_flat_state(nnx.state(self, nnx.Param)) for axis in p.get_metadata("axes", ())}
        return None if axes & split and load.expert * load.copies > 1 else Collectives()

    def floor(self, tokens: int, order: str, *, backward: bool, size: int, weight_size: int) -> Floor | None:
        """The least bytes and FLOPs of a forward pass, or of a forward and a backward pass; None if unknown.

        Args:
            tokens: tokens of a call.
            order: "token" or "expert", see ``peer_jax.ops.floor``.
            backward: include the backward pass.
            size: bytes of an element of the computation.
            weight_size: bytes of an element of the parameters.
        """
        return None


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)  # a bool is an int


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
GATED_ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}
