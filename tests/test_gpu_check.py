"""scripts/gpu_check.sh on tiny sizes, and the parts of scripts/compile_h200.py that need no compiler for CUDA."""

import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import compile_h200  # noqa: E402
from gpu_check import __main__ as gpu_check  # noqa: E402

from peer_jax.ops import mosaic_gpu  # noqa: E402


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < mosaic_gpu.OLDEST_JAX, reason="this JAX has no such kernels")
def test_smoke(tmp_path):
    """All parts run, all comparisons pass, and table.txt has what is printed."""
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), str(tmp_path / "out"), "--smoke"]
    setting = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=setting)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "rows.json").read_text())
    rows = found["rows"]
    assert found["smoke"]
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    for implementation in ("reference", "xla", "mosaic_gpu"):
        ours = [row for row in rows if row["implementation"] == implementation]
        checked = {row["part"] for row in ours if row["what"] == "error against float64" and row["verdict"] == "pass"}
        assert checked >= {"expert_mix", "value_bag"}
        assert ("product_key_top_k" in checked) == (implementation != "mosaic_gpu")
        assert {row["what"] for row in ours if row["part"] == "speed"} >= {"forward", "backward"}
    assert {row["part"] for row in rows if row["verdict"] == "pass"} >= {"layer", "step", "top_k", "cross_entropy"}
    parts = [part for group in gpu_check.GROUPS for part in group if part.smokes]
    assert sum(row["part"] == "parts" for row in rows) == len(parts)
    assert (tmp_path / "out" / "table.txt").read_text() in done.stdout


@pytest.mark.parametrize(
    ("body", "result"),
    [
        ("import sys; print('{\"part\": \"speed\"}'); sys.exit('no device')", "ended with 1: no device"),
        ('import time; print(\'{"part": "speed"}\', flush=True); time.sleep(60)', "stopped after 2 s"),
        # A process that the part started holds the pipe, too.
        (
            'import subprocess; print(\'{"part": "speed"}\', flush=True); subprocess.run(["sleep", "60"])',
            "stopped after 2 s",
        ),
    ],
)
def test_a_part_that_fails_or_hangs_costs_its_own_rows_alone(tmp_path, monkeypatch, body, result):
    (tmp_path / "gpu_check").mkdir()
    (tmp_path / "gpu_check" / "part.py").write_text(body)
    monkeypatch.setattr(gpu_check, "SCRIPTS", tmp_path)
    part = gpu_check.Part("part", ("ops", "xla"), 60)
    start = time.monotonic()
    first, last = gpu_check.run(part, limit=2, smoke=False)
    assert time.monotonic() - start < 30
    assert first == {"part": "speed"}
    assert last["verdict"] == "FAIL"
    assert last["result"].startswith(result)


def test_an_interrupted_check_leaves_nothing_running(tmp_path):
    (tmp_path / "gpu_check").mkdir()
    (tmp_path / "gpu_check" / "part.py").write_text(
        "import os, pathlib, time; pathlib.Path('new').write_text(str(os.getpid()))\n"
        "os.rename('new', 'pid'); time.sleep(60)"
    )
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from gpu_check import __main__ as gpu_check
gpu_check.SCRIPTS = pathlib.Path.cwd()
gpu_check.GROUPS = [[gpu_check.Part("part", (), 60)]] * 2
gpu_check.main()
"""
    with subprocess.Popen([sys.executable, "-c", program, "out"], cwd=tmp_path, stderr=subprocess.DEVNULL) as check:
        while not (tmp_path / "pid").exists():
            assert check.poll() is None
            time.sleep(0.05)
        check.send_signal(signal.SIGTERM)
        assert check.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_every_part_has_its_time_within_eight_minutes():
    """However long the parts before it take."""
    assert sum(max(part.seconds for part in group) for group in gpu_check.GROUPS) <= gpu_check.TOTAL <= 8 * 60


def test_time_that_is_left_over_goes_to_later_parts(tmp_path, monkeypatch):
    limits = []

    def run(part, limit, smoke):
        limits.append(limit)
        return []

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "TOTAL", 100)
    monkeypatch.setattr(gpu_check, "GROUPS", [[gpu_check.Part("part", (), of)] for of in (20, 30)])
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path)])
    gpu_check.main()
    assert limits == pytest.approx([100 - 30, 100], abs=25)  # nvidia-smi may take its time


def test_first_losses_are_compared_with_the_plain_step():
    rows = [
        {"case": "a", "implementation": name, "first_loss": loss}
        for name, loss in [("xla, attention xla", 10.0), ("mosaic_gpu, attention cudnn", 10.01), ("xla, bad", 10.1)]
    ]
    found = gpu_check.first_losses(rows)
    assert [(row["implementation"], row["verdict"]) for row in found] == [
        ("mosaic_gpu, attention cudnn", "pass"),
        ("xla, bad", "FAIL"),
    ]


def test_speed_ups_compare_equal_cases():
    def row(case, implementation, seconds):
        return {"case": case, "implementation": implementation, "what": "forward", "seconds": seconds}

    rows = [row("a", "mosaic_gpu", 1.0), row("a", "reference", 4.0), row("a", "xla", 6.0), row("b", "xla", 9.0)]
    found = gpu_check.speed_ups(rows, smoke=False)
    assert [(row["what"], row["result"], row["verdict"]) for row in found] == [
        ("forward: over reference", "4.00x", "FAIL"),
        ("forward: over xla", "6.00x", ""),
    ]


def test_the_largest_tables_can_be_drawn():
    """As far as tracing tells: they take 8 GiB each."""
    from gpu_check import ops

    table = jax.eval_shape(functools.partial(ops.draw_table, N=4096**2, d=256, dtype="bfloat16"), jax.random.key(0))
    assert (table.shape, table.dtype) == ((4096**2, 256), "bfloat16")


LOG = """\
Resources(smem_scratch_bytes=61440, barrier_counts=Counter({Barrier(arrival_count=8, num_barriers=4): 1,\
 Barrier(arrival_count=2, num_barriers=1, orders_tensor_core=False): 2}), scoped_gmem_semaphores={})
ptxas info    : Compiling entry function 'mix_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 92 registers, used 2 barriers, 1 bytes smem
"""


def test_what_ptxas_says_is_read_and_judged():
    (kernel,) = compile_h200.kernels(LOG, ["mix"])
    sizes = {"registers": 92, "spill stores": 16, "spill loads": 24, "shared": 61440 + 8 * (4 + 2)}
    assert kernel == {"kernel": "mix"} | sizes
    memory = {"arguments": 90, "outputs": 10, "temporary": 11}
    result = {"program": "forward", "memory": memory, "kernels": [kernel]}
    assert compile_h200.faults(result, bounded=False) == ["registers are spilled"]
    assert compile_h200.faults(result, bounded=True)[1:] == ["temporary memory above 10% of inputs and outputs"]


def test_what_pallas_says_is_matched_by_name():
    """Pallas prints in the order of the program, ptxas in the order in which it compiles."""
    first, second = LOG.split("ptxas", 1)
    log = first + first.replace("61440", "1024") + "ptxas" + second.replace("mix", "sum") + "ptxas" + second
    assert [kernel["shared"] for kernel in compile_h200.kernels(log, ["mix", "sum"])] == [61488, 1072]
    assert compile_h200.kernels(log, ["mix", "other"]) == []


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"), [(126, 55 * 2**10, 4), (72, 49 * 2**10, 4), (130, 1024, 3), (32, 1024, 16)]
)
def test_blocks_that_share_a_multiprocessor(registers, shared, blocks):
    """By hand: 65,536 registers of which 126 * 128 take 16,384, and 228 KiB of which a block's 55 take 56."""
    assert compile_h200.blocks_per_multiprocessor(registers, shared) == blocks


def test_twice_the_usual_registers_are_a_fault():
    (kernel,) = compile_h200.kernels(
        LOG.replace("92 registers", "168 registers").replace("16 bytes", "0 bytes"), ["mix"]
    )
    result = {"memory": {"arguments": 90, "outputs": 10, "temporary": 0}, "kernels": [kernel | {"spill loads": 0}]}
    assert compile_h200.faults(result, bounded=True) == ["more than 128 registers"]


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    def version(package):
        if package != "jax":
            raise importlib.metadata.PackageNotFoundError
        return "0.11.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["compile_h200.py"])
    assert compile_h200.main() == 2
    assert "pip install jax-cuda13-plugin==0.11.2" in capsys.readouterr().err
