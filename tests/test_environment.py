"""Environments that JAX or XLA can't start with, each one sentence; a process each, at the same time."""

import subprocess
import sys

import pytest
from small_runs import ROOT, environment

BAD = {
    "JAX_PLATFORMS=foo": "foo",
    "JAX_PLATFORMS=cuda": "can't start",
    "JAX_NUM_CPU_DEVICES=abc": "abc",
    "JAX_NUM_CPU_DEVICES=0": "can't start",
    "JAX_ENABLE_X64=maybe": "maybe",
    "XLA_FLAGS=--nonsense": "Unknown flag",
    "XLA_FLAGS=no_such_file": "no_such_file",
    "XLA_FLAGS=--xla_force_host_platform_device_count=abc": "abc",
    "PEER_JAX_CACHE=~no_such_user/x": "no_such_user",
}


@pytest.fixture(scope="module")
def outcomes():
    """Status, standard output and error of `peer-jax generate` by environment."""
    command = [sys.executable, "-m", "peer_jax", "generate", "--workdir", "no_such_run"]
    started = {
        setting: subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**dict([setting.split("=", 1)])),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for setting in BAD
    }
    return {setting: (process.communicate(timeout=200), process.returncode) for setting, process in started.items()}


@pytest.mark.parametrize("setting", BAD)
def test_an_environment_is_refused(outcomes, setting):
    (printed, errors), status = outcomes[setting]
    assert (status, printed) == (2, ""), errors
    assert errors.startswith("peer-jax: ")
    assert errors.count("\n") == 1
    assert setting.split("=")[0] in errors
    assert BAD[setting] in errors
