"""The files of a checkpoint: whether it is finished, whether every byte is as it was written, its validation loss."""

import json
import math

import orbax.checkpoint as ocp
from etils import epath

from peer_jax import digests, storage

METRIC = "validation_loss"
DIGESTS = "digests.json"
COMMIT = "commit_success.txt"  # what Orbax writes last to a checkpoint in a bucket
# What Orbax writes after the digests, and the digests themselves. Nothing of a run is read from the first two.
WITHOUT_DIGEST = {"_CHECKPOINT_METADATA", COMMIT, DIGESTS}


def finished_steps(directory: epath.Path) -> list[int]:
    """The steps that have a finished checkpoint in the folder, oldest first."""
    return sorted(int(path.name) for path in storage.listed(directory) if path.name.isdecimal() and _is_finished(path))


def unfinished_steps(directory: epath.Path) -> list[int]:
    """The steps whose checkpoint in a bucket is not finished. In a folder, such a checkpoint has another name."""
    if not storage.is_in_bucket(directory):
        return []
    found = storage.listed(directory)
    return sorted(int(path.name) for path in found if path.name.isdecimal() and not _is_finished(path))


def _is_finished(path: epath.Path) -> bool:
    try:
        with storage.as_os_errors(path):
            return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)
    except storage.BucketError:
        raise
    except OSError:  # a run may be removing it
        return False


def write_digests(directory: epath.Path, step: int) -> None:
    """Adds the digests of all its files to the checkpoint of a step, just before Orbax makes it a finished one.

    A local folder has another name until then. A bucket has no renaming: there, the folder has its name from the
    beginning, and the file that Orbax adds last makes it a checkpoint.
    """
    unfinished = directory / f"{step}{ocp.path.step.TMP_DIR_SUFFIX}"
    folder = unfinished if unfinished.exists() else directory / str(step)
    found = digests.of_folder(folder)
    kept = {name: digest for name, digest in found.items() if name not in WITHOUT_DIGEST}
    (folder / DIGESTS).write_text(json.dumps(kept, indent=2))


def read_digests(folder: epath.Path) -> dict[str, str] | None:
    """The digests of a checkpoint's files; None for a checkpoint of an earlier version, which wrote none.

    Raises:
        ValueError: if they are damaged.
    """
    try:
        if (content := storage.read(folder / DIGESTS)) is None:
            return None
        kept = json.loads(content)
    except (OSError, ValueError):
        kept = None
    if not isinstance(kept, dict) or not kept:
        raise ValueError(f"{DIGESTS} is damaged")
    return kept


def lacks_digests(folder: epath.Path) -> bool:
    """Whether a checkpoint has no digests, because an earlier version wrote it or because it is being removed."""
    return not (folder / DIGESTS).exists()


def check(folder: epath.Path, share: int = 0, shares: int = 1) -> None:
    """Reads every file of a checkpoint.

    Args:
        folder: of the checkpoint.
        share, shares: check only this one of so many shares of the files.

    Raises:
        ValueError: if a file is missing, can't be read or has another digest than when it was written.
    """
    kept = read_digests(folder) or {}
    _raise(digests.changed(folder, {name: kept[name] for name in sorted(kept)[share::shares]}))


def _raise(changed: list[str]) -> None:
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise ValueError(f"{changed[0]}{more} is not what was written")


def read_loss(folder: epath.Path) -> float | None:
    """The validation loss of a checkpoint; None if none was measured.

    Raises:
        ValueError: if it is damaged.
    """
    kept = read_digests(folder) or {}
    _raise(digests.changed(folder, {name: digest for name, digest in kept.items() if name.startswith("metrics/")}))
    try:
        if (content := storage.read(folder / "metrics" / "metrics")) is None:
            return None
        loss = json.loads(content)[METRIC]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError("metrics/metrics is damaged") from error
    if not isinstance(loss, (int, float)) or not math.isfinite(loss):
        raise ValueError("metrics/metrics is damaged")
    return loss
