"""Every test runs with peer_jax's shapes and types checked, and JAX refusing to promote ranks or types in silence."""

import os

# Nearly all of the suite's time is XLA compiling small programs; less optimised, they compile in about half of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

from jaxtyping import install_import_hook

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
def trains(tmp_path_factory):
    """For a module of tests that train."""
    from small_runs import training

    with training(tmp_path_factory.getbasetemp()):
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
