"""Finished runs as rows: what is known of a run, and which rows are of one run."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from peer_jax.storage import AnyPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run. A field whose value is not known is None.

    Attributes:
        method: the label that the sweep gives the method; without a sweep, the name that the layer gives itself.
        layer: the name of the layer.
        options: the options of the layer that differ from their defaults.
        is_baseline: whether the layer says that others are compared with it.
        baseline: the label of the method that the sweep names as its baseline.
        sweep: the directory of the sweep that the run belongs to, with the sweep's name if the directory has several;
            None if the run belongs to no sweep.
        budget: the training FLOPs that the run was given; ``training_flops`` is what it spent.
        settings: what the sweep varies beside method, size, budget and seed, and after ``isoflop.analyse`` also the
            arguments in which runs were found to differ.
        found: the names of those ``settings`` that no sweep varied.
        config: the arguments that decide the numbers of the run, as a config writes them.
        grown: the steps and FLOPs that the run had spent when its pool of experts grew; empty if it has not grown.
        text: the name of the text if several are analysed together; otherwise empty.
        is_causal: False if tokens see the later ones that they are to predict. True for images, of which no token is
            predicted.
        loss: nats per token, or per image, on the validation split of the run's own task.
        accuracy: the share of the images that were classified rightly; None for text.
        other_losses: losses on further tasks, by task.
        usage, unevenness: means over the blocks that route.
        machine: what trained the run: the device, and for CPUs the processor and the share of its cores.
        side_by_side: whether other runs may have used the same processor at the same time.
        table: the table that the row was read from; None if it was read from the run's own directory.
        copies: other directories that hold the same run.
    """

    run: str
    directory: AnyPath
    method: str
    layer: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_baseline: bool = False
    baseline: str | None = None
    sweep: str | None = None
    is_causal: bool
    size: str
    budget: float
    seed: int
    settings: dict[str, Any]
    found: tuple[str, ...] = ()
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    grown: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    loss: float
    accuracy: float | None = None
    perplexity: float | None
    bits_per_byte: float | None
    training_flops: float
    tokens: int
    steps: int
    epochs: float | None
    params_total: int
    params_active: int
    flops_per_token: float
    flops_by_part: dict[str, float]
    d_model: int
    num_blocks: int
    num_experts: int | None
    batch_size: int
    seq_len: int
    usage: float | None
    unevenness: float | None
    tokens_per_second: float | None
    wall_seconds: float
    corpus: str
    cache: str
    device: str
    machine: str | None = None
    side_by_side: bool | None = None
    other_losses: dict[str, float]
    table: AnyPath | None = dataclasses.field(default=None, compare=False)
    copies: tuple[AnyPath, ...] = ()

    @property
    def places(self) -> tuple[AnyPath, ...]:
        """The directories that hold the run."""
        return self.directory, *self.copies

    @property
    def folders(self) -> set[AnyPath]:
        """The folders that hold these directories: those of sweeps."""
        return {place.parent for place in self.places}

    @property
    def seconds(self) -> float | None:
        """The time of the training steps, without compilation and evaluation, at the mean speed of the run's steps.

        None where the speed is not known, and for a run whose pool has grown, since its first steps had another speed.
        """
        return self.tokens / self.tokens_per_second if self.tokens_per_second and not self.grown else None

    @property
    def unit(self) -> str:
        """What the loss is a mean over: a token, or an image."""
        return "token" if self.accuracy is None else "image"

    @property
    def order(self) -> tuple[int, str]:
        """What the order of the data depends on: the rows per batch, and the seed of the order."""
        own = self.config.get("Run.data_seed", "None")
        return self.batch_size, str(self.seed) if own == "None" else own

    @property
    def varied(self) -> dict[str, Any]:
        """The settings that the sweep varied."""
        return {name: value for name, value in self.settings.items() if name not in self.found}

    @property
    def series(self) -> str:
        """The name of the curve that the run is a point of: method, settings and text."""
        return self._named(self.settings)

    @property
    def family(self) -> str:
        """The series without the settings that the sweep varied."""
        return self._named({name: value for name, value in self.settings.items() if name in self.found})

    def _named(self, settings: Mapping[str, Any]) -> str:
        short = [name.split(".")[-1] for name in settings]
        # Two names with the same last part are written in full.
        names = [last if short.count(last) == 1 else name for name, last in zip(settings, short, strict=True)]
        values = [f"{name}={value}" for name, value in zip(names, settings.values(), strict=True)]
        return ", ".join([self.method, *values, *([f"on {self.text}"] if self.text else [])])


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sorts rows by budget, method, size, settings and seed."""
    return sorted(rows, key=lambda r: (r.budget, r.method, r.params_active, str(r.settings), r.seed, r.run))


def unit(rows: Iterable[Row]) -> str:
    """What the losses of the rows are means over."""
    return " or ".join(sorted({row.unit for row in rows}, reverse=True)) or "token"


def distinct(rows: Iterable[Row]) -> list[Row]:
    """One row per run, wherever it was read, and however often.

    Two rows are of one run if they agree in what decides a run's numbers (method, settings, size, seed, text, batches,
    steps, FLOPs, parameters, and the config where both have it) and in the loss, to the last digit. A run that was
    repeated with another loss stays. Rows of directories are kept before rows of tables, and rows with a config before
    rows without one. If two sweeps have the same run, it belongs to the ablations of both, so ``copies`` keeps where.
    """
    found: dict[tuple, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r.table is not None, not r.config)):
        same = found[_identity(row)]
        for number, kept in enumerate(same):
            if row.config == kept.config or not (row.config and kept.config):
                # A table tells where the runs were that it was made from, and these may be among the directories.
                if (row.table is None) == (kept.table is None):
                    copies = dict.fromkeys(place for place in (*kept.copies, *row.places) if place != kept.directory)
                    same[number] = dataclasses.replace(kept, copies=tuple(copies))
                break
        else:
            same.append(row)
    return [row for same in found.values() for row in same]


def _identity(row: Row) -> tuple:
    settings = tuple(sorted((name, str(value)) for name, value in row.settings.items()))
    spent = (row.batch_size, row.seq_len, row.steps, row.tokens, row.training_flops)
    model = (row.method, settings, row.size, row.params_total, row.params_active)
    return *model, row.seed, row.cache, *spent, str(row.loss)
