"""Every test runs with peer_jax's shapes and types checked, and JAX refusing to promote ranks or types in silence."""

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

# Before anything imports peer_jax: what was imported earlier stays unchecked. An int passes for a float (PEP 484).
install_import_hook("peer_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import nnx  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Files of minutes: they come first, or one process would still be at the last of them when the others have done.
LONG = ("test_hosts", "test_sharded_training", "test_sweep_processes", "test_quickstart", "test_capacity", "test_loop")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_sessionstart(session):
    """Removes the programs that were unused for longest where there are too many of them."""
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
    """Annotations are not checked, as with users, who see the errors of the functions themselves."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def params_of():
    """layer -> {"query_proj.kernel": float64 array, ...}, what the oracle takes; `kind` picks other variables."""

    def params_of(layer, kind=nnx.Param):
        flat = nnx.to_flat_state(nnx.state(layer, kind))
        return {".".join(map(str, path)): np.asarray(variable.get_value(), np.float64) for path, variable in flat}

    return params_of


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A config file of a model and a text of seconds."""
    from small_runs import tiny_config

    return tiny_config(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def trains():
    """For a module of tests that train."""
    from small_runs import training

    with training(PROGRAMS.parent):
        yield


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Runs a command in this process; its exit status, standard output and standard error."""

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
