"""What to train, as a value."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from flax import nnx

from peer_jax.data.pipeline import Task
from peer_jax.errors import InputError
from peer_jax.fields import Bookkeeping, Gives, Placed, RunConfig
from peer_jax.layers.checks import check_positive
from peer_jax.models import Model
from peer_jax.sharding import Sharding, current
from peer_jax.training.flops import MOST_STEPS, steps_for, training_flops
from peer_jax.training.optimizer import Optimizer
from peer_jax.training.step import Trainer

EVALUATION_TOKENS = 4096  # the least per batch of an evaluation, which would take long with small batches


class Grown(NamedTuple):
    """What a run had spent when it went on with a larger pool of experts; all zero for a run that has not grown.

    Attributes:
        source: the directory of the run that it has grown from.
        num_experts: the size of the pool until then.
        steps, tokens, training_flops: from the first step on, by all models that the run has had.
    """

    source: str = ""
    num_experts: int = 0
    steps: int = 0
    tokens: int = 0
    training_flops: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What to train, on what, for how long. One of ``steps`` and ``training_flops`` sets the length.

    Args:
        model: makes the model: ``Transformer`` of a text's ``vocab_size``, or ``ViT`` of ``image_shape``,
            ``patch_size`` and ``num_classes`` of images, which it is given by these names, and ``rngs``.
        optimizer: ``AdamW``, or any other ``Optimizer``.
        task: what to train on, a ``TextTask`` or an ``ImageTask``; its validation split is evaluated every
            ``evaluate_every`` steps and at the end.
        eval_tasks: further tasks, whose validation splits are evaluated when training has ended.
        batch_size: rows per step.
        steps: updates.
        training_flops: a budget; the run makes the number of steps that comes nearest to it.
        seed: of the parameters, and of the order of the data unless ``data_seed`` is given.
        data_seed: of the order of the data alone; None: ``seed``.
        grown_from: the directory of a run whose checkpoint this run goes on from, with a larger ``num_experts``
            (``peer_jax.training.growth``). Its steps and FLOPs count among those of this run.
        grown_at: the step of that checkpoint, or "last" or "best".
        frozen_experts: the ``num_experts`` of an earlier, smaller pool, whose experts don't change any more.
        accumulation: micro-batches that a step is split into.
        log_every, evaluate_every, checkpoint_every: steps between two of them; the last step is always evaluated and
            saved.
        keep_checkpoints: how many of the last checkpoints are kept, beside the best.
        checked: raise on indices out of range and on NaN scores inside the ops; slower, and on one device only.
        sharding: how many devices share what.

    Attributes:
        config: the config that the run was loaded from; None for a run that was made by hand or changed since.
    """

    model: Annotated[
        Callable[..., Model],
        Gives(
            vocab_size="TextTask.vocabulary",
            image_shape="ImageTask.image_size",
            patch_size="ImageTask.patch_size",
            num_classes="ImageTask.corpus",
            rngs="Run.seed",
        ),
    ]
    optimizer: Optimizer
    task: Task
    eval_tasks: Bookkeeping[Sequence[Task]] = ()
    batch_size: int
    steps: int | None = None
    training_flops: float | None = None
    seed: int = 0
    data_seed: int | None = None
    grown_from: str | None = None
    grown_at: int | str = "last"
    frozen_experts: int | None = None
    accumulation: Placed[int] = 1
    log_every: Bookkeeping[int] = 10
    evaluate_every: Bookkeeping[int] = 1000
    checkpoint_every: Bookkeeping[int] = 1000
    keep_checkpoints: Bookkeeping[int] = 2
    checked: Bookkeeping[bool] = False
    sharding: Placed[Sharding] = dataclasses.field(default_factory=Sharding)
    config: RunConfig | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = ("batch_size", "accumulation", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints")
        lengths = ("steps", "training_flops")
        check_positive(**{name: getattr(self, name) for name in sizes})
        check_positive(**{name: getattr(self, name) for name in lengths if getattr(self, name) is not None})
        if self.steps is not None and self.steps > MOST_STEPS:
            raise InputError(f"steps={self.steps} is more than {MOST_STEPS}, which is how far optimizers count")
        if self.steps is not None and self.training_flops is not None:
            raise InputError(f"steps={self.steps} and training_flops={self.training_flops}: give only one of them")
        for task in self.eval_tasks:
            task.check_fits(self.task, "the model")
        if self.grown_from is None and self.grown_at != "last":
            raise InputError(f"grown_at={self.grown_at!r} is a step of the run to grow from: give grown_from, too")
        for name, value in {"seed": self.seed, "data_seed": self.order_seed}.items():
            if type(value) is not int or not 0 <= value < 2**32:
                raise InputError(f"{name} is {value!r}; give a whole number from 0 to 2**32 - 1.")
        if self.batch_size % self.accumulation:
            raise InputError(f"batch_size={self.batch_size} does not divide into accumulation={self.accumulation}")

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def trainer(self) -> Trainer:
        """The functions of this run."""
        sizes = self.task.model_sizes()

        def build(*, rngs: nnx.Rngs) -> nnx.Module:
            return self.model(**sizes, rngs=rngs)

        return Trainer(build, self.optimizer, accumulation=self.accumulation, frozen_experts=self.frozen_experts)

    def eval_batch_size(self) -> int:
        """Rows per batch of an evaluation: as in training, but with at least ``EVALUATION_TOKENS`` tokens."""
        rows = max(self.batch_size, -(-EVALUATION_TOKENS // self.task.seq_len))
        return rows if current() is None else current().round_up(rows)

    def num_steps(self, model: Model, grown: Grown = Grown()) -> int:  # noqa: B008, it never changes
        """How many updates the run makes: ``steps``, or what ``training_flops`` pays for.

        Args:
            model: that of the run.
            grown: what it had spent before it grew.

        Raises:
            InputError: if neither is given, which is only needed to train; or if what is left is less than a step.
        """
        if self.steps is None and self.training_flops is None:
            raise InputError("steps=None and training_flops=None: give one of them, the length of the run")
        name = "training_flops" if self.steps is None else "steps"
        given, spent = getattr(self, name), getattr(grown, name)
        if given <= spent:
            raise InputError(
                f"{name}={given:.12g} is not more than the {spent:.12g} that {grown.source} had spent: raise it"
            )
        if self.steps is not None:
            return self.steps
        step = training_flops(model, self.batch_size * self.task.seq_len, self.task.seq_len) if spent else 0.0
        if given - spent < step:
            raise InputError(
                f"training_flops={given:.12g} leaves less than the {step:.3g} of a step after the {spent:.12g} that "
                f"{grown.source} had spent: raise it"
            )
        return grown.steps + steps_for(given - spent, model, self.batch_size, self.task.seq_len)
