"""The packages that the scripts install: every one has an exact version for each Python, within the stated bounds."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))


def requirements(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_each_python_has_a_file():
    assert [path.name for path in CONSTRAINTS] == ["python3.11.txt", "python3.12.txt", "python3.13.txt"]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_package_is_pinned_within_its_bounds(path):
    pinned = {}
    for requirement in requirements(path):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        pinned[canonicalize_name(requirement.name)] = specifier.version
    wanted = requirements(ROOT / "requirements.txt")
    assert len(wanted) > 15
    for requirement in [*wanted, *map(Requirement, PROJECT["optional-dependencies"]["dev"])]:
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} but {path.name} has {version}"
