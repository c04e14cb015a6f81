"""Damages the newest checkpoint of a run, or the text that it was trained on, one file at a time, and reads it.

Every file has its turn; where it is damaged and how (a bit is flipped, half is cut off, the rest is zeros or ones, it
is empty, it is gone) is random. Each reading must give what was written, or fall back or refuse with a message.
"""

import collections
import logging
import random
import shutil
from pathlib import Path

import small

WAYS = ("flip", "truncate", "zeros", "ones", "empty", "delete")
GOOD = {
    f"{what}: {end}"
    for what in ("checkpoint", "text")
    for end in ("noticed", "refused", "harmless", "note of no digests")
}


def damaged(content: bytes, way: str, draw: random.Random) -> bytes | None:
    """The content of a damaged file; None if it is gone. An empty file can only be deleted."""
    data = bytearray(content)
    place = draw.randrange(len(data)) if data else 0
    if way == "delete":
        return None
    if way == "flip" and data:
        data[place] ^= 1 << draw.randrange(8)
    elif way == "truncate":
        data = data[:place]
    elif way in ("zeros", "ones") and data:
        data[place:] = (b"\0" if way == "zeros" else b"\xff") * (len(data) - place)
    elif way == "empty":
        data = b""
    return bytes(data)


def damage(path: Path, way: str, draw: random.Random) -> None:
    """Damages a file."""
    content = damaged(path.read_bytes(), way, draw)
    path.unlink() if content is None else path.write_bytes(content)


class Messages(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def classify(read, expected, messages: Messages) -> str:
    """How a reading has ended: ``read`` returns a name and values, and ``expected`` has the values of each name."""
    from peer_jax.errors import InputError

    messages.texts.clear()
    try:
        name, values = read()
    except InputError:
        return "refused"
    except Exception as error:
        return f"TRACEBACK of {type(error).__name__}"
    if values != expected[name]:
        return "SILENTLY OTHER VALUES" if not messages.texts else "OTHER VALUES with a message"
    if any("digests" in text for text in messages.texts):
        return "note of no digests"
    if name != max(expected) and not messages.texts:
        return "FELL BACK IN SILENCE"
    return "noticed" if messages.texts else "harmless"


def storm(
    folder: Path, draw: random.Random, count: int, ways=WAYS, which=("checkpoint", "text")
) -> collections.Counter:
    """Counts how ``count`` readings of each kind end."""
    import jax
    from small_runs import arrays, load, train

    from peer_jax.data.pipeline import ensure_prepared, open_cache
    from peer_jax.training.checkpoint import Checkpoints

    jax.config.update("jax_numpy_dtype_promotion", "standard")
    tiny = small.tiny_config(folder)
    bindings = ("Run.steps=6", "Run.checkpoint_every=2", "Run.evaluate_every=2", "Run.keep_checkpoints=3")
    train(tiny, folder / "run", *bindings, layer="peer")
    run = load(tiny, *bindings, layer="peer")
    abstract = run.trainer().abstract_state()
    cache = ensure_prepared(run.task, progress=False)

    def read_checkpoint(copy: Path, step: int | None = None):
        with Checkpoints(copy, read_only=True) as checkpoints:
            step, state, position = checkpoints.restore(abstract, step)
        position = {name: position[name] for name in ("text", "batches")}
        return step, ({name: value.tobytes() for name, value in arrays(state).items()}, position)

    def read_text(copy: Path):
        texts = [open_cache(copy, split) for split in ("train", "validation")]
        rows = [text.take(range(text.rows)) for text in texts]
        return "text", [{name: array.tobytes() for name, array in taken.items()} for taken in rows]

    kinds = {
        "checkpoint": (
            folder / "run" / "checkpoints",
            "6",
            read_checkpoint,
            {step: read_checkpoint(folder / "run" / "checkpoints", step)[1] for step in (2, 4, 6)},
        ),
        "text": (cache, ".", read_text, {"text": read_text(cache)[1]}),
    }
    messages = Messages()
    logging.getLogger().addHandler(messages)
    ends: collections.Counter = collections.Counter()
    for kind in which:
        whole, part, read, expected = kinds[kind]
        files = sorted(path.relative_to(whole) for path in (whole / part).rglob("*") if path.is_file())
        draw.shuffle(files)
        for trial in range(count):
            copy = folder / "copy" / whole.name
            shutil.copytree(whole, copy)
            file, way = files[trial % len(files)], draw.choice(ways)
            damage(copy / file, way, draw)
            how = f"{kind}: {classify(lambda copy=copy, read=read: read(copy), expected, messages)}"
            if how not in GOOD:
                small.say(trial, f"{way} of {file}: {how}")
            ends[how] += 1
            shutil.rmtree(copy)
    logging.getLogger().removeHandler(messages)
    return ends


if __name__ == "__main__":
    small.main(storm, __doc__, GOOD, 300)
