"""The region of a bucket and that of this machine, between which reading and saving are slow."""

import contextlib
import os
from pathlib import Path

from peer_jax import storage

# The regions of Google's own pairs, which a bucket does not tell: cloud.google.com/storage/docs/locations.
DUAL_REGIONS = {
    "nam4": ("us-central1", "us-east1"),
    "eur4": ("europe-north1", "europe-west4"),
    "eur5": ("europe-west1", "europe-west2"),
    "eur7": ("europe-west2", "europe-west3"),
    "eur8": ("europe-west3", "europe-west6"),
    "asia1": ("asia-northeast1", "asia-northeast2"),
}


def far_away(path: str | os.PathLike) -> str | None:
    """What to say if a bucket is in another region than this machine of Google Cloud.

    None if it isn't, if this is no such machine, or if the bucket's region may not be asked for.
    """
    if not storage.is_in_bucket(path) or (region := _region()) is None:
        return None
    name, _ = storage.bucket_and_name(path)
    try:
        bucket = storage.client().get_bucket(name)
    except Exception as error:  # who works in the bucket later says what is wrong
        if storage.fault(error) is None and not isinstance(error, ImportError):
            raise
        return None
    where = bucket.data_locations or DUAL_REGIONS.get(bucket.location.lower()) or [bucket.location]
    where = [place.lower() for place in where]
    continent = {"us": "us-", "eu": "europe-", "asia": "asia-"}
    if any(region == place or region.startswith(continent.get(place, region + ".")) for place in where):
        return None
    return (
        f"{storage.BUCKETS}{name} is in {bucket.location} and this machine in {region}: reading and saving are slow "
        "and their traffic costs, so take a bucket and machines in one region"
    )


def _region() -> str | None:
    """The region of this machine of Google Cloud, as its metadata server says; None for other machines.

    GCE_METADATA_HOST names another metadata server, as it does for google-auth.
    """
    import urllib.request  # which takes longer to import than the rest of this module

    server = os.environ.get("GCE_METADATA_HOST")
    product = Path("/sys/class/dmi/id/product_name")
    with contextlib.suppress(OSError):
        if server or product.read_text().startswith("Google"):
            asked = urllib.request.Request(
                f"http://{server or 'metadata.google.internal'}/computeMetadata/v1/instance/zone",
                headers={"Metadata-Flavor": "Google"},
            )
            with urllib.request.urlopen(asked, timeout=2) as answer:
                return answer.read().decode().rpartition("/")[2].rpartition("-")[0]
    return None
