"""Finished runs as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from peer_jax.errors import InputError
from peer_jax.training.workdir import read_result

Results = Sequence[tuple[Path, dict[str, Any]]]


def find(directories: Sequence[Path]) -> Results:
    """The results below the directories, in the order of their paths.

    Raises:
        InputError: if a directory holds none.
    """
    found = []
    for directory in directories:
        paths = sorted(directory.rglob("result.json"))
        if not paths:
            raise InputError(f"{directory} holds no finished run (no result.json): give another directory")
        for path in paths:
            if (result := read_result(path.parent)) is None:
                raise InputError(f"{path} is not the result of a run of this version: remove it, or report others")
            found.append((path.parent, result))
    return found


def table(results: Results) -> None:
    """Prints a row a run: losses on its own task, training FLOPs, parameters, speed."""
    columns = ("method", "loss", "bits/byte", "perplexity", "FLOPs", "params", "active", "tokens/s", "run")
    shown = Table(title="Validation loss (nats per token) at the training FLOPs spent", box=SIMPLE_HEAD)
    for column in columns:
        shown.add_column(column, justify="left" if column in ("method", "run") else "right", overflow="fold")
    for directory, result in results:
        own = result["evaluations"][result["corpus"]["name"]]
        speed = result["tokens_per_second"]
        shown.add_row(
            result["method"] + ("" if result["is_causal"] else " *"),
            f"{own['loss']:.4f}",
            f"{own['bits_per_byte']:.4f}",
            f"{own['perplexity']:.3f}",
            f"{result['training_flops']:.3g}",
            _short(result["params_total"]),
            _short(result["params_active"]),
            "-" if speed is None else _short(speed),
            str(directory),
        )
    console = _console()
    console.print(shown)
    if not all(result["is_causal"] for _, result in results):
        console.print("* not causal: a token's output can depend on later tokens, which flatters its loss")


def _short(number: float) -> str:
    """12345 as 12.3k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def _console() -> Console:
    """As wide as the terminal; wide enough for a table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=max(120, console.width))


def evaluation_table(step: int, evaluations: dict[str, Any]) -> None:
    """Prints a row a task."""
    shown = Table(title=f"Validation loss (nats per token), step {step}", box=SIMPLE_HEAD)
    for heading in ("task", "loss", "bits/byte", "perplexity", "word perplexity", "usage", "unevenness"):
        shown.add_column(heading, justify="left" if heading == "task" else "right")
    for name, values in evaluations.items():
        experts = values.get("experts", {}).values()
        shown.add_row(
            name,
            f"{values['loss']:.4f}",
            f"{values['bits_per_byte']:.4f}",
            f"{values['perplexity']:.3f}",
            f"{values['word_perplexity']:.4g}",
            ", ".join(f"{block['usage']:.3f}" for block in experts) or "-",
            ", ".join(f"{block['unevenness']:.3f}" for block in experts) or "-",
        )
    _console().print(shown)
