"""Every file in configs/ is parsed and built, without memory for its parameters and without the network."""

import itertools
import re

import jax
import pytest
from flax import nnx
from small_runs import CONFIGS, SEQ_LEN, load

from peer_jax import config
from peer_jax.data.corpora import TfdsCorpus
from peer_jax.data.prepared import PreparedCorpus
from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE, MuMoE, SoftMoE
from peer_jax.training import loop

LAYERS, SIZES, DATA = (sorted((CONFIGS / folder).glob("*.gin")) for folder in ("layers", "sizes", "data"))
VISION = ("vision", "vision/sizes", "vision/data")  # which test_vision.py builds
METHODS = {"dense": Dense, "moe": MoE, "moe_token_choice": MoE, "moe_fine_grained": MoE} | {
    "pkm": PKM,
    "memory_plus": PKM,
    "peer": PEER,
    "mumoe": MuMoE,
    "soft_moe": SoftMoE,
}


def name(path):
    return path.stem


def files(layer, size, data):
    return [CONFIGS / "base.gin", layer, size, data]


pytestmark = pytest.mark.usefixtures("trains")


@pytest.fixture
def needed(tmp_path, tiny):
    """Bindings for what the user has to give: a length, and a path where the data are the user's own."""

    def local():
        text = tmp_path / "text.txt"
        text.write_text("some text\n" * 100)
        return [f"local_files.{key}={str(text)!r}" for key in ("path", "validation_path")]

    def prepared():
        return [f"prepared.path={str(load(tiny).task.cache_path())!r}", f"TextTask.seq_len={SEQ_LEN}"]

    def needed(data):
        given = [
            give() for give, name in ((local, "@local_files()"), (prepared, "@prepared()")) if name in data.read_text()
        ]
        return ["Run.steps=10", *itertools.chain(*given)]

    return needed


def test_there_are_configs():
    assert {path.stem for path in LAYERS} == METHODS.keys()
    assert {path.stem for path in DATA} >= {"python_stdlib", "python_packages", "prepared"}
    assert {path.stem for path in SIZES} >= {"tiny"}
    folders = ("layers", "sizes", "data", "sweeps", "sweeps/shared", *VISION)
    assert {path.parent for path in CONFIGS.rglob("*.gin")} <= {CONFIGS, *(CONFIGS / folder for folder in folders)}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.gin")), ids=name)
def test_file_opens_with_what_it_is(path):
    text = path.read_text().splitlines()
    assert re.match(r"# \w.* \w", text[0]), text[0]
    assert all(len(line) <= 120 for line in text)


@pytest.mark.parametrize(("layer", "size"), list(itertools.product(LAYERS, SIZES)), ids=name)
def test_model_is_built(needed, layer, size):
    data = CONFIGS / "data" / "python_stdlib.gin"
    run = config.load(files(layer, size, data), needed(data))
    trainer = run.trainer()
    model = trainer.abstract_model
    sparse = [type(block.ffw) for block in model.blocks if type(block.ffw) is not Dense]
    blocks = {"dense": 0, "memory_plus": 2 if size.stem == "tiny" else 3}.get(layer.stem, 1)
    assert sparse == [METHODS[layer.stem]] * blocks
    state = trainer.abstract_state()
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == model.num_params()
    tokens = jax.ShapeDtypeStruct((run.batch_size, run.task.seq_len), "int32")
    logits, _ = nnx.eval_shape(lambda model, tokens: model(tokens), model, tokens)
    assert logits.shape == (*tokens.shape, model.vocab_size)
    assert run.num_steps(model) == 10
    run.optimizer.rates(trainer.labels, 0, 10)  # every table has its rate


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("TABEL_RATE=0.1", ["TABEL_RATE", "did you mean TABLE_RATE?"]),
        ("PEER.param_dtype=%bfloat16", ["PEER.param_dtype", "set Transformer.param_dtype"]),
        ("Transformer.vocab_size=10", ["Transformer.vocab_size", "set TextTask.vocabulary"]),
        ("Transformer.dtype=%float16", ["%float16", "%bfloat16"]),
        ("PEER.num_experts=%MANY", ["MANY is not set"]),
        ("PEER.up_init=@normal", ["did you mean @normal()?"]),
        ("Run.seed=-1", ["seed is -1"]),
        ("Run.training_flops=1e400", ["training_flops=inf"]),
        ("AdamW.eps=0.0", ["eps=0.0"]),
        ("AdamW.b1=1.0", ["b1=1.0"]),
        ("AdamW.table_learning_rate=-0.1", ["table_learning_rate=-0.1"]),
        ("Transformer.rope_theta=0.0", ["rope_theta=0.0"]),
    ],
)
def test_bindings_that_would_do_nothing_or_harm_are_refused(binding, words):
    def steps():
        data = CONFIGS / "data" / "python_stdlib.gin"
        run = config.load(files(CONFIGS / "layers" / "peer.gin", CONFIGS / "sizes" / "tiny.gin", data), [binding])
        return run.num_steps(run.trainer().abstract_model)

    with pytest.raises(InputError) as refusal:
        steps()
    message = str(refusal.value)
    for word in words:
        assert word in message
    assert len(message) < 200


def test_a_missing_size_is_said_in_one_sentence():
    stack = [CONFIGS / "base.gin", CONFIGS / "layers" / "peer.gin", CONFIGS / "data" / "python_stdlib.gin"]
    with pytest.raises(InputError, match=r"[A-Z_]+ is not set: add a config that sets it"):
        config.load(stack)


@pytest.mark.parametrize("data", DATA, ids=name)
def test_data_are_named(needed, data):
    run = config.load(files(CONFIGS / "layers" / "peer.gin", CONFIGS / "sizes" / "tiny.gin", data), needed(data))
    assert run.task.corpus.name
    for task in (run.task, *run.eval_tasks):
        assert task.seq_len == run.task.seq_len
        if isinstance(task.corpus, TfdsCorpus):  # its fingerprint is that of the names: nothing is downloaded
            assert ":" in task.corpus.builder
            assert task.corpus.fingerprint()
        if isinstance(task.corpus, PreparedCorpus):
            assert task.cache_path() == task.corpus.path


@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_kept_config_reads_back(needed, tmp_path, layer):
    """The text of a config is itself a config, of the same run, and describes itself in the same words."""
    data = CONFIGS / "data" / "python_stdlib.gin"
    first = config.load(files(layer, CONFIGS / "sizes" / "tiny.gin", data), needed(data))
    kept = tmp_path / "config.gin"
    kept.write_text(first.config.text)
    run = config.load([kept])
    run.trainer()
    assert run.config == first.config
    assert run.config.difference(kept.read_text()) is None
    assert isinstance(run, loop.Run)
    assert run.steps == 10
