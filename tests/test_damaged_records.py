"""Files of a finished run that a hand has damaged: the report names the file and the field in a sentence."""

import json
import shutil
from pathlib import Path

import pytest
from small_runs import refused

pytestmark = pytest.mark.usefixtures("unchecked_types")

RESULT = Path(__file__).parent / "earlier_run" / "expected_result.json"

# The file, the field and its value.
DAMAGES = [
    ("result.json", "steps", "many"),
    ("result.json", "steps", 0),
    ("result.json", "schema", 2),
    ("result.json", "method", None),
    ("result.json", "d_model", 16.5),
    ("result.json", "d_model", -16),
    ("result.json", "is_causal", "yes"),
    ("result.json", "num_experts", "64"),
    ("result.json", "params_active", 10**400),
    ("result.json", "training_flops", 0),
    ("result.json", "training_flops", float("inf")),
    ("result.json", "tokens", None),
    ("result.json", "forward_flops_by_part", ["a"]),
    ("result.json", "forward_flops_per_token", True),
    ("result.json", "wall_seconds", "1 s"),
    ("result.json", "config", {"Run.seed": 1}),
    ("result.json", "options", 3),
    ("result.json", "machine", {}),
    ("result.json", "corpus", "corpus"),
    ("result.json", "corpus", {"name": "other", "cache": "x"}),
    ("result.json", "evaluations", []),
    ("result.json", "evaluations", {"corpus": {"loss": "low"}}),
    ("result.json", "evaluations", {"corpus": None}),
    ("point.json", "budget", "x"),
    ("point.json", "budget", 0),
    ("point.json", "settings", []),
    ("point.json", "method", 3),
    ("point.json", "size", None),
    ("sweep.json", "methods", 3),
    ("sweep.json", "methods", [3]),
    ("sweep.json", "baseline", 3),
    ("sweep.json", "rate_exponents", {"a": "b"}),
    ("sweep.json", "tuning", 4),
    ("sweep-0.json", "runs", 3),
    ("sweep-0.json", "runs", [3]),
    ("sweep-0.json", "runs", ["../x"]),
    ("sweep-0.json", "sweep", None),
]


@pytest.mark.parametrize(("name", "field", "value"), DAMAGES, ids=lambda value: str(value)[:30])
def test_damaged_file_of_a_run(tmp_path, run_cli, name, field, value):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(RESULT, folder / "result.json")
    path = tmp_path / name if name.startswith("sweep") else folder / name
    whole = {"runs": ["run"], "sweep": {}} if name == "sweep-0.json" else {}
    whole = json.loads(RESULT.read_text()) if name == "result.json" else whole
    path.write_text(json.dumps(whole | {field: value}))
    refused(run_cli("report", tmp_path), f"{name} damaged {field if field != 'schema' else ''}")


@pytest.mark.parametrize("name", ["result.json", "run/point.json", "sweep.json", "sweep-0.json", "failed/failure.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"3", b"[" * 100_000, b"9" * 5000, b"null"], ids=lambda text: str(text)[:20]
)
def test_file_of_a_run_that_is_no_record(tmp_path, run_cli, name, content):
    (tmp_path / "run").mkdir()
    shutil.copy(RESULT, tmp_path / "run" / "result.json")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    refused(run_cli("report", tmp_path), name)
