"""A layer and an optimiser in a module of one's own, through every command; nothing of peer_jax is touched."""

import csv
import json
import sys

import pytest
from small_runs import CONFIGS, stack

from peer_jax.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("trains")

MODULE = """
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from peer_jax.layers import Aux, FeedForward


class Lowrank(FeedForward):
    '''y = gelu(x A) B, of a narrow hidden layer.'''

    def __init__(self, d_model: int, *, rank: int = 4, dtype=None, param_dtype=jnp.float32, rngs):
        init = nnx.initializers.lecun_normal()
        self.rank = rank
        self.a = nnx.Param(init(rngs.params(), (d_model, rank), param_dtype))
        self.b = nnx.Param(init(rngs.params(), (rank, d_model), param_dtype))

    def __call__(self, x, mask=None):
        return jax.nn.gelu(x @ self.a[...]) @ self.b[...], Aux(jnp.zeros(()), {})

    def flops_per_token(self, seq_len):
        return 2 * self.num_params()


@dataclasses.dataclass(frozen=True)
class Sgd:
    rate: float

    def rates(self, labels, step, steps):
        return {"all": self.rate}

    def check(self, labels):
        pass

    def init(self, labels, params):
        return ()

    def update(self, labels, params, grads, state, rates):
        new = jax.tree.map(lambda p, g: p - rates["all"] * g, params, grads)
        norm = lambda tree: jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
        size = norm(grads)
        return new, state, {"grad_norm": size, "update_norm": rates["all"] * size, "param_norm": norm(new)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_module.py").write_text(MODULE)
    (folder / "lowrank.gin").write_text("# A layer of my own.\nimport own_module\nTransformer.sparse_ffw = @Lowrank\n")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def configs(tiny, layer="dense"):
    return [f"--config={file}" for file in stack(tiny, layer)]


def succeeded(outcome):
    status, printed, errors = outcome
    assert status == 0, errors
    return printed


MINE = ["--import=own_module", "--set=Transformer.sparse_ffw=@Lowrank", "--set=Lowrank.rank=2"]


def test_it_trains_evaluates_and_generates(tiny, folder, run_cli):
    run = folder / "run"
    arguments = ["--set=Run.steps=6", "--set=Run.checkpoint_every=3", "--workdir", run, "--quiet"]
    printed = succeeded(run_cli("train", *configs(tiny), *MINE, *arguments))
    assert "Lowrank (rank=2)" in printed
    result = RunDirectory(run).read_result()
    assert (result["layer"], result["options"], result["is_baseline"]) == ("Lowrank", {"rank": 2}, False)
    assert result["forward_flops_by_part"]["Lowrank"] == 2 * (2 * 16 * 2)
    # The kept config names the module, so no flag is needed any more.
    assert "corpus" in succeeded(run_cli("evaluate", "--workdir", run, "--quiet"))
    assert succeeded(run_cli("generate", "--workdir", run, "--max-new-tokens", 3)).endswith("\n")


def test_it_is_planned(tiny, run_cli):
    printed = succeeded(run_cli("plan", *configs(tiny), *MINE, "--set=Run.steps=6", "--mesh=data=2", "--device=h100"))
    assert "peer-jax compile --topology h100:2." in printed
    assert "unknown" not in printed


def test_it_is_benchmarked(folder, run_cli):
    flags = ["--import=own_module", "--only=Lowrank", "--quick", "--out", folder / "bench"]
    printed = succeeded(run_cli("bench", "layer", *flags))
    assert "Lowrank, forward" in printed
    rows = json.loads((folder / "bench" / "layer.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"Lowrank"}
    assert all(row["median"] > 0 for row in rows)


@pytest.mark.slow
def test_a_sweep_compares_it_with_peer_and_the_report_shows_both(tiny, folder, run_cli):
    sweep = folder / "sweep.gin"
    files = [str(CONFIGS / "base.gin"), str(CONFIGS / "sizes" / "tiny.gin"), str(tiny)]
    sweep.write_text(
        f"Sweep.configs = {files}\nSweep.layers = {str(CONFIGS / 'layers')!r}\n"
        "Sweep.methods = {'peer': {}, 'peer_sigmoid': {'PEER.score_activation': 'sigmoid'}, 'mine': {}}\n"
        "Sweep.method_files = {'peer_sigmoid': 'peer', 'mine': 'lowrank.gin'}\n"
        "Sweep.sizes = {'d8': {'Transformer.d_model': 8}}\nSweep.budgets = (2e7,)\nSweep.baseline = 'mine'\n"
        "Sweep.min_steps = 1\nSweep.max_epochs = 1e6\n"
    )
    runs = folder / "runs"
    flags = ["--import=own_module", "--workdir", runs, "--workers=1", "--quiet"]
    succeeded(run_cli("sweep", "--config", sweep, *flags))
    with (runs / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"peer", "peer_sigmoid", "mine"}
    assert {method: row["layer"] for method, row in rows.items()} == {
        **{"peer": "PEER", "peer_sigmoid": "PEER", "mine": "Lowrank"}
    }
    printed = succeeded(run_cli("report", runs))
    assert all(method in printed for method in rows)
    page = (runs / "report.html").read_text()
    assert "peer_sigmoid" in page
    assert "mine" in page
    # Everything is finished but a result that can't be read, which is set aside and made again.
    damaged = next(runs.glob("peer-*/result.json"))
    damaged.write_text(json.dumps({k: v for k, v in json.loads(damaged.read_text()).items() if k != "machine"}))
    assert succeeded(run_cli("sweep", "--config", sweep, *flags))
    with (runs / "results.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"peer", "peer_sigmoid", "mine"}
    assert "machine" in json.loads(damaged.read_text())
    assert "machine" not in json.loads(damaged.with_name("damaged-result.json").read_text())


def test_an_optimiser_of_ones_own_stands_where_adamw_stood(tiny, folder, run_cli):
    run = folder / "sgd"
    mine = ["--import=own_module", "--set=Run.optimizer=@Sgd()", "--set=Sgd.rate=0.1", "--set=Run.steps=8"]
    succeeded(run_cli("train", *configs(tiny), *mine, "--workdir", run, "--quiet"))
    losses = [line["loss"] for line in RunDirectory(run).read_metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    assert RunDirectory(run).read_result()["config"]["Sgd.rate"] == "0.1"
    other = [word.replace("rate=0.1", "rate=0.2") for word in mine]
    status, _, errors = run_cli("train", *configs(tiny), *other, "--workdir", run, "--quiet")
    assert (status, "Sgd.rate = 0.1, now it is 0.2" in errors) == (2, True)


def test_a_module_that_is_not_there_is_named(tiny, run_cli, tmp_path):
    arguments = ["--import=no_such_module", "--set=Run.steps=1", "--workdir", tmp_path / "x"]
    status, printed, errors = run_cli("train", *configs(tiny), *arguments)
    assert (status, printed, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("peer-jax: --import no_such_module can't be imported")
