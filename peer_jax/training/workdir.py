"""The run directory: ``config.gin``, ``result.json``, and what they must agree on."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import jax

from peer_jax.errors import InputError, InUse
from peer_jax.layers import Dense
from peer_jax.models import Transformer
from peer_jax.processes import leads

SCHEMA = 1
CONFIG = "config.gin"
RESULT = "result.json"
# What a run that goes on may have otherwise: the devices that it runs on.
MAY_CHANGE = "Sharding."


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[None]:
    """Makes the directory and keeps other runs from training in it at the same time; the first process does, for all.

    Raises:
        InputError: if it can't be made or written to, or another process has it.
    """
    if not leads():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise InUse(f"--workdir {workdir} is in use by another process: wait for it, or choose another") from None
    except OSError as error:
        raise InputError(f"--workdir {workdir} can't be written to ({error.strerror}): choose another") from error
    try:
        yield
    finally:
        lock.release()


def keep_config(workdir: Path, config: str) -> None:
    """Writes ``config.gin``, or finds the same one there.

    Raises:
        InputError: if the directory holds a run of another config.
    """
    path = workdir / CONFIG
    if not path.exists():
        write_whole(path, config)
        return
    before, now = (
        {name: value for name, value in _bindings(text).items() if not name.startswith(MAY_CHANGE)}
        for text in (path.read_text(), config)
    )
    if differing := sorted(name for name in before | now if before.get(name) != now.get(name)):
        name = differing[0]
        raise InputError(
            f"{workdir} holds a run with {name} = {before.get(name, 'unset')}, now it is {now.get(name, 'unset')}: "
            "use its config, or another --workdir"
        )


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
    return result if isinstance(result, dict) and result.get("schema") == SCHEMA else None


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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_whole(path: Path, text: str) -> None:
    """Writes a file, all of it or nothing, whoever else writes it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
