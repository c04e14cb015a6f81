"""The first command of the README, as a person gives it, on less text and fewer FLOPs."""

import csv
import subprocess

import pytest
from small_runs import ROOT, environment

pytestmark = pytest.mark.slow


def test_quickstart_from_end_to_end(tmp_path):
    """The script trains the runs, draws the report and prints its path. A second time, it trains nothing."""
    runs = tmp_path / "runs"
    shrunk = (
        *("Sweep.methods=('dense', 'peer')", "Sweep.budgets=(1e9,)", "Sweep.min_steps=1", "Sweep.max_epochs=1e3"),
        "Transformer.num_blocks=1",
        "Sweep.rate_exponents={}",  # the methods by name alone have no rates of their own
        *("TextTask.max_train_tokens=200000", "TextTask.max_validation_tokens=5000"),
    )
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), str(runs), *(f"--set={binding}" for binding in shrunk)]
    setting = {"cwd": tmp_path, "env": environment(PEER_JAX_CACHE=str(tmp_path / "cache")), "text": True}
    for trained in (True, False):
        done = subprocess.run(command, capture_output=True, check=False, timeout=280, **setting)
        assert done.returncode == 0, done.stderr
        assert str(runs / "report.html") in done.stdout
        assert ("loss" in done.stderr) == trained
    page = (runs / "report.html").read_text()
    with (runs / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        assert f"{float(row['loss']):.4f}" in page
    assert {path.name for path in (runs / "figures").iterdir()} >= {"isoflop_active.svg", "isoflop_active.png"}
