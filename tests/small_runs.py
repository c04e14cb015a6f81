"""The small text and model that many test files train, and what they read back from a run directory."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from peer_jax import config
from peer_jax.data.corpora import local_files
from peer_jax.data.pipeline import TextTask, ensure_prepared
from peer_jax.run_directory import RunDirectory
from peer_jax.training import loop
from peer_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PROGRAM = (sys.executable, "-m", "peer_jax")
SEQ_LEN = 32
BATCH = 4

TINY = """
Transformer.d_model = 16
Transformer.num_blocks = 2
Transformer.num_heads = 2
NUM_EXPERTS = 64
MEMORY_BLOCKS = (0, 1)
MOE_EXPERTS = 4
D_KEY = 8
PEER.top_k = 4
PKM.top_k = 4
TextTask.corpus = @local_files()
TextTask.seq_len = {seq_len}
TextTask.cache_dir = {cache!r}
local_files.path = {corpus!r}
local_files.validation_share = 0.1
Run.batch_size = {batch}
Run.log_every = 1
AdamW.learning_rate = 0.01
AdamW.warmup_steps = 5
"""

SWEEP = """
Sweep.configs = ({base!r}, {size!r}, {tiny!r})
Sweep.layers = {layers!r}
Sweep.methods = ("dense", "peer")
Sweep.sizes = {{"d8": {{"Transformer.d_model": 8}}}}
Sweep.budgets = (2e8,)
Sweep.seeds = (0, 1)
Sweep.bindings = {{"Transformer.num_blocks": 1, "Run.checkpoint_every": 20, "Run.evaluate_every": 1000}}
Sweep.min_steps = 1
Sweep.max_epochs = 1e6
"""


# The optimiser of tables that has two moments per element, instead of that of the configs.
ADAM = ("AdamW.table_b1=None", "AdamW.table_second_moment='element'")


def write_text(path, seed=0):
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "small",
        "birds",
        "sing",
    ]
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(150)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tiny_config(base):
    """A gin file that goes on top of base, layer and size: a model of seconds, and text prepared once per session."""
    folder = base / "tiny_run"
    path = folder / "tiny.gin"
    if not path.exists():
        folder.mkdir()
        corpus = write_text(folder / "corpus.jsonl")
        task = TextTask(local_files(corpus, validation_share=0.1), SEQ_LEN, cache_dir=folder / "cache")
        ensure_prepared(task, progress=False)
        path.write_text(TINY.format(seq_len=SEQ_LEN, cache=str(folder / "cache"), corpus=str(corpus), batch=BATCH))
    return path


def sweep_config(folder, tiny):
    """A gin file of a sweep of four runs of seconds."""
    path = folder / "sweep.gin"
    files = {"base": CONFIGS / "base.gin", "size": CONFIGS / "sizes" / "tiny.gin", "tiny": tiny}
    path.write_text(SWEEP.format(layers=str(CONFIGS / "layers"), **{name: str(file) for name, file in files.items()}))
    return path


def stack(tiny, layer="dense"):
    """The files of a run."""
    return [CONFIGS / "base.gin", CONFIGS / "layers" / f"{layer}.gin", CONFIGS / "sizes" / "tiny.gin", tiny]


def load(tiny, *bindings, layer="dense"):
    return config.load(stack(tiny, layer), bindings)


def train(tiny, folder, *bindings, layer="dense"):
    return loop.train(load(tiny, *bindings, layer=layer), folder, progress=False)


# For processes that are killed, which could leave half of a program for others: JAX does not write programs whole.
KEEPS_NO_PROGRAMS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e6"}


def environment(**more):
    """The environment of processes that tests start. It lets them keep bytecode: importing takes most of their time."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | more


def start_process(command, **variables):
    """Starts a command at the root of the project, on the CPU and with these variables; its output can be read."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(**{"JAX_PLATFORMS": "cpu"} | variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=120):
    """Waits until a condition holds, and returns what it gives."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.002)
    return value


def read_until(process, *sayings):
    """What a process writes to standard error until it has said all of this."""
    read = ""
    while not all(saying in read for saying in sayings):
        line = process.stderr.readline()
        assert line, read
        read += line
    return read


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """(step, kind) -> loss, from a log that must have each only once."""
    found = {}
    for line in lines(folder):
        for kind in ("loss", "validation_loss"):
            if kind in line:
                assert (line["step"], kind) not in found, f"{kind} of step {line['step']} twice"
                found[line["step"], kind] = line[kind]
    return found


def leaves(folder, run, step=None):
    """Every array of a checkpoint, by its path."""
    with Checkpoints(RunDirectory(folder).checkpoints, read_only=True) as checkpoints:
        _, state, _ = checkpoints.restore(run.trainer().abstract_state(), step)
    return arrays(state)


def saved_steps(folder):
    """The steps that have a checkpoint."""
    with Checkpoints(RunDirectory(folder).checkpoints, read_only=True) as checkpoints:
        return checkpoints.steps()


def arrays(state):
    def plain(leaf):
        return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return {jax.tree_util.keystr(path): plain(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same(a, b):
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def without_times(result):
    return {name: value for name, value in result.items() if name not in ("wall_seconds", "tokens_per_second")}


def handles(pid, number):
    """Whether the process has a handler of its own for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def children(pid):
    """The child processes of a process; none if it has ended."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def workers(pid):
    """The worker processes of a sweep."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def gone(pid):
    """Whether a process has ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def interrupt_at(monkeypatch, step, signal_number=signal.SIGTERM):
    """Sends this process a signal while it fetches the batch of a step."""
    make = loop.train_batches

    def make_interrupting(*args, **kwargs):
        batches = make(*args, **kwargs)

        class Interrupting:
            fetched = 0

            def __next__(self):
                self.fetched += 1
                if self.fetched == step:
                    os.kill(os.getpid(), signal_number)
                return next(batches)

            def __getattr__(self, name):
                return getattr(batches, name)

        return Interrupting()

    monkeypatch.setattr(loop, "train_batches", make_interrupting)


def refused(outcome, words):
    """Asserts that a command, by what ``run_cli`` returns, ends with status 2 and one sentence that has the words."""
    status, printed, errors = outcome
    assert (status, printed) == (2, ""), errors
    assert errors.startswith("peer-jax: ")
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    assert "<ast." not in errors
    assert "object at 0x" not in errors
    assert len(errors) < 1200
    for word in words.split():
        assert word in errors, errors


@contextlib.contextmanager
def training(folder):
    """For a module of tests: code in this context may use optax, and a second run of a config compiles nothing."""
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_numpy_dtype_promotion": "standard",  # optax raises a float to an int32 power, flax's norms meet bfloat16
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
