"""Which faults of buckets may pass, and what comes of those that do."""

import gcsfs
import google.auth.exceptions
import pytest
import requests
from google.api_core import exceptions as api
from hosts import free_port
from small_runs import load, stack

from peer_jax import storage
from peer_jax.sweeps.tasks import Task, do

SHORT = ("Run.steps=2",)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (api.Forbidden("no"), 2),
        (api.NotFound("no"), 2),
        (api.BadRequest("no"), 2),
        (api.TooManyRequests("no"), 75),
        (api.ServiceUnavailable("no"), 75),
        (api.RetryError("no", None), 75),
        (google.auth.exceptions.DefaultCredentialsError("no"), 2),
        (gcsfs.retry.HttpError({"code": 403, "message": "no"}), 2),
        (gcsfs.retry.HttpError({"code": 503, "message": "no"}), 75),
        (requests.ConnectionError("no"), 75),
        (OSError("Forbidden: gs://bucket/name"), 2),
        (OSError("no"), 75),
        (ConnectionResetError("no"), 75),
        (TimeoutError("no"), 75),
    ],
    ids=repr,
)
def test_what_may_pass_has_a_status_of_its_own(error, status):
    with pytest.raises(storage.BucketError) as raised, storage.as_os_errors("gs://bucket/name"):
        raise error
    assert storage.refusal(raised.value, "a sentence").status == status


def test_a_full_disk_does_not_pass():
    assert storage.refusal(OSError(28, "No space left on device"), "a sentence").status == 2


def test_a_run_whose_bucket_does_not_answer_has_not_failed(tiny, monkeypatch):
    """Another slice, or the same one later, goes on with it."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(storage, "REACH_SECONDS", 1)
    for cached in (storage.client, storage._check_bucket):
        cached.cache_clear()
    task = Task(tuple(map(str, stack(tiny))), (), (), "gs://elsewhere/run")
    answer = do(task, lambda files, bindings, imports: load(tiny, *SHORT))
    for cached in (storage.client, storage._check_bucket):
        cached.cache_clear()
    assert answer.state == "later"
    assert "gs://elsewhere can't be used" in answer.reason
