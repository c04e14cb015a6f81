"""The README says what is there: its tree, its commands, its files, its snippet."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from peer_jax import config
from peer_jax.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    command.replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for command in re.findall(r"^(?:peer-jax(?:[^\n]|\\\n)*?)(?<!\\)$", block, re.MULTILINE)
]


def test_the_tree_is_annotated_whole():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named, top = {}, ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            top = name.rstrip("/")
            named[top] = line
        else:
            named[f"{top}/{name.rstrip('/')}"] = line
    for place in named:
        assert (ROOT / place).exists(), place
    # Everything of the package's first level is in it, and every visible folder of the root.
    package = {f"peer_jax/{p.name}" for p in (ROOT / "peer_jax").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert package <= named.keys()
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "..").exists() and not p.name.startswith(".")}
    ours = {name for name in folders if any((ROOT / name).rglob("*.py")) or name in ("configs", "docs")}
    assert ours - {"runs", "build"} <= named.keys()
    # File names in the notes exist in their folder.
    for place, line in named.items():
        for file in re.findall(r"\b[\w]+\.(?:py|sh|gin|md)\b", line):
            assert (ROOT / place / file).exists() or (ROOT / place).name == file, (place, file)


def test_the_two_commands_exist():
    block = re.search(r"## Two commands.*?```bash\n(.*?)```", README, re.DOTALL)[1]
    scripts = re.findall(r"^bash (\S+)", block, re.MULTILINE)
    assert scripts == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert all((ROOT / script).is_file() for script in scripts)


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_their_configs_load(command, monkeypatch):
    words = shlex.split(command.replace("$C4", re.search(r'^C4="(.*)"$', README, re.MULTILINE)[1]))
    name, *rest = words[1:]
    subcommand = typer.main.get_command(app).commands[name]
    parameters = subcommand.make_context(name, rest, resilient_parsing=False).params
    monkeypatch.chdir(ROOT)
    files = parameters.get("config")
    if name == "sweep":
        config.load_sweep(files, parameters["set_"])
    elif files and not any("local_files" in str(file) for file in files):
        config.load(files, parameters["set_"])
    for file in files or ():
        assert Path(file).is_file()


def test_pictures_and_links_are_there():
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_snippet_runs():
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["y"].shape == (2, 16, 64)
    assert names["aux_loss"] == 0
