"""Imports point one way: ops <- layers <- models <- training <- scaling <- cli; data stands beside, below training."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "peer_jax"
MAY_IMPORT = {
    "errors": set(),
    "sharding": {"errors"},
    "processes": {"errors"},
    "ops": {"errors", "sharding"},
    "layers": {"errors", "sharding", "ops"},
    "models": {"errors", "sharding", "ops", "layers"},
    "data": {"errors"},
    "training": {"errors", "sharding", "processes", "ops", "layers", "models", "data"},
    "scaling": {"errors", "sharding", "ops", "layers", "models", "data", "training"},
    "bench": {"errors", "allocator", "ops", "layers", "models", "training", "scaling"},
    "allocator": set(),
    "config": {"errors", "sharding", "ops", "layers", "models", "data", "training", "scaling"},
    "cli": {"errors", "allocator", "processes", "bench", "data", "training", "scaling", "config"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in MAY_IMPORT)


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, functions' own imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("peer_jax.")}
    assert ours - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_place(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    libraries = {name.split(".")[0] for name in imported(path)}
    assert "gin" not in libraries or part == "config"
    assert "typer" not in libraries or part == "cli"
    if part == "ops":
        assert not libraries & {"flax", "gin"}
    if part != "data":
        assert not libraries & {"tensorflow", "seqio", "tensorflow_datasets"}
