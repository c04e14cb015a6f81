"""`peer-jax compile`: what is read from a program's text, what is refused, and a step compiled for four TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives
from devices import Device
from jax.sharding import Mesh
from small_runs import ROOT

from peer_jax.ops.chunks import chunk_size
from peer_jax.planning import compiled, hlo
from peer_jax.planning import topology as topologies
from peer_jax.planning.capacity import DEVICES
from peer_jax.sharding import Sharding, compiled_for, target

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the extra `compile`, is not installed"
)
CONFIG = [
    f"--config={ROOT / 'configs' / file}"
    for file in ("base.gin", "layers/dense.gin", "sizes/tiny.gin", "data/python_stdlib.gin")
]

# In the form in which the compiler of TPUs writes them, shortened.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/there/peer_jax/training/step.py"
2 "/there/peer_jax/models/attention.py"
3 "/there/peer_jax/layers/linear.py"
4 "/there/site-packages/optax/losses.py"
5 "/home/someone/my_layers.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=4 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
5 {file_name_id=5 function_name_id=1 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=2}
5 {file_location_id=5 parent_frame_id=2}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %x), backend_config={"estimated_cycles":"77"}
}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), to_apply=%add, backend_config={"estimated_cycles":"1000"}
}

%seven (t: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%some (t: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %n.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t.2 = (s32[], f32[8]{0}) parameter(0)
  %inner = (s32[], f32[8]{0}) while(%t.2), condition=%seven, body=%within
  ROOT %copy = (s32[], f32[8]{0}) copy(%inner), backend_config={"estimated_cycles":"3"}
}

%within (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t.3 = (s32[], f32[8]{0}) parameter(0)
  ROOT %fusion.1 = f32[8]{0} fusion(%t.3), calls=%fused, metadata={stack_frame_id=3}, {"estimated_cycles":"10"}
}

%on_sparse_core (p: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %gather_fusion = f32[8]{0} fusion(%p.1), kind=kCustom, calls=%fused2, {"estimated_cycles":"50"}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8]) -> f32[8] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %known = (s32[], f32[8]{0}) while(%p.2), condition=%seven, body=%body, metadata={stack_frame_id=2}
  %unknown = (s32[], f32[8]{0}) while(%p.2), condition=%some, body=%within, metadata={stack_frame_id=5}
  %guess = (s32[]) while(%p.2), condition=%some, body=%within, metadata={op_name="about_3_turns/while" stack_frame_id=5}
  %sort = (f32[4,1024]{1,0}, s32[4,1024]{1,0}) sort(%p.2, %p.2), to_apply=%add, metadata={stack_frame_id=4}
  %gather_start = (f32[8]{0}, u32[]) custom-call-start(%p.2), async_execution_thread="sparsecore", calls=%on_sparse_core
  %gather_done = f32[8]{0} custom-call-done(%gather_start)
  %all-gather-start = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%p.2), backend_config={"estimated_cycles":"2"}
  %all-gather-done = bf16[16]{0} all-gather-done(%all-gather-start)
  ROOT %loss = f32[8]{0} fusion(%p.2), calls=%fused, metadata={stack_frame_id=4}, {"estimated_cycles":"5"}
}
"""


def test_loops_collectives_and_cycles_of_a_text():
    """Counted by hand: ``within`` runs 7 * 7 times in the loop of 7 turns, once in that of unknown length, 3 times
    in that of which a scope says so."""
    found = hlo.read(TEXT)
    assert found.loops == [
        hlo.Loop("models/attention.py", 7, 3 + 7 * 10),
        hlo.Loop("my_layers.py", None, 10),
        hlo.Loop("my_layers.py", 3, 10, about=True),
    ]
    reduced = 7 * 7 + 1 + 3 + 1  # and in the fusion ``loss``
    assert found.collectives == [
        hlo.Collective("all-gather", 1, 2 * 16),
        hlo.Collective("all-reduce", reduced, reduced * 4 * 8),
    ]
    # A linear layer counts for what calls it, and a library for the file that calls it.
    assert found.cycles == {"models/attention.py": 53 * 10, "other": 7 * 3 + 2, "training/step.py": 5}
    assert found.unestimated == {"sort of f32[4,1024]": 1, "gather on SparseCores": 1, "all-gather": 1}


def test_turns_are_those_of_a_compiled_loop():
    def loops(x, n):
        x, _ = jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=5)
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.cos(x), x)

    text = jax.jit(loops).lower(jnp.ones(8), 3).compile().as_text()
    assert sorted(loop.turns or 0 for loop in hlo.read(text).loops) == [0, 5]


def test_an_estimate_that_is_none_is_not_shown():
    """For a dense step of one v5e with splash attention, libtpu 0.0.52 estimates -31 seconds."""
    costs = {}, {"optimal_seconds": 0.0}, {"optimal_seconds": -30.99}, {"optimal_seconds": 0.01}
    assert list(map(compiled._seconds, costs)) == [None, None, None, 0.01]


def test_choices_follow_the_device():
    assert target() == jax.devices()[0]
    assert chunk_size(10**6, 2**20) == 2
    with compiled_for(Device("tpu")):
        assert chunk_size(10**6, 2**20) == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v9:2x2"], "--topology v9:2x2 names no devices of v4, v5e, v5p, v6e, h100, h200"),
        (["--topology=v5p"], "--topology v5p names no devices"),
        (["--topology=v5p:2x2x1"], "v5p:2x2x1 needs libtpu to compile, which is not installed: pip install"),
        (["--topology=h100:8"], "h100:8 needs the wheels of JAX for CUDA 13"),
    ],
)
def test_what_is_refused(run_cli, monkeypatch, arguments, words):
    find_spec = importlib.util.find_spec
    lacking = ("libtpu", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name in lacking else find_spec(name, *of)
    )
    status, out, error = run_cli("compile", *CONFIG, *arguments)
    assert (status, out) == (2, "")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set=Sharding.data=2"], "the mesh uses 2 of the 4 devices of v5p:2x2x1"),
        (["--set=Sharding.expert=8"], "needs 8 devices, but there are 4"),
        (["--set=Sharding.expert=3"], "splits by 3, which does not divide the 4 devices"),
        (["--program=loss"], "--program loss is not one of step, evaluation, generation"),
        (["--hlo=/nowhere/step.txt"], "--hlo /nowhere/step.txt can't be written"),
    ],
)
def test_what_does_not_fit_the_devices(run_cli, monkeypatch, arguments, words):
    four = topologies.Topology("v5p:2x2x1", [Device("tpu")] * 4, DEVICES["tpu-v5p"])
    monkeypatch.setattr(topologies, "topology", lambda name: four)
    status, out, error = run_cli("compile", *CONFIG, "--topology=v5p:2x2x1", *arguments)
    assert (status, out) == (2, "")
    assert words in error


@needs_libtpu
@pytest.mark.filterwarnings("default")  # what libtpu itself warns of
def test_a_step_for_four_tpus(run_cli, tmp_path):
    """One dense block with 2 heads on four rows of 256 tokens: one row per device."""
    file = tmp_path / "step.txt"
    sizes = ("Transformer.num_blocks=1", "Run.batch_size=4", "TextTask.seq_len=256")
    flags = [f"--set={size}" for size in sizes]
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer
        status, out, _ = run_cli("compile", *CONFIG, *flags, "--topology=v5p:2x2x1", f"--hlo={file}")
    assert status == 0
    assert out.startswith("step on v5p:2x2x1: data=4, fsdp=1, expert=1; tables by rows; 1,024 tokens\n")
    assert "Fits: 0% of the 95 GiB of a device." in out
    text = file.read_text()
    assert sum(of.number for of in hlo.read(text).collectives) == len(collectives(text)) > 0
    # Attention is that of TPUs, forward and backward: no array has the scores of a row.
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "256,256]" not in text


@needs_libtpu
def test_one_device_and_the_devices_of_a_mesh():
    four = topologies.topology("v5p:2x2x1")
    assert len(four.devices) == 4
    with compiled_for(four.devices[0]):
        assert target().platform == "tpu"
    mesh = Mesh(four.devices, ("data",))
    with compiled.use(compiled.Placement(mesh, "rows")):
        assert target() == four.devices[0]


@needs_libtpu
@pytest.mark.parametrize(("name", "sizes"), [("v5p:4x4x4", {"expert": 8}), ("v6e:8x8", {"expert": 4})])
def test_a_mesh_whose_axes_are_no_products_of_those_of_the_torus(name, sizes):
    devices = topologies.topology(name).devices
    mesh = Sharding(**sizes).place(devices).mesh
    assert mesh.shape["expert"] == sizes["expert"]
    assert set(mesh.devices.flat) == set(devices)
