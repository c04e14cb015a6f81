"""What the JSON files of runs and sweeps hold. Whoever has damaged one by hand is told the field.

Fields that earlier versions did not write have defaults. Fields that are not named here are kept and not checked.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peer_jax.errors import InputError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, lt=2**63)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Part = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FolderName = Annotated[str, Field(min_length=1, pattern=r"^[^/]+$")]


class Record(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(strict=True, extra="allow")


class Usage(Record):
    """How a block's experts are used."""

    usage: float
    unevenness: float


class Evaluation(Record):
    """Losses on a text or on images, which are not finite if the run diverged; only images have an accuracy."""

    loss: float
    accuracy: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    fingerprint: str | None = None
    experts: dict[str, Usage] = {}


class Corpus(Record):
    """The text or the images of a run."""

    name: str
    cache: str
    fingerprint: str | None = None


class Machine(Record):
    """What trained a run."""

    device: str


class Grown(Record):
    """What a run had spent when its pool of experts grew."""

    source: str
    num_experts: Size
    steps: Size
    tokens: Size
    training_flops: Amount


class Result(Record):
    """``result.json``; ``peer_jax.training`` writes it."""

    schema_: Literal[1] = Field(alias="schema")
    method: str
    layer: str | None = None
    options: dict[str, Any] | None = None
    is_baseline: bool | None = None
    is_causal: bool | None
    d_model: Size
    num_blocks: Size
    num_experts: Size | None
    grown: Grown | None = None
    params_total: Size
    params_active: Size
    forward_flops_per_token: Amount
    forward_flops_by_part: dict[str, Part]
    seed: Count
    steps: Size
    batch_size: Size
    seq_len: Size
    tokens: Size
    training_flops: Amount
    tokens_per_second: Part | None
    wall_seconds: Part
    epochs: Part | None = None
    corpus: Corpus
    config: dict[str, str] | None = None
    machine: Machine
    evaluations: dict[str, Evaluation]

    @model_validator(mode="after")
    def _has_its_own_evaluation(self) -> "Result":
        if self.corpus.name not in self.evaluations:
            raise ValueError(f"evaluations have none of the corpus {self.corpus.name!r}")
        return self


class Point(Record):
    """``point.json``, the place of a run in its sweep."""

    method: str = ""
    size: str = ""
    budget: Amount = 1.0
    seed: Count = 0
    settings: dict[str, Any] = {}


class Failure(Record):
    """``failure.json``."""

    reason: str
    details: str = ""
    time: float = 0.0


class SweepFields(Record):
    """Those fields of a sweep that reports read."""

    methods: dict[str, dict[str, Any]] | list[str] = []
    rate_exponents: dict[str, float] = {}
    rates_at: Size | None = None
    tuning: str = ""
    baseline: str | None = None


class KeptSweep(Record):
    """``sweep-<digest>.json``; earlier versions did not keep the names of the runs."""

    sweep: SweepFields
    runs: list[FolderName] | None


class Metrics(Record):
    """A line of ``metrics.jsonl``; its other fields are numbers, too."""

    __pydantic_extra__: dict[str, float] = Field(init=False)
    step: Count


def check(value: object, record: type[Record], path: object) -> dict[str, Any]:
    """The value, which must be such a record.

    Raises:
        InputError: if it is none, with the file's path and the field.
    """
    try:
        record.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))[:80]
        message = first["msg"].removeprefix("Value error, ")
        found = f", not {repr(first['input'])[:60]}" if field and first["type"] != "missing" else ""
        raise InputError(
            f"{path} is damaged{f' at {field}' if field else ''} ({message}{found}): mend it, or remove it"
        ) from error
    return value


def parse(text: str, record: type[Record], path: object) -> dict[str, Any]:
    """The record that a JSON text is.

    Raises:
        InputError: if it is none, with the file's path and the field.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged (it is no JSON: {str(error)[:80]}): mend it, or remove it") from error
    return check(value, record, path)
