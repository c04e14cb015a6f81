"""All tests run with peer_jax's shapes and types checked, and JAX raises where it would promote ranks or types."""

import hashlib
import os
from pathlib import Path

# Nearly all of the suite's time is XLA compiling small programs; less optimised, they compile in about half of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")


def _folder_of_programs() -> Path:
    """For compiled programs. JAX names them by their code, its version and XLA's flags, but not by the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    cache = Path(os.environ.get("PEER_JAX_CACHE") or Path.home() / ".cache" / "peer_jax")
    return cache / "tests" / hashlib.sha256("".join(cpu).encode()).hexdigest()[:12] / "compiled"


# What one process compiles is loaded by the others, by the processes that tests start, and by later sessions. JAX's own
# limit of size would have it list the folder for every program: the oldest are removed when a session starts.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_folder_of_programs()))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
PROGRAMS = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
PROGRAMS_BYTES = 2**30

from jaxtyping import install_import_hook  # noqa: E402

# This comes before any import of peer_jax, because modules that are imported earlier stay unchecked. An int may stand
# for a float (PEP 484).
install_import_hook("peer_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from flax import nnx  # noqa: E402

from peer_jax.startup import leave_out_libtpu  # noqa: E402

leave_out_libtpu()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# The files that take longest come first, or one process would still be at the last of them when the others have ended.
LONG = (
    *("hosts", "slices", "sweep_processes", "launch_slurm", "sharded_training", "optimizer", "loop", "checkpoint"),
    *("bucket", "evaluate", "report", "mosaic_gpu", "sweep", "growing", "quickstart", "touched", "capacity"),
    *("gpu_check", "data_prepare", "library_use", "supervisor", "data_processes", "diverging_runs", "compiled_peer"),
    *("tpu_forms", "own_commands", "bad_inputs", "bench", "configs", "cli"),
)


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_sessionstart(session):
    """Removes the programs that were not used for longest if all of them take more than PROGRAMS_BYTES."""
    if hasattr(session.config, "workerinput") or not PROGRAMS.is_dir():
        return
    kept = 0
    files = [(file, file.stat()) for file in PROGRAMS.iterdir()]
    for file, status in sorted(files, key=lambda pair: -max(pair[1].st_atime, pair[1].st_mtime)):
        kept += status.st_size
        if kept > PROGRAMS_BYTES:
            file.unlink(missing_ok=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def unchecked_types():
    """Switches the check of annotations off, so that a test sees the errors that a user would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def params_of():
    """A function from a layer to {"query_proj.kernel": float64 array, ...}, as the oracle takes its parameters.

    ``kind`` picks another type of variables.
    """

    def params_of(layer, kind=nnx.Param):
        flat = nnx.to_flat_state(nnx.state(layer, kind))
        return {".".join(map(str, path)): np.asarray(variable.get_value(), np.float64) for path, variable in flat}

    return params_of


@pytest.fixture(scope="session", autouse=True)
def prepares_quickly(tmp_path_factory):
    """Texts are prepared by a process that stays, instead of one each that loads TensorFlow anew."""
    from preparing import Preparing

    from peer_jax.data import pipeline

    preparing = Preparing(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "preparing_command", preparing.command)
        yield
    preparing.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The config file of a model that trains in seconds, with a text that one process prepares for all."""
    from small_runs import tiny_config

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with FileLock(base / "tiny.lock"):
        return tiny_config(base)


@pytest.fixture(scope="module")
def trains():
    """The settings of JAX for a module of tests that train."""
    from small_runs import training

    with training(PROGRAMS.parent):
        yield


@pytest.fixture(scope="session")
def bucket():
    """The address of a bucket that an emulator has, for this process and those that it starts."""
    from bucket import emulated, missing

    if lacking := missing():
        pytest.skip(f"{', '.join(lacking)} not installed")
    with emulated() as address:
        yield address


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """A function that runs a command in this process and returns its exit status, standard output and error."""
    from peer_jax import cli

    def run_cli(*arguments):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["peer-jax", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, *capsys.readouterr()

    return run_cli
