"""The run directory: ``config.gin``, ``result.json``, and what they must agree on."""

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import jax

from peer_jax.errors import InputError, InUse
from peer_jax.layers import Dense
from peer_jax.models import Transformer
from peer_jax.processes import gather, leads, together

SCHEMA = 1
NEEDED = {"steps", "corpus", "evaluations"}
CONFIG = "config.gin"
RESULT = "result.json"
# What a run that goes on may have otherwise: the devices that it runs on.
MAY_CHANGE = ("Sharding.",)
# What does not make the model that is evaluated.
NOT_THE_MODEL = (
    *MAY_CHANGE,
    *("Run.", "AdamW.", "TextTask.", "python_stdlib.", "python_packages.", "local_files.", "tfds_corpus.", "prepared."),
)


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[None]:
    """Makes the directory and keeps other runs from training in it at the same time; the first process does, for all.

    Raises:
        InputError: if it can't be made or written to, if another run has it, or if not all processes see the same one.
    """
    with contextlib.ExitStack() as held:
        with together():
            if leads():
                held.callback(_lock(workdir).release)
        if jax.process_count() > 1:
            _check_shared(workdir)
        yield


def _lock(workdir: Path) -> filelock.BaseFileLock:
    """That of a directory, which is made."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise InUse(f"--workdir {workdir} is in use by another process: wait for it, or choose another") from None
    except OSError as error:
        raise InputError(f"--workdir {workdir} can't be written to ({error.strerror}): choose another") from error
    return lock


def _check_shared(workdir: Path) -> None:
    """An InputError, in all processes, unless each finds there what the first one has written."""
    mark = gather(str(time.time_ns()))[0]
    path = workdir / f".shared-{mark}"
    with together():
        if leads():
            try:
                path.touch()
            except OSError as error:
                raise InputError(f"--workdir {workdir} can't be written to ({error.strerror}): free space") from error
    try:
        with together():
            if not path.exists():
                raise InputError(
                    f"--workdir {workdir} of process {jax.process_index()} is not that of process 0: give all the same "
                    "one, on a file system that they share"
                )
    finally:
        if leads():
            path.unlink()


def check_same(config: str) -> None:
    """An InputError, in all processes, unless all have this config."""
    first, *others = gather(config)
    for process, other in enumerate(others, start=1):
        if (found := _differing(first, other)) is not None:
            name, of_first, of_other = found
            raise InputError(
                f"process {process} has {name} = {of_other}, process 0 has {of_first}: give all the same config"
            )


def keep_config(workdir: Path, config: str) -> None:
    """Writes ``config.gin``, or finds the same one there; the first process does, for all.

    Raises:
        InputError: if the directory holds a run of another config.
    """
    with together():
        if leads():
            _keep_config(workdir, config)


def _keep_config(workdir: Path, config: str) -> None:
    kept = _kept_config(workdir)
    if kept is None:
        write_whole(workdir / CONFIG, config)
    elif (found := _differing(kept, config, may_change=MAY_CHANGE)) is not None:
        name, before, now = found
        raise InputError(
            f"{workdir} holds a run with {name} = {before}, now it is {now}: use its config, or another --workdir"
        )


def _kept_config(workdir: Path) -> str | None:
    """The text of ``config.gin``, if there is one."""
    path = workdir / CONFIG
    try:
        return path.read_text() if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}): mend it, or choose another --workdir") from error


def _differing(before: str, now: str, *, may_change: tuple[str, ...] = ()) -> tuple[str, str, str] | None:
    """The first name that two configs bind otherwise, with its values in them."""
    a, b = _bindings(before), _bindings(now)
    for name in sorted(a | b):
        if a.get(name) != b.get(name) and not name.startswith(may_change):
            return name, a.get(name, "unset"), b.get(name, "unset")
    return None


def _bindings(config: str) -> dict[str, str]:
    """The bindings of a formatted config: a name and its value, which may go on over indented lines."""
    bindings, name = {}, None
    for line in config.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if not line.startswith(" "):
            name, _, line = (part.strip() for part in line.partition("="))
        bindings[name] = (bindings.get(name, "") + " " + line.strip().removesuffix("\\").strip()).strip()
    return bindings


def describe_model(model: Transformer, seq_len: int) -> dict[str, Any]:
    """What a result says of its model: method, sizes, parameters, forward FLOPs."""
    layers = [block.ffw for block in model.blocks]
    sparse = [layer for layer in layers if not isinstance(layer, Dense)]
    method = (sparse or layers)[0]
    return {
        "method": type(method).__name__ if method.variant is None else f"{type(method).__name__} ({method.variant})",
        "is_causal": model.is_causal,
        "d_model": model.d_model,
        "num_blocks": len(layers),
        "num_experts": getattr(method, "num_experts", None),
        "params_total": model.num_params(),
        "params_active": model.num_active_params(),
        "forward_flops_per_token": model.flops_per_token(seq_len),
        "forward_flops_by_part": model.flops_by_part(seq_len),
    }


def read_result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run; None if there is none, or only part of one."""
    try:
        result = json.loads((workdir / RESULT).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(result, dict) and result.get("schema") == SCHEMA and result.keys() >= NEEDED
    return result if whole else None


def write_result(workdir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Writes ``result.json``, all of it or nothing, with the machine and versions that made it; returns it.

    One process writes for all.
    """
    packages = ("peer-jax", "jax", "flax", "optax", "numpy")
    versions = {name: _version(name) for name in packages} | {"python": platform.python_version()}
    device = jax.devices()[0]
    machine = {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
    result = {"schema": SCHEMA, "machine": machine, "versions": versions} | result
    if leads():
        write_whole(workdir / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def add_evaluations(workdir: Path, step: int, evaluations: dict[str, Any], config: str | None) -> None:
    """Adds evaluations to the result of a finished run, or says why they are not added.

    Only those of the last step are, of the model as it was trained, and none in the place of one of another text: the
    loss of a run is that of its own text.
    """
    say = logging.getLogger(__name__).warning
    kept = _kept_config(workdir)
    if kept is not None and config is not None:
        found = _differing(kept, config, may_change=NOT_THE_MODEL)
        if found is not None:
            name, before, now = found
            say("not added to %s: the run was trained with %s = %s, not %s", RESULT, name, before, now)
            return
    try:
        with filelock.FileLock(workdir / ".lock", timeout=60):
            result = read_result(workdir)
            if result is None or step != result["steps"]:
                return
            there = {result["corpus"]["name"]: {"fingerprint": result["corpus"]["fingerprint"]}}
            for name, of_before in (result["evaluations"] | there).items():
                if name in evaluations and of_before.get("fingerprint") not in (None, evaluations[name]["fingerprint"]):
                    say("not added to %s: it has an evaluation of another text named %r; rename yours", RESULT, name)
                    evaluations = {other: of for other, of in evaluations.items() if other != name}
            if evaluations:
                write_result(workdir, result | {"evaluations": result["evaluations"] | evaluations})
    except (OSError, InputError) as error:  # the caller has what was measured, and can show it
        say("not added to %s: %s", RESULT, error)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_whole(path: Path, text: str) -> None:
    """Writes a file, all of it or nothing, whoever else writes it.

    Raises:
        InputError: if it can't be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path} can't be written ({error.strerror}): free space, or choose another place") from error
