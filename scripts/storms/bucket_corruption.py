"""Damages the newest checkpoint of a run in a bucket, or a prepared text there, one object at a time, and reads it.

As ``corruption.py`` does with files, and an object may have the content of another one. The bucket is an emulator's.
"""

import collections
import logging
import os
import random
import shutil
from pathlib import Path

import small
from bucket import emulated
from corruption import GOOD, WAYS, Messages, classify, damaged


def storm(folder: Path, draw: random.Random, count: int) -> collections.Counter:
    """Counts how ``count`` readings of each kind end."""
    with emulated() as address:
        return _storm(folder, address, draw, count)


def _storm(folder: Path, address: str, draw: random.Random, count: int) -> collections.Counter:
    import jax
    from small_runs import SEQ_LEN, arrays, load, train

    from peer_jax import storage
    from peer_jax.data.cache import publish
    from peer_jax.data.pipeline import TextTask, ensure_prepared, open_cache
    from peer_jax.data.prepared import prepared
    from peer_jax.training.checkpoint import Checkpoints

    jax.config.update("jax_numpy_dtype_promotion", "standard")
    os.environ["PEER_JAX_CACHE"] = str(folder / "copies")
    tiny = small.tiny_config(folder)
    bindings = ("Run.steps=6", "Run.checkpoint_every=2", "Run.evaluate_every=2", "Run.keep_checkpoints=3")
    train(tiny, f"{address}/run", *bindings, layer="peer")
    run = load(tiny, *bindings, layer="peer")
    checkpoints, text = storage.place(f"{address}/run/checkpoints"), storage.place(f"{address}/text")
    publish(ensure_prepared(run.task, progress=False), text)
    abstract = run.trainer().abstract_state()

    def read_checkpoint(step: int | None = None):
        with Checkpoints(checkpoints, read_only=True) as opened:
            step, state, position = opened.restore(abstract, step)
        position = {name: position[name] for name in ("text", "batches")}
        return step, ({name: value.tobytes() for name, value in arrays(state).items()}, position)

    def read_text():
        shutil.rmtree(folder / "copies", ignore_errors=True)
        path = ensure_prepared(TextTask(prepared(text), SEQ_LEN), progress=False)
        texts = [open_cache(path, split) for split in ("train", "validation")]
        rows = [text.take(range(text.rows)) for text in texts]
        return "text", [{name: array.tobytes() for name, array in taken.items()} for taken in rows]

    kinds = {
        "checkpoint": (checkpoints / "6", read_checkpoint, {step: read_checkpoint(step)[1] for step in (2, 4, 6)}),
        "text": (text, read_text, {"text": read_text()[1]}),
    }
    messages = Messages()
    logging.getLogger().addHandler(messages)
    ends: collections.Counter = collections.Counter()
    for kind, (place, read, expected) in kinds.items():
        whole = {name: storage.read(place / name) for name in sorted(storage.checksums(place))}
        names = draw.sample(sorted(whole), len(whole))
        for trial in range(count):
            name, way = names[trial % len(names)], draw.choice((*WAYS, "other"))
            other = whole[draw.choice(names)]
            content = other if way == "other" else damaged(whole[name], way, draw)
            storage.remove(place / name) if content is None else storage.write_whole(place / name, content)
            how = f"{kind}: {classify(read, expected, messages)}"
            if how not in GOOD:
                small.say(trial, f"{way} of {name}: {how}")
            ends[how] += 1
            storage.write_whole(place / name, whole[name])
    logging.getLogger().removeHandler(messages)
    return ends


if __name__ == "__main__":
    small.main(storm, __doc__, GOOD, 300)
