"""Where the processes of a run meet: by flags, and by launchers' variables as JAX understands them."""

import os

import pytest
from jax._src import clusters

from peer_jax.cluster import Place, find
from peer_jax.errors import InputError

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
RANKS = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
TPU = {"TPU_WORKER_HOSTNAMES": "host-0.jobs,host-1.jobs", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first.jobs:9915"}
NO_SLICES = {"MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": "", "MEGASCALE_COORDINATOR_ADDRESS": ""}


@pytest.fixture
def launched(monkeypatch):
    """Has the environment no variables of a launcher but these."""

    def launched(variables):
        for name in os.environ:
            if name.startswith(("SLURM_", "OMPI_", "PMIX_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR_")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("cluster", "variables"),
    [
        *(
            (clusters.SlurmCluster, SLURM | {"SLURM_STEP_NODELIST": nodes})
            for nodes in ("node7", "node7,node9", "node[001-015],x", "a-b[03,007-015],x[1-2]", "10.0.0.1", "h.x.org")
        ),
        *(
            (clusters.OmpiCluster, RANKS | {"OMPI_MCA_orte_hnp_uri": uri})
            for uri in (
                "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911",
                "1989935104.0;tcp://192.0.2.2:59379;tcp6://[fd00::2]:46187",
            )
        ),
        (clusters.GkeTpuCluster, TPU | NO_SLICES),
        (clusters.GkeTpuCluster, TPU | SLICES),
        (clusters.GkeTpuCluster, TPU | SLICES | {"TPU_WORKER_HOSTNAMES": "one", "TPU_WORKER_ID": "0"}),
        (clusters.GkeTpuCluster, TPU | NO_SLICES | {"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}),
    ],
)
@pytest.mark.parametrize("port", [{}, {"JAX_COORDINATOR_PORT": "4321"}])
def test_a_place_is_what_jax_would_find(launched, monkeypatch, cluster, variables, port):
    launched(variables | port)
    monkeypatch.setattr(cluster, "wait_for_coordinator", lambda *_: None, raising=False)
    place = find()
    given = {"timeout_secs": 1, "override_coordinator_port": port.get("JAX_COORDINATOR_PORT")}
    assert place.coordinator == cluster.get_coordinator_address(**given)
    assert (place.num_processes, place.process_id) == (cluster.get_process_count(), cluster.get_process_id())
    assert place.local_id == cluster.get_local_process_id()


def test_what_jax_finds_wrong_or_not_at_all(launched):
    """Each time, the first host is known to the launcher's own documentation or output."""
    launched(SLURM | {"SLURM_STEP_NODELIST": "rack[1-2]-eth,x"})
    assert find().host == "rack1-eth"
    launched(RANKS | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d:c083::2]:43370"})
    assert find().coordinator == f"[fe80::b9b:ac5d]:{61440 + 1314521088 // 4096 % 4096}"
    launched(RANKS | {"PMIX_NAMESPACE": "prterun-my-host.x-6842@1", "OMPI_VERSION": "5.0.11"})
    assert find().coordinator == f"my-host.x:{61440 + 6842 % 4096}"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        (SLURM, None),  # in a batch script, before srun
        (SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": ""}, ("a", 4, 3, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, ("a", 4, 3, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "a"} | RANKS | {"JAX_COORDINATOR_ADDRESS": "b:80"}, ("b", 4, 2, 0)),
        (RANKS | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_COORDINATOR_ADDRESS": "b:80"}, ("b", 4, 2, None)),
        (RANKS | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": ""}, None),
    ],
)
def test_places(launched, variables, place):
    launched(variables)
    found = find()
    assert (found and (found.host, found.num_processes, found.process_id, found.local_id)) == place


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "4"}, "SLURM_PROCID 4 is not one of 0 to 3"),
        (
            SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "x"},
            "SLURM_PROCID=x of the environment is not a number",
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_JOB_ID": ""}, "SLURM_JOB_ID= of the environment is not a number"),
        (SLURM | {"SLURM_STEP_NODELIST": ","}, "SLURM_PROCID don't come with the host of process 0: set JAX_COORD"),
        (RANKS, "OMPI_COMM_WORLD_SIZE and OMPI_COMM_WORLD_RANK don't come with the host of process 0: set JAX_COORD"),
        (RANKS | {"JAX_COORDINATOR_ADDRESS": "b"}, "JAX_COORDINATOR_ADDRESS 'b' is not HOST:PORT"),
        (TPU | SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": ""}, "TPU_WORKER_ID don't come with the host of process 0"),
        (TPU | {"TPU_WORKER_ID": ""}, "TPU_WORKER_ID= of the environment is not a number: mend it, or give --coord"),
    ],
)
def test_variables_that_cannot_be(launched, variables, says):
    launched(variables)
    with pytest.raises(InputError) as refused:
        find()
    assert says in str(refused.value)
    assert refused.value.argument is None


@pytest.mark.parametrize(
    ("given", "argument", "says"),
    [
        ({"coordinator": "a:1"}, "num_processes", "coordinator given without num_processes and process_id: give all"),
        (
            {"num_processes": 2, "process_id": 0},
            "coordinator",
            "num_processes and process_id given without coordinator: give all",
        ),
        (
            {"coordinator": "a:1", "process_id": 0},
            "num_processes",
            "coordinator and process_id given without num_processes: give all",
        ),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id", "2 is not one of 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "process_id", "-1 is not one of 0 to 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 1}, "coordinator", "'a' is not HOST:PORT"),
        ({"coordinator": ":1", "num_processes": 2, "process_id": 1}, "coordinator", "':1' is not HOST:PORT"),
        ({"coordinator": "a:70000", "num_processes": 2, "process_id": 1}, "coordinator", "'a:70000' is not HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(given, argument, says):
    with pytest.raises(InputError) as refused:
        find(**given)
    assert (str(refused.value), refused.value.argument) == (says, argument)


def test_flags_go_first(launched):
    launched(SLURM | {"SLURM_STEP_NODELIST": "a"})
    place = find("[::1]:80", 2, 1)
    assert place == Place("::1", 80, 2, 1, local_id=1)
    assert place.coordinator == "[::1]:80"
