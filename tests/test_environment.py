"""Environments that JAX or XLA can't start with, each one sentence; and what kills leave among compiled programs."""

import fnmatch
import importlib
import signal
import subprocess
import sys

import jax
import pytest
from small_runs import ROOT, environment

from peer_jax import startup

BAD = {
    "JAX_PLATFORMS=foo": "foo",
    "JAX_PLATFORMS=cuda": "can't start",
    "JAX_NUM_CPU_DEVICES=abc": "abc",
    "JAX_NUM_CPU_DEVICES=0": "can't start",
    "JAX_ENABLE_X64=maybe": "maybe",
    "XLA_FLAGS=--nonsense": "Unknown flag",
    "XLA_FLAGS=no_such_file": "no_such_file",
    "XLA_FLAGS=--xla_force_host_platform_device_count=abc": "abc",
    "PEER_JAX_CACHE=~no_such_user/x": "no_such_user",
    "PEER_JAX_CACHE=s3://bucket/x": "s3://bucket/x",
}


@pytest.fixture(scope="module")
def outcomes():
    """Status, standard output and error of `peer-jax generate` by environment."""
    command = [sys.executable, "-m", "peer_jax", "generate", "--workdir", "no_such_run"]
    started = {
        setting: subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**dict([setting.split("=", 1)])),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for setting in BAD
    }
    return {setting: (process.communicate(timeout=200), process.returncode) for setting, process in started.items()}


@pytest.mark.slow
@pytest.mark.parametrize("setting", BAD)
def test_an_environment_is_refused(outcomes, setting):
    (printed, errors), status = outcomes[setting]
    assert (status, printed) == (2, ""), errors
    assert errors.startswith("peer-jax: ")
    assert errors.count("\n") == 1
    assert setting.split("=")[0] in errors
    assert BAD[setting] in errors


COMPILES = """
import resource, signal, sys
from peer_jax import startup
sys.dont_write_bytecode = True
startup.prepare()
import jax
if "killed" in sys.argv:
    jax.numpy.zeros(())
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
jax.jit(lambda x: x * 3 + 1)(1.0)
"""


@pytest.mark.slow
def test_half_of_a_program_that_a_kill_leaves_is_removed(tmp_path):
    """The kernel kills the process as it writes the 101st byte of a file."""
    own = {name: value for name, value in environment().items() if not name.startswith("JAX_COMPILATION_CACHE")}
    variables = own | {
        "JAX_PLATFORMS": "cpu",
        "PEER_JAX_CACHE": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def programs():
        return {path.name: path.stat().st_size for path in (tmp_path / "programs").glob("*-cache")}

    def compiles(*arguments):
        command = [sys.executable, "-c", COMPILES, *arguments]
        return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)

    assert compiles("killed").returncode == -signal.SIGXFSZ
    (half,) = [name for name, size in programs().items() if size == 100]
    for _ in range(2):
        done = compiles()
        assert (done.returncode, done.stderr) == (0, "")
        assert programs()[half] > 100


# JAX takes a backend that can't start for one that isn't there, unless it is asked for.
TPU_IN_USE = """
import sys
from jax._src import xla_bridge
from peer_jax import errors, startup

def start():
    raise RuntimeError(sys.argv[1])

xla_bridge.register_backend_factory("tpu", start, priority=300, fail_quietly=True)
try:
    startup.check_devices()
    print("started")
except errors.InputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["", "tpu"])
@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        (  # as in jax-ml/jax#22070
            "ABORTED: The TPU is already in use by process with pid 176028. Not attempting to load libtpu.so in this "
            "process.",
            "the TPU of this host is in use by another process with pid 176028: wait for it, or end it",
        ),
        (
            "ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "
            '"$ sudo rm /tmp/libtpu_lockfile".',
            "the TPU of this host is in use by another process: wait for it, or end it",
        ),
    ],
)
def test_a_second_job_on_a_tpu_host_is_refused(platforms, says, sentence):
    """Also where JAX would go on with the CPU without a word."""
    done = subprocess.run(
        [sys.executable, "-c", TPU_IN_USE, says],
        cwd=ROOT,
        env=environment(JAX_PLATFORMS=platforms),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{sentence}; if there is none, remove /tmp/libtpu_lockfile\n"


STARTS = """
from peer_jax import startup
startup.prepare(keep_programs=False)
startup.check_devices()
import jax
print(jax.default_backend())
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the extra `compile`, is not installed")
@pytest.mark.skipif(bool(startup.accelerators()), reason="this machine has accelerators")
def test_libtpu_is_not_loaded_without_a_tpu():
    """Loaded, it prints five lines, or, if another process has loaded it, passes for a TPU that is in use."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS], cwd=ROOT, env=environment(JAX_PLATFORMS=""), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(
    ("installed", "devices", "plugins", "given", "expected"),
    [
        (["libtpu"], [], [], None, "cpu"),
        (["libtpu"], [], [], "tpu,cpu", "tpu,cpu"),  # what JAX sets where it finds TPUs
        (["libtpu"], ["/dev/accel0"], [], "", ""),  # where JAX_PLATFORMS is empty, it doesn't
        (["libtpu", "jax_cuda13_plugin"], [], ["xla_cuda13"], None, "cpu"),
        (["libtpu", "jax_cuda13_plugin"], ["/dev/nvidia0"], ["xla_cuda13"], None, None),
        (["libtpu"], [], ["of_another_device"], None, None),
        ([], [], [], None, None),
    ],
)
def test_platforms_with_libtpu(monkeypatch, installed, devices, plugins, given, expected):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: [d for d in devices if fnmatch.fnmatch(d, pattern)])
    points = [importlib.metadata.EntryPoint(name, "module", "jax_plugins") for name in plugins]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **group: points)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", given)
        startup.leave_out_libtpu()
        assert jax.config.jax_platforms == expected
    finally:
        jax.config.update("jax_platforms", before)
