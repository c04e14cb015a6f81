"""What `peer-jax launch` emits: manifests by their published schema, scripts by bash and shellcheck, bad options."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from small_runs import ROOT

from peer_jax.errors import InputError
from peer_jax.launch import files
from peer_jax.launch.job import ENGINES, Job, minutes
from peer_jax.planning.tpus import GENERATIONS, TpuSlice, tpu_slice

SCHEMA = Path(__file__).parent / "schemas" / "jobset.json"  # published with JobSet, and has those of Job and Pod
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin") or shutil.which("shellcheck")
# What a shell and YAML have their own meaning for.
SET = """TextTask.vocabulary="it's $HOME: #1\""""
COMMAND = ("sweep", "--config", "configs/sweeps/isoflop_paper.gin", "--set", SET, "--workdir", "gs://bucket/paper")
IMAGE = "us-docker.pkg.dev/project/images/peer-jax:1"
CACHE = "gs://bucket/the cache"
GOOGLE = {"image": IMAGE, "accelerator": "v5p-32", "cache": CACHE}
JOBS = {
    "slurm": {
        "nodes": 2,
        "tasks_per_node": 8,
        "cpus_per_task": 12,
        "gpus_per_node": 8,
        "accelerator": "h100",
        "queue": "gpu",
        "account": "me",
        "time": "4:00:00",
    },
    "gke": GOOGLE | {"queue": "tpus", "service_account": "peer", "spot": True},
    "gke-plain": {"image": "peer-jax", "accelerator": "v6e-8"},
    "tpu-vm": GOOGLE | {"project": "p", "zone": "us-east5-a", "service_account": "a@b", "spot": True},
    "tpu-vm-plain": {"image": "peer-jax", "accelerator": "v5e-4", "project": "p", "zone": "us-east5-a"},
    "skypilot": GOOGLE | {"zone": "us-east5-a", "spot": True},
    "skypilot-gpus": {"image": IMAGE, "accelerator": "h100", "nodes": 2, "gpus_per_node": 8},
    "skypilot-gpu": {"image": IMAGE, "accelerator": "h200", "gpus_per_node": 1},
}


def job(kind="gke", **options):
    engine = kind if kind in ENGINES else kind.rpartition("-")[0]
    given = {"engine": engine, "command": COMMAND, "workdir": "gs://bucket/paper", "slices": 3} | JOBS[kind]
    return Job(**(given | options))


def manifests(kind="gke"):
    return list(yaml.safe_load_all(files.emit(job(kind)).files[files.JOBSETS]))


def strict(schema):
    """The schema, with fields that it doesn't name refused, as the server's strict validation does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: strict(part) for name, part in schema.items()}
    return schema | ({"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {})


# Manifests


@pytest.mark.parametrize("name", ["gke", "gke-plain"])
def test_jobsets_fit_the_published_schema(name):
    validator = jsonschema.Draft202012Validator(strict(json.loads(SCHEMA.read_text())["schema"]))
    found = manifests(kind=name)
    assert len(found) == 3
    for jobset in found:
        assert [error.message for error in validator.iter_errors(jobset)] == []
        of_job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        del of_job["template"]["spec"]["containers"]
        of_job["completion"] = jobset["spec"]["failurePolicies"] = {}
        said = " ".join(error.message for error in validator.iter_errors(jobset))
        assert all(word in said for word in ("'containers' is a required property", "'completion'", "failurePolicies"))


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="kubernetes-validate is missing")
def test_jobs_are_what_kubernetes_takes():
    import kubernetes_validate

    for jobset in manifests():
        (replicated,) = jobset["spec"]["replicatedJobs"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"]}
        kubernetes_validate.validate(job | {"spec": replicated["template"]["spec"]}, "1.31", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job | {"spec": {"template": {}, "backofLimit": 0}}, "1.31", strict=True)


def test_every_field_that_tpu_slices_need():
    found = manifests()
    assert [jobset["metadata"]["name"] for jobset in found] == [f"peer-jax-paper-{number}" for number in range(3)]
    for number, jobset in enumerate(found):
        name, spec = f"peer-jax-paper-{number}", jobset["spec"]
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        assert jobset["metadata"]["annotations"] == exclusive
        assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpus"
        assert spec["failurePolicy"]["maxRestarts"] == 100
        (rule,) = spec["failurePolicy"]["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # which the schema does not say
        assert spec["coordinator"] == {"replicatedJob": "slice", "jobIndex": 0, "podIndex": 0}
        assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
        (replicated,) = spec["replicatedJobs"]  # a slice that fails restarts no other
        assert (replicated["name"], replicated["replicas"]) == ("slice", 1)
        of_job = replicated["template"]["spec"]
        assert (of_job["completions"], of_job["parallelism"], of_job["backoffLimit"]) == (4, 4, 0)
        assert of_job["completionMode"] == "Indexed"
        (rule,) = of_job["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob"
        assert rule["onExitCodes"] == {"containerName": "peer-jax", "operator": "In", "values": [1, 2]}
        pod = of_job["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        assert pod["serviceAccountName"] == "peer"
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
            "cloud.google.com/gke-tpu-topology": "2x2x4",
            "cloud.google.com/gke-spot": "true",
        }
        assert {taint["key"] for taint in pod["tolerations"]} == {"google.com/tpu", "cloud.google.com/gke-spot"}
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert [word.replace("$$", "$") for word in container["args"]] == list(COMMAND)
        assert all(
            re.fullmatch(r"([^$]|\$\$)*", word) for word in container["args"]
        )  # $(NAME) would be a variable's value
        assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        # The name of a pod in JobSet's headless service: JOBSET-REPLICATEDJOB-JOB-POD.SUBDOMAIN.
        assert variables["PEER_JAX_CACHE"] == CACHE
        assert variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-slice-0-0.{name}:8482"
        assert {"containerPort": 8482} in container["ports"]


def test_the_coordinator_is_where_a_pod_looks_for_it():
    from peer_jax import cluster

    hosts = [f"peer-jax-paper-1-slice-0-{pod}.peer-jax-paper-1" for pod in range(4)]
    (container,) = manifests()[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    injected = {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": "2"}  # by GKE
    place = cluster.find(environment=own | injected)
    assert (place.coordinator, place.num_processes, place.process_id) == (f"{hosts[0]}:8482", 4, 2)
    assert cluster.find(environment=injected).coordinator == place.coordinator


def test_a_single_host_needs_no_node_pool_of_its_own():
    (jobset, *_) = manifests(kind="gke-plain")
    assert "annotations" not in jobset["metadata"]
    of_job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (of_job["completions"], of_job["parallelism"]) == (1, 1)
    pod = of_job["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x4"
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert "kueue.x-k8s.io/queue-name" not in jobset["metadata"]["labels"]


# Scripts


def scripts():
    return [(name, file) for name in JOBS for file in files.emit(job(name)).files if file.endswith(".sh")]


def shell_of(name):
    """The shell code in the file of SkyPilot."""
    task = yaml.safe_load(files.emit(job(name)).files[files.SKYPILOT])
    return f"#!/usr/bin/env bash\n{task['setup']}\n{task['run']}\n"


@pytest.mark.parametrize(("name", "file"), scripts(), ids=str)
def test_scripts_are_good_shell(name, file, tmp_path):
    lint(tmp_path / file, files.emit(job(name)).files[file])


@pytest.mark.parametrize("name", ["skypilot", "skypilot-gpus", "skypilot-gpu"])
def test_skypilot_runs_good_shell(name, tmp_path):
    lint(tmp_path / "run.sh", shell_of(name))


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_own_scripts_are_good_shell(path):
    lint(path, path.read_text())


def lint(path, text):
    if not path.is_file():
        path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert SHELLCHECK is not None, "install the packages of the extra dev"
    # SC2016: a word of the command may have a $ of its own.
    done = subprocess.run(
        [SHELLCHECK, "-x", "--source-path=SCRIPTDIR", "--exclude=SC2016", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


ARGUMENTS = """#!/usr/bin/env bash
printf "%s\\n" "${0##*/}" "$@" >>"$CALLS"
echo ---- >>"$CALLS"
[ "${4:-}" != describe ] || echo "$STATE"
[ "${0##*/} $1" = "$FAILS" ] || exit 0
read -r status rest <"$CALLS.statuses"
echo "$rest" >"$CALLS.statuses"
exit "$status"
"""


def calls(script, folder, programs, *arguments, state="", fails="", statuses="", ends=0):
    """What a script, which ends with a status, gives to each call of some programs.

    They only print the state of queued resources; one of them ends with one status after another.
    """
    folder.mkdir(exist_ok=True)
    (folder / "calls.statuses").write_text(statuses)
    for program in programs:
        (folder / program).write_text(ARGUMENTS)
        (folder / program).chmod(0o755)
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "SLURM_JOB_ID": "7", "STATE": state}
    variables["FAILS"] = fails
    done = subprocess.run(["bash", str(script), *arguments], env=variables, capture_output=True, text=True)
    assert done.returncode == ends, done.stderr
    return [call.strip("\n").split("\n") for call in (folder / "calls").read_text().split("----\n") if call]


@pytest.mark.parametrize(
    ("name", "program", "flags"),
    [
        ("slurm", "srun", []),
        ("tpu-vm", "docker", ["--distributed"]),
        ("tpu-vm-plain", "docker", []),
        ("skypilot", "sudo", ["--distributed"]),
        ("skypilot-gpu", "sudo", []),
    ],
)
def test_words_come_through_the_shell_as_they_were(name, program, flags, tmp_path):
    emitted = files.emit(job(name))
    files.write(emitted, tmp_path)
    (tmp_path / "run.sh").write_text(shell_of(name) if name.startswith("skypilot") else "")
    script = {"slurm": files.SLURM, "tpu-vm": files.STARTUP}.get(name.removesuffix("-plain"), "run.sh")
    given = calls(tmp_path / script, tmp_path / "bin", [program, "gcloud", "curl", "mkdir"])
    ran = [call for call in given if COMMAND[0] in call]
    assert len(ran) == 1
    assert ran[0][ran[0].index(COMMAND[0]) :] == [*COMMAND, *flags]
    if job(name).cache:
        assert ran[0][ran[0].index("--env") + 1] == f"PEER_JAX_CACHE={CACHE}"


def test_a_tpu_vm_that_has_done_its_work_deletes_itself(tmp_path):
    files.write(files.emit(job("tpu-vm")), tmp_path)
    given = calls(tmp_path / files.STARTUP, tmp_path / "bin", ["docker", "gcloud", "curl", "mkdir"])
    assert given[-1][:5] == ["gcloud", "compute", "tpus", "queued-resources", "delete"]
    assert [call[:2] for call in given].count(["docker", "run"]) == 1


@pytest.mark.parametrize("status", [0, 1, 2, 75, 134, 137, 143])
def test_slurm_starts_again_what_another_start_may_mend(status, tmp_path):
    files.write(files.emit(job("slurm")), tmp_path)
    programs = ["srun", "scontrol", "sleep"]
    again = status not in (0, 1, 2)
    said = {"fails": "srun --kill-on-bad-exit=0", "statuses": f"{status}\n", "ends": 0 if again else status}
    given = calls(tmp_path / files.SLURM, tmp_path / "bin", programs, **said)
    assert [call for call in given if call[0] == "scontrol"] == [["scontrol", "requeue", "7"]] * again


@pytest.mark.parametrize(("statuses", "runs"), [("75 137 0", 3), ("75 2", 2), ("1", 1)])
def test_a_tpu_vm_starts_again_what_another_start_may_mend(statuses, runs, tmp_path):
    """And then the slice is deleted; after a failed run and bad input by any host, as the others would only wait."""
    files.write(files.emit(job("tpu-vm")), tmp_path)
    programs = ["docker", "gcloud", "curl", "mkdir", "sleep"]
    given = calls(tmp_path / files.STARTUP, tmp_path / "bin", programs, fails="docker run", statuses=f"{statuses}\n")
    assert [call[:2] for call in given].count(["docker", "run"]) == runs
    assert given[-1][:5] == ["gcloud", "compute", "tpus", "queued-resources", "delete"]


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (1, 1), (2, 2), (75, 75), (125, 75), (137, 75)])
def test_skypilot_hears_what_another_start_may_mend(status, ends, tmp_path):
    (tmp_path / "run.sh").write_text(shell_of("skypilot-gpu"))
    script = tmp_path / "docker.sh"
    script.write_text((tmp_path / "run.sh").read_text().replace("sudo docker", "docker"))
    calls(script, tmp_path / "bin", ["sudo", "docker"], fails="docker run", statuses=f"{status}\n", ends=ends)


def test_slurm_gets_its_options():
    text = files.emit(job("slurm")).files[files.SLURM]
    said = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in re.findall(r"^#SBATCH --\S+=.*", text, re.M))
    assert said["array"] == "0-2"
    assert (said["nodes"], said["ntasks-per-node"], said["cpus-per-task"], said["gpus-per-node"]) == (
        "2",
        "8",
        "12",
        "8",
    )
    assert (said["partition"], said["account"], said["time"]) == ("gpu", "me", "4:00:00")
    assert said["signal"] == "TERM@300"
    assert "#SBATCH --requeue\n" in text
    assert " --cpus-per-task=12 peer-jax sweep " in text


def test_queued_resources_are_asked_for(tmp_path):
    files.write(files.emit(job("tpu-vm")), tmp_path)
    given = calls(tmp_path / files.QUEUED, tmp_path / "bin", ["gcloud"], "create")
    created = [call for call in given if call[4] != "describe"]
    assert [call[5] for call in created] == [f"peer-jax-paper-{number}" for number in range(3)]
    for call in created:
        assert call[1:5] == ["compute", "tpus", "queued-resources", "create"]
        pairs = dict(itertools.pairwise(call))
        assert pairs["--accelerator-type"] == "v5p-32"
        assert pairs["--runtime-version"] == "v2-alpha-tpuv5"
        assert pairs["--metadata"] == f"peer-jax-slice={call[5]}"
        assert (pairs["--project"], pairs["--zone"]) == ("p", "us-east5-a")
        assert "--spot" in call


@pytest.mark.parametrize(
    ("order", "state", "expected"),
    [
        ("create", "", ["create"]),
        ("create", "ACTIVE", []),
        ("revive", "", []),  # it has done its work
        ("revive", "ACTIVE", []),
        ("revive", "SUSPENDED", ["delete", "create"]),
        ("revive", "FAILED", ["delete", "create"]),
        ("delete", "ACTIVE", ["delete"]),
    ],
)
def test_queued_resources_are_asked_for_only_if_they_are_not_there(order, state, expected, tmp_path):
    files.write(files.emit(job("tpu-vm")), tmp_path)
    given = calls(tmp_path / files.QUEUED, tmp_path / "bin", ["gcloud"], order, state=state)
    asked = [tuple(call[4:6]) for call in given if call[4] != "describe"]
    assert asked == [(verb, f"peer-jax-paper-{number}") for number in range(3) for verb in expected]


def test_skypilot_has_a_managed_job_per_slice():
    emitted = files.emit(job("skypilot"))
    task = yaml.safe_load(emitted.files[files.SKYPILOT])
    assert [command[-2] for command in emitted.commands] == [f"peer-jax-paper-{number}" for number in range(3)]
    assert task["resources"]["accelerators"] == "tpu-v5p-32"
    assert task["resources"]["infra"] == "gcp/us-east5/us-east5-a"
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 0
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    gpus = yaml.safe_load(files.emit(job("skypilot-gpus")).files[files.SKYPILOT])
    assert (gpus["num_nodes"], gpus["resources"]["accelerators"]) == (2, "H100:8")


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed")
@pytest.mark.parametrize("name", ["skypilot", "skypilot-gpus", "skypilot-gpu"])
def test_skypilot_reads_its_file(name, tmp_path):
    import sky

    files.write(files.emit(job(name)), tmp_path)
    task = sky.Task.from_yaml(str(tmp_path / files.SKYPILOT))
    (resources,) = task.resources
    assert resources.use_spot is (name == "skypilot")
    assert resources.job_recovery["max_restarts_on_errors"] == 0


# Slices


@pytest.mark.parametrize(
    ("name", "chips", "topology", "hosts", "per_host", "cloud"),
    [
        ("v4-8", 4, "2x2x1", 1, 4, "v4-8"),
        ("v4-32", 16, "2x2x4", 4, 4, "v4-32"),
        ("v5p-8", 4, "2x2x1", 1, 4, "v5p-8"),
        ("v5p-128", 64, "4x4x4", 16, 4, "v5p-128"),
        ("v5p-12288", 6144, "16x16x24", 1536, 4, "v5p-12288"),
        ("v5e-1", 1, "1x1", 1, 1, "v5litepod-1"),
        ("v5litepod-16", 16, "4x4", 4, 4, "v5litepod-16"),
        ("v6e-8", 8, "2x4", 1, 8, "v6e-8"),
        ("v6e-256", 256, "16x16", 64, 4, "v6e-256"),
    ],
)
def test_what_the_names_of_slices_mean(name, chips, topology, hosts, per_host, cloud):
    found = tpu_slice(name)
    assert (found.chips, found.topology, found.hosts, found.chips_per_host) == (chips, topology, hosts, per_host)
    assert found.cloud_name == cloud


def test_slices_of_a_generation_have_sizes_of_their_own():
    from peer_jax.planning.capacity import DEVICES

    for generation, kind in GENERATIONS.items():
        slices = [TpuSlice(generation, topology) for topology in kind.topologies]
        assert len({found.name for found in slices}) == len(slices)
        for found in slices:
            assert tpu_slice(found.name) == found
            assert found.hosts * found.chips_per_host == found.chips <= DEVICES[found.device].domain


# Bad input


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gke", {"engine": "k8s"}, "k8s slurm gke tpu-vm skypilot"),
        ("gke", {"accelerator": None}, "not given gke v5p-32"),
        ("gke", {"accelerator": "v3-8"}, "v3-8 v4, v5p-32"),
        ("gke", {"accelerator": "v5p"}, "v5p doesn't exist"),
        ("gke", {"accelerator": "v5p-48"}, "v5p-48 cores v5p-32, v5p-64"),
        ("gke", {"accelerator": "v6e-2"}, "v6e-2 chips v6e-4"),
        ("gke", {"accelerator": "h100"}, "h100 slurm skypilot"),
        ("gke", {"image": None}, "not given gke"),
        ("gke", {"slices": 0}, "0 at least 1"),
        ("gke", {"retries": -1}, "-1"),
        ("gke", {"workdir": "runs/paper"}, "runs/paper gs://BUCKET/paper"),
        ("tpu-vm", {"workdir": "/data/paper"}, "/data/paper gs://BUCKET/paper"),
        ("skypilot", {"workdir": "paper"}, "paper gs://BUCKET/paper"),
        ("gke", {"zone": "us-east5-a"}, "not for gke --queue"),
        ("gke", {"time": "4:00:00"}, "not for gke"),
        ("gke", {"files": [Path("/home/me/own.gin")]}, "/home/me/own.gin image"),
        ("gke", {"files": [Path("../own.gin")]}, "../own.gin image"),
        ("gke", {"name": "My_job"}, "My_job a-z"),
        ("gke", {"name": "x" * 41}, "xxx 40"),
        ("gke", {"command": ("train", "--workdir", "gs://b/run")}, "3 train"),
        ("gke", {"command": ("sweep", "--set", "a=\nb")}, "line break"),
        ("tpu-vm", {"project": None}, "not given tpu-vm"),
        ("tpu-vm", {"zone": None}, "not given tpu-vm"),
        ("skypilot", {"nodes": 2}, "GPUs v5p-32"),
        ("skypilot-gpus", {"gpus_per_node": None}, "not given h100"),
        ("slurm", {"accelerator": "v5p-32"}, "v5p-32 h100 slurm"),
        ("slurm", {"accelerator": "h100", "gpus_per_node": None}, "not given h100"),
        ("slurm", {"image": IMAGE}, "not for slurm --account"),
        ("slurm", {"nodes": 0}, "0 at least 1"),
        ("slurm", {"time": "soon"}, "soon 4:00:00"),
        ("slurm", {"time": "0:30"}, "0:30 minute"),
    ],
)
def test_bad_options_are_refused(name, options, words, unchecked_types):
    with pytest.raises(InputError) as refusal:
        job(name, **options)
    for word in words.split():
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("20", 20), ("90:00", 90), ("4:00:00", 240), ("1-0", 1440), ("2-12", 3600), ("1-1:30", 1530), ("1-1:30:00", 1530)],
)
def test_times_as_slurm_writes_them(time, expected):
    assert minutes(time) == expected


def test_a_signal_comes_early_enough_and_not_at_once():
    assert [job("slurm", time=time).signal_seconds for time in ("4:00:00", "20", "8", "1")] == [300, 300, 120, 15]
