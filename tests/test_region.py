"""A bucket in another region than the machine is said."""

import http.server
import threading
from types import SimpleNamespace

import pytest

from peer_jax import region, storage


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a machine of Google Cloud answers about itself."""

    def do_GET(self):
        assert self.path == "/computeMetadata/v1/instance/zone"
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"projects/1/zones/{self.server.zone}".encode())

    def log_message(self, *_):
        """Says nothing."""


@pytest.mark.parametrize(("zone", "is_far"), [("us-central1-b", False), ("us-east5-a", True), ("europe-west4-b", True)])
def test_a_bucket_in_another_region_is_said(bucket, monkeypatch, zone, is_far):
    """The emulator's bucket is in US-CENTRAL1."""
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.zone = zone
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        said = region.far_away(f"{bucket}/run")
        assert region.far_away("/a/folder") is None
        server.shutdown()
    assert bool(said) == is_far
    if is_far:
        assert said.startswith(f"{bucket} is in US-CENTRAL1 and this machine in {zone[:-2]}: ")


@pytest.mark.parametrize(
    ("location", "data_locations", "here", "is_far"),
    [
        ("US", None, "us-east5", False),
        ("US", None, "northamerica-northeast1", True),
        ("EU", None, "europe-west4", False),
        ("ASIA", None, "us-east5", True),
        ("NAM4", None, "us-east1", False),
        ("NAM4", None, "us-east5", True),
        ("US", ["US-EAST1", "US-WEST1"], "us-west1", False),
        ("US", ["US-EAST1", "US-WEST1"], "us-east5", True),
        ("US-EAST1", None, "us-east10", True),
    ],
)
def test_buckets_of_several_regions(monkeypatch, location, data_locations, here, is_far):
    bucket = SimpleNamespace(location=location, data_locations=data_locations)
    monkeypatch.setattr(storage, "client", lambda: SimpleNamespace(get_bucket=lambda name: bucket))
    monkeypatch.setattr(region, "_region", lambda: here)
    assert bool(region.far_away("gs://some/run")) == is_far


def test_a_machine_elsewhere_has_no_region(bucket):
    assert region.far_away(f"{bucket}/run") is None
