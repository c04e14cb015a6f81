"""What ``result.json`` says of a finished run: its model, the machine that trained it, further evaluations."""

import json
import logging
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from peer_jax.errors import InputError
from peer_jax.fields import RunConfig
from peer_jax.models import Model
from peer_jax.processes import leads
from peer_jax.run_directory import RESULT, SCHEMA, RunDirectory
from peer_jax.training.run import Grown

PACKAGES = ("peer-jax", "jax", "flax", "optax", "numpy")

logger = logging.getLogger(__name__)


def describe_model(model: Model, seq_len: int, grown: Grown) -> dict[str, Any]:
    """The part of a result that follows from the model: its method, sizes, parameters and forward FLOPs per token.

    A run that has grown is a method of its own, and ``grown`` says what it had spent by then.
    """
    layer = model.method
    return {
        "method": f"{layer.label}, grown from {grown.num_experts} experts" if grown.steps else layer.label,
        **({"grown": grown._asdict()} if grown.steps else {}),
        "layer": layer.name,
        "options": layer.options(),
        "is_baseline": not model.sparse_blocks and layer.is_baseline,
        "is_causal": model.is_causal,
        "d_model": model.d_model,
        "num_blocks": len(model.blocks),
        "num_experts": layer.num_experts,
        "params_total": model.num_params(),
        "params_active": model.num_active_params(),
        "forward_flops_per_token": model.flops_per_token(seq_len),
        "forward_flops_by_part": model.flops_by_part(seq_len),
    }


def machine() -> dict[str, Any]:
    """The devices and processes that JAX has, and the processor with the cores that this process may use."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "all_cores": os.cpu_count(),
    }


def _processor() -> str | None:
    """The name of the processor; None if the system does not tell it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that numbers may depend on; None for a package without one."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # peer-jax itself, when it is run from a checkout
        return None


def write(directory: RunDirectory, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``result.json``, in the first process for all, and returns in every process what a reader finds there."""
    result = {"machine": machine(), "versions": versions()} | dict(result)
    if leads():
        directory.write_result(result)
    return {"schema": SCHEMA} | json.loads(json.dumps(result, default=str))


def add_evaluations(
    directory: RunDirectory, step: int, evaluations: Mapping[str, Any], config: RunConfig | None
) -> None:
    """Adds evaluations to the result of a finished run, or logs a warning that says why it does not.

    An evaluation is added only if it is of the last step and of the unchanged model, and it never replaces an
    evaluation of a different text: a run's loss always refers to its own text.

    Args:
        directory: of the run.
        step: the step of the checkpoint that was evaluated.
        evaluations: by the name of the text.
        config: with which the model was made; None: it is taken to be the run's.
    """
    try:
        kept = directory.read_config()
        found = None if kept is None or config is None else config.difference(kept, of_model=True)
        if found is not None:
            name, before, now = found
            _not_added(f"the run was trained with {name} = {before}, not {now}")
            return
        lock = directory.lock(timeout=60)
        try:
            _add(directory, step, evaluations)
        finally:
            lock.release()
    except InputError as error:  # the caller has what was measured, and can show it
        _not_added(error)


def _add(directory: RunDirectory, step: int, evaluations: Mapping[str, Any]) -> None:
    """``add_evaluations`` while the directory is locked."""
    result = directory.read_result()
    if result is None or step != result["steps"]:
        return
    there = {result["corpus"]["name"]: result["corpus"]} | result["evaluations"]
    added = {}
    for name, evaluation in evaluations.items():
        if there.get(name, {}).get("fingerprint") in (None, evaluation["fingerprint"]):
            added[name] = evaluation
        else:
            _not_added(f"it has an evaluation of another text named {name!r}; rename yours")
    if added:
        write(directory, result | {"evaluations": result["evaluations"] | added})


def _not_added(reason: object) -> None:
    logger.warning("not added to %s: %s", RESULT, reason)
