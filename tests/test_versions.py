"""Versions of jaxlib that a run is warned of, once, and the versions that are installed instead."""

import importlib.metadata
import logging

import jax
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from test_dependencies import CONSTRAINTS, PROJECT, requirements

from peer_jax import startup, versions

FAULTY = ["0.10.2", "0.10.2.dev20260701", "0.11.0", "0.11.0rc1"]
SOUND = ["0.9.2", "0.10.1", "0.11.1", "0.12.0.1", "1.0.0"]


@pytest.mark.parametrize("version", FAULTY)
def test_faulty_versions_are_named_with_the_way_out(version):
    (sentence,) = versions.warnings(version, "gpu")
    assert sentence.startswith(f"jaxlib {version} compiles ")
    assert "openxla/xla#46225" in sentence
    assert sentence.count("install jax[cuda13]>=0.11.1") == 1
    assert versions.warnings(version, "cpu") == versions.warnings(version, "tpu") == []


@pytest.mark.parametrize("version", SOUND)
def test_sound_versions_are_not(version):
    assert versions.warnings(version, "gpu") == []


@pytest.mark.parametrize("fault", versions.FAULTS, ids=lambda fault: f"{fault.first} to {fault.last}")
def test_the_table_is_in_order_and_its_way_out_leads_out(fault):
    assert Version(fault.first) <= Version(fault.last)
    (named,) = (Requirement(word.rstrip(",")) for word in fault.way_out.split() if "=" in word)
    assert named.extras <= set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))
    assert not named.specifier.contains(fault.last)


def test_pinned_versions_are_sound_where_there_are_any():
    """Python 3.11 gets no JAX after 0.10.2."""
    pinned = {
        path.stem: next(str(r.specifier)[2:] for r in requirements(path) if r.name == "jaxlib") for path in CONSTRAINTS
    }
    assert {python: bool(versions.warnings(version, "gpu")) for python, version in pinned.items()} == {
        "python3.11": True,
        "python3.12": False,
        "python3.13": False,
    }


def test_extras_are_those_that_jax_has():
    provided = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    for name, extra in {"cuda": "cuda13", "tpu": "tpu"}.items():
        (requirement,) = map(Requirement, PROJECT["optional-dependencies"][name])
        assert (requirement.name, requirement.extras) == ("jax", {extra})
        assert extra in provided


@pytest.fixture
def said(monkeypatch, caplog):
    """A function that tells what has been logged, on a GPU with a faulty jaxlib."""
    monkeypatch.setattr(importlib.metadata, "version", {"jaxlib": "0.11.0"}.__getitem__)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    caplog.set_level(logging.WARNING)
    return lambda: caplog.messages


def test_a_command_says_it_once(said):
    startup.check_devices()
    assert said() == versions.warnings("0.11.0", "gpu")


def test_of_several_processes_the_first_says_it(said, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    startup.check_devices()
    assert said() == []


@pytest.mark.parametrize(("accelerators", "count"), [(["0"], 1), (["tpu"], 0), ([], 0)])
def test_a_sweep_says_it_for_its_workers(said, accelerators, count, monkeypatch):
    monkeypatch.setattr(startup, "accelerators", lambda: accelerators)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    startup.check_devices_of_workers()
    assert len(said()) == count
