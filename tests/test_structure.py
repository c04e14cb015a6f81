"""Imports point one way: ops <- layers <- models <- training <- sweeps, analysis, planning, bench <- config, cli."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import environment

from peer_jax.layers import families

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peer_jax"
LEAVES = {
    "errors",
    "fields",
    "gin_syntax",
    "lease",
    "run_directory",
    "startup",
    "sharding",
    "processes",
    "supervisor",
    "cluster",
    "digests",
    "memory",
    "storage",
}
MAY_IMPORT = {
    **{"errors": set(), "fields": set(), "startup": {"errors", "storage", "versions"}, "gin_syntax": {"errors"}},
    **{"records": {"errors"}, "run_directory": {"errors", "records", "lease", "storage"}},
    **{
        "versions": set(),
        "memory": {"errors"},
        "storage": {"errors"},
        "region": {"storage"},
        "lease": {"errors", "storage"},
    },
    **{"sharding": {"errors", "fields"}, "processes": {"errors", "cluster", "supervisor"}},
    **{"supervisor": {"errors", "cluster", "startup"}, "cluster": {"errors"}, "digests": {"storage"}},
    "ops": {"errors", "sharding"},
    "layers": {"errors", "memory", "fields", "sharding", "ops"},
    "models": {"errors", "memory", "fields", "sharding", "ops", "layers"},
    "data": {"errors", "fields", "startup", "storage", "digests"},
    "training": {
        "lease",
        "errors",
        "fields",
        "memory",
        "run_directory",
        "storage",
        "startup",
        "digests",
        "sharding",
        "processes",
        "ops",
        "layers",
        "models",
        "data",
    },
    "analysis": {"errors", "run_directory", "storage", "sharding", "layers", "models", "data", "training"},
    "planning": {"errors", "memory", "sharding", "ops", "layers", "models", "training"},
    "bench": {"errors", "fields", "memory", "storage", "startup"} | {"ops", "layers", "models", "training", "analysis"},
    "sweeps": LEAVES | {"ops", "layers", "data", "models", "training", "analysis"},
    "config": LEAVES | {"layers", "data", "models", "training", "sweeps"},
    "launch": {"errors", "planning"},
    "cli": LEAVES | {"launch", "region"} | {"data", "training", "sweeps", "analysis", "planning", "bench", "config"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in MAY_IMPORT)
NAMES = set(families())


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, functions' own imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("peer_jax.")}
    assert ours - {room(path)} <= MAY_IMPORT[room(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_place(path):
    libraries = {name.split(".")[0] for name in imported(path)}
    assert "gin" not in libraries or room(path) == "gin_syntax"
    assert "typer" not in libraries or room(path) == "cli"
    if room(path) == "ops":
        assert not libraries & {"flax", "gin"}
    if room(path) != "data":
        assert not libraries & {"tensorflow", "seqio", "tensorflow_datasets"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_layer_is_named_outside_of_layers(path):
    """What is asked of layers is asked of all of them: a family is added by its own file."""
    if room(path) == "layers":
        return
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    foreign = {name.rpartition(".")[2] for name in imported(path) if not name.startswith("peer_jax.")}
    brought = {name.rpartition(".")[2] for name in imported(path) if name.startswith("peer_jax.layers.")}
    assert not ((names - foreign) | brought) & NAMES


RUN_FILES = ("config.gin", "metrics.jsonl", "result.json", "point.json", "failure.json", "sweep.json", "results.csv")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_of_runs_are_known_to_one_room(path):
    """Elsewhere their names stand in texts for people at most."""
    if room(path) == "run_directory":
        return
    constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    assert not [text for text in constants if text in RUN_FILES]


@pytest.mark.parametrize("module", ["ops", "run_directory", "gin_syntax", "fields", "startup", "cli"])
def test_what_a_module_brings_along(module):
    """Ops are for users without Flax; the rest is imported before anything heavy."""
    heavy = (
        {"flax", "gin", "optax", "orbax", "tensorflow"} if module == "ops" else {"jax", "flax", "numpy", "tensorflow"}
    )
    program = f"import sys, peer_jax.{module}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == []
