"""What `peer-jax plan` counts against compiled training steps on 8 devices; its output, and what it refuses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives
from eight_devices import measured
from small_runs import ROOT

from peer_jax.data.corpora import python_stdlib
from peer_jax.data.pipeline import TextTask
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.models import Transformer
from peer_jax.planning import capacity
from peer_jax.planning.tpus import compile_command
from peer_jax.sharding import AXES, Sharding, current, use
from peer_jax.training import room
from peer_jax.training.optimizer import AdamW
from peer_jax.training.run import Run

RETRIEVAL = {"num_heads": 4, "top_k": 4, "d_key": 64}
LAYERS = {
    "peer": functools.partial(PEER, num_experts=256**2, **RETRIEVAL),
    "small peer": functools.partial(PEER, num_experts=128**2, **RETRIEVAL),
    "pkm": functools.partial(PKM, num_experts=256**2, **RETRIEVAL),
    "moe": functools.partial(MoE, num_experts=8),
    "dropless": functools.partial(MoE, num_experts=8, routing="token_choice", capacity_factor=None),
}
ADAM = AdamW(learning_rate=1e-3)
TOUCHED = AdamW(learning_rate=1e-3, table_b1=0.0, table_second_moment="row", table_updates="touched")
# Layer; devices along data, fsdp and expert; how tables are split; d_model; tokens per row; remat; optimiser.
CASES = {
    "PEER, rows": ("peer", (2, 1, 4), "rows", 64, 64, False),
    "PEER, columns": ("peer", (1, 2, 4), "columns", 64, 64, False),
    "PEER, whole": ("small peer", (8, 1, 1), "rows", 128, 64, False),
    "PKM, rows": ("pkm", (1, 1, 8), "rows", 128, 128, True),
    "PEER, touched rows": ("peer", (2, 1, 4), "rows", 64, 16, True, TOUCHED),
    "MoE": ("moe", (2, 1, 4), "rows", 64, 64, False),
}


def run_of(layer, mesh, tables, d_model, seq_len, remat, optimizer=ADAM, **options):
    model = functools.partial(
        Transformer, d_model=d_model, num_blocks=2, num_heads=4, ffw=Dense, sparse_ffw=LAYERS[layer], remat=remat
    )
    return Run(
        model=model,
        optimizer=optimizer,
        task=TextTask(python_stdlib(), vocabulary="bytes", seq_len=seq_len),
        batch_size=16,
        steps=1,
        sharding=Sharding(**dict(zip(AXES, mesh, strict=True)), tables=tables),
        **options,
    )


def planned(case):
    return capacity.plan(run_of(*CASES[case]), devices=8)


def compiled(case):
    """Bytes per device of the compiled step's arguments, the least and the whole that it takes; its collectives."""
    run = run_of(*CASES[case])
    with use(run.sharding.place()):
        trainer = run.trainer()
        row = jax.ShapeDtypeStruct((run.batch_size, run.task.seq_len), jnp.int32, sharding=current().sharding("batch"))
        batch = dict.fromkeys(("inputs", "targets", "segment_ids"), row)
        rates = run.optimizer.rates(trainer.labels, 0, 10)
        state = trainer.abstract_state()
        step = trainer.compiled_step().lower(state, batch, rates).compile()
        sizes = {"batch_size": run.batch_size, "accumulation": 1, "seq_len": run.task.seq_len}
        least = room.step_bytes(trainer.abstract_model, state, **sizes)
    held = step.memory_analysis()
    arguments = held.argument_size_in_bytes
    total = arguments + held.temp_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes
    return arguments, least, total, collectives(step.as_text())


def measure():
    return {case: compiled(case) for case in CASES}


@pytest.fixture(scope="module")
def steps():
    return measured("test_capacity", "measure")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_the_compiled_step(steps, case):
    """State and batch are its arguments, beside which it has a number of the step and some rates."""
    arguments, least, total, _ = steps[case]
    plan = planned(case).memory
    assert 0 <= arguments - (plan.parameters + plan.optimizer + plan.other) < 100
    assert plan.total < total
    assert least < total


@pytest.mark.parametrize("case", ["PEER, rows", "PEER, whole", "PKM, rows", "PEER, touched rows", "MoE"])
def test_exchanges_are_those_of_the_compiled_step(steps, case):
    """Collectives tell the causes apart: all-reduces are over D or P devices, all others are over ``expert``."""
    data, fsdp, E = CASES[case][1]
    D, P = data * fsdp, data * fsdp * E
    moved = planned(case).step.interconnect
    found = dict.fromkeys(("all-gather", "all-to-all", "reduce-scatter", "all-reduce"), 0)
    for kind, size in steps[case][3]:
        found[kind] += size * (E if kind == "reduce-scatter" else 1)
    summed = found.pop("all-reduce")
    assert sum(found.values()) * (E - 1) / E == moved[capacity.TOKENS]
    if case != "MoE":  # its experts and its other kernels have different numbers of copies
        of_tables = moved[capacity.TABLE_GRADIENTS] * D / (2 * (D - 1)) if D > 1 else 0
        of_others = moved[capacity.GRADIENTS] * P / (2 * (P - 1))
        # On top come batch-norm's statistics, norms and metrics.
        assert of_tables + of_others <= summed < 1.05 * (of_tables + of_others)


# In closed form


def test_mesh_and_devices():
    run = run_of("peer", (-1, 1, 2), "rows", 64, 64, False)
    assert capacity.plan(run).mesh == {"data": 1, "fsdp": 1, "expert": 2}
    assert capacity.plan(run, devices=8).mesh == {"data": 4, "fsdp": 1, "expert": 2}
    assert capacity.plan(run, {"expert": 8}, devices=16).mesh == {"data": 2, "fsdp": 1, "expert": 8}
    assert capacity.plan(run, {"data": 1, "expert": 1}).step.interconnect == dict.fromkeys(capacity.CAUSES, 0.0)


def test_the_slowest_of_the_three_sets_the_floor_and_nodes_share_their_ports():
    step = capacity.StepPlan(1e12, 2e9, dict.fromkeys(capacity.CAUSES, 0.0) | {capacity.TOKENS: 4e8})
    device = capacity.Device(1e12, 1.0, 1e9, 4e8, 8, 1e8)
    near, far = ({"data": 1, "fsdp": 1, "expert": size} for size in (8, 16))
    assert list(step.seconds(device, near).values()) == [1.0, 2.0, 1.0]
    assert step.seconds(device, far)["interconnect"] == 1.0  # 8 ports of 1e8 are faster than the links
    copies = step._replace(interconnect=dict.fromkeys(capacity.CAUSES, 0.0) | {capacity.TABLE_GRADIENTS: 4e8})
    assert copies.seconds(device, {"data": 2, "fsdp": 1, "expert": 8})["interconnect"] == 4.0  # a port each


def test_what_experts_and_rows_of_moments_and_remat_change():
    plain = run_of("peer", (2, 1, 4), "rows", 64, 64, False)
    runs = {
        "plain": plain,
        "small": run_of("small peer", (2, 1, 4), "rows", 64, 64, False),
        "remat": run_of("peer", (2, 1, 4), "rows", 64, 64, True),
        "by row": dataclasses.replace(plain, optimizer=AdamW(learning_rate=1e-3, table_second_moment="row")),
        "touched": dataclasses.replace(plain, optimizer=TOUCHED, batch_size=8),
    }
    of = {name: capacity.plan(run) for name, run in runs.items()}
    tables, sub_keys = 2 * 4 * 256**2 * 64 / 4, 4 * 256 * 64  # a quarter of two tables; two halves of width 32
    small_tables, small_sub_keys = tables / 4, sub_keys / 2
    held = of["plain"].memory.parameters - of["small"].memory.parameters
    assert held == tables - small_tables + sub_keys - small_sub_keys
    assert of["plain"].memory.optimizer - of["small"].memory.optimizer == 2 * held
    assert of["plain"].memory.optimizer - of["by row"].memory.optimizer == tables - tables / 64
    assert of["remat"].step.flops == 4 / 3 * of["plain"].step.flops
    assert of["plain"].step.state == 2 * (of["plain"].memory.parameters + of["plain"].memory.optimizer)
    # A batch of 8 rows of 64 tokens touches at most 8192 of the 16384 rows of a part.
    gradients = of["touched"].memory.working
    assert gradients == of["touched"].memory.parameters - tables / 2
    # Parameters and moments, but of tables only their rows, which nobody knows beforehand.
    backbone = of["plain"].memory.parameters - tables
    assert of["touched"].step.state == pytest.approx(2 * 3 * backbone, abs=100)


@pytest.mark.parametrize(
    ("device", "devices", "flag"),
    [
        ("tpu-v5p", 64, " --topology v5p:4x4x4"),
        ("tpu-v6e", 3, " --topology v6e:SHAPE"),
        ("h200", 16, " --topology h200:16"),
    ],
)
def test_the_command_that_compiles_names_the_devices(device, devices, flag):
    assert compile_command(device, devices) == f"peer-jax compile{flag}"


@pytest.mark.parametrize(("implementation", "held"), [("xla", 1), (None, 0)])
def test_activations_are_streams_logits_and_probabilities_that_are_held(implementation, held):
    run = run_of("moe", (2, 1, 4), "rows", 64, 64, False)
    model = functools.partial(run.model, attention_implementation=implementation)
    run = dataclasses.replace(run, model=model, batch_size=256)
    tokens = 256 // 8 * 64
    streams, logits, probabilities = 2 * 64, 259, 2 * 4 * 64  # per token, two blocks, four heads
    memory = capacity.plan(run).memory
    assert memory.working == 4 * tokens * (streams + logits + held * probabilities) > memory.parameters


# The command

PAPER = [
    f"--config={ROOT / 'configs' / file}" for file in ("base.gin", "layers/peer.gin", "sizes/paper.gin", "data/c4.gin")
]


def test_the_command_plans_for_256_devices(run_cli):
    status, out, _ = run_cli(
        "plan",
        *PAPER,
        "--device=tpu-v5p",
        "--mesh=data=2,fsdp=2,expert=64",
        "--set=Run.batch_size=256",
        "--set=PEER.num_experts=16777216",
    )
    assert status == 0
    assert "256 tpu-v5p: data=2, fsdp=2, expert=64; tables by rows; 524,288 tokens per step" in out
    table = dict(re.findall(r"^ *([a-z][\w', ]+?)  +([\d.]+) *$", out, re.MULTILINE))
    tables = 2 * 4 * 4096**2 * 1024 / 64 / 2**30  # of the parameters, all but 2%
    assert tables < float(table["parameters"]) < 1.2 * tables
    parts = [float(size) for part, size in table.items() if part in MEMORY]
    assert float(table["total, at least"]) == pytest.approx(sum(parts), abs=0.02)
    assert re.search(r"At least \d+% of 95.0 GiB\.", out)
    assert "peer-jax compile --topology v5p:4x8x8." in out
    assert re.search(r"A step takes [\d.]+ ms at least, limited by [\w, ]+: [\d,]+ tokens/s at most", out)


MEMORY = ("parameters", "optimiser", "statistics and batch", "gradients or activations, at least")


def test_the_command_says_what_does_not_fit(run_cli):
    status, out, _ = run_cli(
        "plan",
        *PAPER,
        "--device=tpu-v6e",
        "--mesh=expert=2",
        "--devices=4",
        "--set=Sharding.data=1",
        "--set=PEER.num_experts=4194304",
    )
    assert status == 0
    assert out.startswith("2 of 4 tpu-v6e: data=1, fsdp=1, expert=2")
    assert re.search(r"DOES NOT FIT: at least \d+% of 32.0 GiB", out)
    assert "Transformer.remat=True" in out
    assert "compile" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device=v100"], "v100 is not one of the devices tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, h100, h200"),
        (["--mesh=data=2,model=4"], "no axis 'model': the mesh has data, fsdp, expert"),
        (["--mesh=data=2,data=4"], "names data twice"),
        (["--mesh=expert=four"], "not of the form data=2,fsdp=1,expert=4"),
        (["--mesh=data=2,expert=8", "--devices=8"], "needs 16 devices, but there are 8"),
        (["--mesh=data=-1,expert=3", "--devices=8"], "splits by 3, which does not divide the 8 devices"),
        (["--mesh=expert=3"], "Run.batch_size / Run.accumulation=128 does not divide over the 3 devices"),
        (["--mesh=expert=8", "--set=PEER.num_experts=36"], "36 along 'rows', which does not divide into the 8 devices"),
    ],
)
def test_what_can_not_be_planned_is_refused_in_a_sentence(run_cli, arguments, words):
    status, out, err = run_cli("plan", "--device=tpu-v5p", *PAPER, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_what_a_layer_that_drops_nothing_exchanges_is_unknown_on_several_devices():
    run = run_of("dropless", (2, 1, 4), "rows", 64, 64, False)
    assert capacity.plan(run).unknown == ("MoE (token choice, capacity_factor=None)",)
    assert capacity.plan(run, {"data": 1, "expert": 1}).unknown == ()
