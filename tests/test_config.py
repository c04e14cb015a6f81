"""What is loaded is a value: runs side by side, their text, kinds of fields, kept configs, modules of one's own."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from small_runs import CONFIGS

from peer_jax import config
from peer_jax.errors import InputError
from peer_jax.gin_syntax import literal, parse_binding, parse_value
from peer_jax.run_directory import RunDirectory
from peer_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("trains")

EARLIER = Path(__file__).parent / "earlier_run"  # a run directory that an earlier version wrote, killed at step 4 of 8
LAYER = """
import jax.numpy as jnp
from flax import nnx
from peer_jax.layers import Aux, FeedForward


class Scaled(FeedForward):
    def __init__(self, d_model, scale: float = 0.5, *, dtype=None, param_dtype=jnp.float32, rngs):
        self.scale = scale
        self.kernel = nnx.Param(jnp.full((d_model,), scale, param_dtype))

    def __call__(self, x, mask=None):
        return x * self.kernel[...], Aux(jnp.zeros(()), {})

    def flops_per_token(self, seq_len):
        return 2 * self.num_params()


def scaled(d_model, *, scale: float = 2.0, dtype=None, param_dtype=jnp.float32, rngs):
    return Scaled(d_model, scale, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
"""


def stack(layer="peer"):
    names = ("base", f"layers/{layer}", "sizes/tiny", "data/python_stdlib")
    return [CONFIGS / f"{name}.gin" for name in names]


def load(*bindings, layer="peer", **how):
    return config.load(stack(layer), ["Run.steps=3", *bindings], **how)


@pytest.fixture
def my_layers(tmp_path, monkeypatch):
    """A module of the user's own, in the current directory."""
    name = f"my_layers_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(LAYER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


# Values


def test_loaded_runs_build_each_their_own_model_in_any_order():
    widths = (32, 64, 16)
    runs = {width: load(f"Transformer.d_model={width}", f"PEER.top_k={width // 8}") for width in widths}
    for width in (*widths, *reversed(widths)):
        model = runs[width].trainer().abstract_model
        assert (model.d_model, model.blocks[2].ffw.top_k) == (width, width // 8)
        assert f"Transformer.d_model = {width}\n" in runs[width].config.text


def test_one_load_does_not_see_the_names_of_another(my_layers):
    assert (
        load("Transformer.sparse_ffw=@Scaled", layer="dense", imports=[my_layers]).trainer().abstract_model.method.scale
        == 0.5
    )
    with pytest.raises(InputError, match="Scaled is nothing that a config can name"):
        load("Transformer.sparse_ffw=@Scaled")


def test_a_refused_load_leaves_nothing_behind():
    before = load().config
    with pytest.raises(InputError):
        load("PEER.top_k=5", "PEER.tpo_k=4")
    assert load().config == before


def test_the_text_does_not_depend_on_how_the_config_was_composed():
    by_macro = load("NUM_EXPERTS=64", "UP_STDDEV=0.25")
    by_binding = load("PEER.num_experts=64", "up/normal.stddev=0.25")
    assert by_macro.config.text == by_binding.config.text
    assert "NUM_EXPERTS" not in by_macro.config.text


def test_every_argument_is_a_field_with_its_value():
    fields = load("Run.seed=7").config.fields
    assert fields["Run.seed"] == "7"
    assert fields["AdamW.b1"] == "0.9"  # by default
    assert fields["AdamW.table_learning_rate"] == "{'down': 0.004, 'up': 2.0}"
    assert fields["embed/normal.stddev"] == "1.0"
    assert fields["Transformer.dtype"] == "%float32"
    assert "PEER.d_model" not in fields  # the Transformer gives it


def test_what_a_binding_changes_is_used_and_nothing_else():
    uses = load().config.uses
    assert all(map(uses, ("PEER.top_k", "NUM_EXPERTS", "TABLE_RATE", "Run.seed", "up/normal.stddev")))
    assert not any(map(uses, ("PKM.top_k", "MOE_EXPERTS", "MoE.num_experts", "PEER.nothing", "NOTHING")))
    assert not load("PEER.num_experts=64").config.uses("NUM_EXPERTS")


@pytest.mark.parametrize(
    "value",
    [None, True, -3, 1e-8, 1e999, -1e999, "it's", (1,), (), [1, (2.5, "a")], {"a": {1e11: ("b",)}, 3: None}, 10**20],
    ids=repr,
)
def test_a_literal_reads_back(value):
    assert parse_value(literal(value)) == value
    assert type(parse_value(literal(value))) is type(value)


def test_bindings_travel_between_processes():
    binding = parse_binding("Transformer.sparse_ffw = {'a': (@x/PEER(), %float32)}")
    assert pickle.loads(pickle.dumps(binding)) == binding
    assert literal(binding.value) == "{'a': (@x/PEER(), %float32)}"


def test_a_string_in_a_sweep_that_names_a_reference_is_one():
    binding = config.Binding("Transformer.sparse_ffw", "@PKM", "")
    run = config.load(stack("dense"), ["Run.steps=3", "PKM.num_experts=64", "PKM.d_key=4", binding])
    assert run.trainer().abstract_model.method.name == "PKM"


# Scopes, macros, includes


def test_a_scope_has_its_own_bindings_over_the_common_ones(tmp_path):
    run = load("normal.stddev=3.0", "up/normal.stddev=0.125")
    assert run.config.fields["up/normal.stddev"] == "0.125"
    assert run.config.fields["embed/normal.stddev"] == "1.0"
    kept = tmp_path / "config.gin"
    kept.write_text(run.config.text)
    assert config.load([kept]).config == run.config


def test_files_are_included_from_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.gin").write_text("include 'b.gin'\nRun.batch_size = 6\n")
    (tmp_path / "deep" / "b.gin").write_text("Run.batch_size = 4\nRun.seed = 5\n")
    monkeypatch.chdir(tmp_path)
    run = config.load([*stack(), "deep/a.gin"], ["Run.steps=3"])
    assert (run.batch_size, run.seed) == (6, 5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("include 'a.gin'\n", ["includes itself"]),
        ("include 'no.gin'\n", ["no.gin", "does not exist", "a.gin"]),
        ("Run.seed = %A\nA = %B\nB = %A\n", ["stands for itself"]),
        ("Transformer.ffw = @Transformer\n", ["Transformer has itself among its arguments"]),
        ("Run.seed = five\n", ["a.gin, line 1", "Python literal"]),
        ("Run.seed = 5\nRun.sed = 5\n", ["a.gin, line 2", "'sed'"]),
        ("import no_such_module\n", ["no_such_module can't be imported"]),
    ],
)
def test_a_file_that_can_not_mean_anything_is_refused(tmp_path, content, words):
    (tmp_path / "a.gin").write_text(content)
    with pytest.raises(InputError) as refusal:
        config.load([*stack(), tmp_path / "a.gin"], ["Run.steps=3"])
    for word in words:
        assert word in str(refusal.value)
    assert "<ast" not in str(refusal.value)


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("Run.steps=True", ["Run.steps = True", "int"]),
        ("Run.task=@TextTask", ["did you mean @TextTask()?"]),
        ("PEER.d_model=8", ["PEER.d_model is given", "Transformer.d_model"]),
        ("Transformer.rngs=8", ["Transformer.rngs is given", "Run.seed"]),
        ("A" * 5000 + ".x=1", ["is nothing that a config can name"]),
        ("Run.config='x'", ["Run has no argument 'config'"]),
    ],
)
def test_a_binding_that_can_not_be_is_refused_in_a_sentence(binding, words):
    with pytest.raises(InputError) as refusal:
        load(binding)
    for word in words:
        assert word in str(refusal.value)
    assert len(str(refusal.value)) < 600


# Kinds of fields, and what is kept


@pytest.mark.parametrize(
    ("binding", "name"),
    [
        ("Run.seed=1", "Run.seed"),
        ("AdamW.b1=0.5", "AdamW.b1"),
        ("PEER.top_k=8", "PEER.top_k"),
        ("up/normal.stddev=0.1", "up/normal.stddev"),
        ("Transformer.dtype=%bfloat16", "Transformer.dtype"),
        ("Transformer.sparse_ffw=None", "PEER.activation"),
        ("TextTask.seq_len=128", "TextTask.seq_len"),
    ],
)
def test_identity_binds_a_run_directory(binding, name):
    assert load(binding).config.difference(load().config.text).name == name


@pytest.mark.parametrize(
    "binding",
    [
        *("Run.checked=True", "Run.log_every=1", "Run.checkpoint_every=7", "Run.keep_checkpoints=5"),
        *("Run.evaluate_every=3", "Run.accumulation=2", "Sharding.expert=4", "Sharding.tables='columns'"),
        *(
            "TextTask.corpus=@python_packages()",
            "TextTask.vocabulary='my.model'",
        ),  # the text's fingerprint guards what they are
        *("Transformer.remat=True", "PEER.implementation='reference'", "TextTask.cache_dir='/elsewhere'"),
    ],
)
def test_placement_and_bookkeeping_do_not(binding):
    other = load(binding)
    assert other.config.difference(load().config.text) is None
    assert other.config.text != load().config.text
    assert other.config.identity == load().config.identity


def test_only_the_model_is_compared_for_an_evaluation():
    kept = load().config.text
    assert load("Run.seed=1", "AdamW.b1=0.5").config.difference(kept, of_model=True) is None
    assert load("PEER.top_k=8").config.difference(kept, of_model=True).name == "PEER.top_k"


def test_an_argument_that_a_kept_config_lacks_has_the_value_that_it_had(monkeypatch, tmp_path):
    kept = "".join(line for line in load().config.text.splitlines(keepends=True) if not line.startswith("AdamW.b2"))
    assert load().config.difference(kept) is None  # today's default is what runs did
    assert load("AdamW.b2=0.5").config.difference(kept).name == "AdamW.b2"
    monkeypatch.setitem(config.BEFORE, "AdamW.b2", 0.5)  # as if runs had done otherwise before
    assert load().config.difference(kept) == ("AdamW.b2", "0.5", "0.98")
    assert load("AdamW.b2=0.5").config.difference(kept) is None
    (tmp_path / "config.gin").write_text(kept)
    assert config.load_kept(tmp_path / "config.gin").optimizer.b2 == 0.5
    assert load().optimizer.b2 == 0.98


def test_a_kept_text_that_is_no_config_is_refused():
    with pytest.raises(InputError, match=r"config\.gin"):
        load().config.difference("Run.steps = = 3\n")


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return RunDirectory("run")


@pytest.mark.slow
def test_a_run_directory_of_an_earlier_version_resumes(earlier):
    """Its losses are those that the earlier version had undisturbed, but for rounding: the tests compile otherwise."""
    run = config.load_kept(earlier.config, bindings=["Run.log_every=1"])
    result = train(run, Path(earlier), progress=False)
    expected = [json.loads(line) for line in Path("expected_metrics.jsonl").read_text().splitlines()]
    found = list(earlier.read_metrics())
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for kind in ("loss", "validation_loss", "grad_norm"):
            assert (kind in line) == (kind in wanted)
            if kind in wanted:
                assert line[kind] == pytest.approx(wanted[kind], rel=1e-4), (line["step"], kind)
    wanted = json.loads(Path("expected_result.json").read_text())
    assert result["evaluations"]["corpus"]["loss"] == pytest.approx(wanted["evaluations"]["corpus"]["loss"], rel=1e-4)
    for name in ("steps", "tokens", "training_flops", "params_total", "params_active", "corpus"):
        assert result[name] == wanted[name]


@pytest.mark.slow
def test_the_command_that_began_a_run_in_an_earlier_version_goes_on_with_it(earlier, run_cli):
    """The config that the user has lacks what didn't exist, as that of the run does."""
    shutil.copy(earlier.config, "mine.gin")
    command = ("train", "--config", "mine.gin", "--workdir", "run", "--quiet", "--no-table")
    status, _, errors = run_cli(*command, "--set", "TextTask.cut_at_limits=True")
    assert (status, "cut_at_limits = False, now it is True" in errors) == (2, True)  # what is bound is meant
    status, _, errors = run_cli(*command)
    assert status == 0
    said = "goes on as it began: local_files.split = 'documents', TextTask.cut_at_limits = False"
    assert errors.count(said) == 1
    wanted, found = json.loads(Path("expected_result.json").read_text()), earlier.read_result()
    assert found["corpus"] == wanted["corpus"]
    assert found["evaluations"]["corpus"]["loss"] == pytest.approx(wanted["evaluations"]["corpus"]["loss"], rel=1e-4)


def test_only_what_a_begun_run_lacks_is_as_it_was():
    kept = load().config.text
    assert config.begun_with(kept) == {}
    lines = [line for line in kept.splitlines() if "cut_at_limits" not in line]
    assert config.begun_with("\n".join(lines)) == {"TextTask.cut_at_limits": False}  # its text is not local_files
    assert not load(before={"TextTask.cut_at_limits": False}).task.cut_at_limits
    assert load("TextTask.cut_at_limits=True", before={"TextTask.cut_at_limits": False}).task.cut_at_limits


def test_a_run_directory_of_an_earlier_version_is_bound_to_its_identity(earlier):
    with pytest.raises(InputError, match=r"AdamW\.b1 = 0\.9, now it is 0\.5"):
        train(config.load_kept(earlier.config, bindings=["AdamW.b1=0.5"]), Path(earlier), progress=False)


def test_a_run_directory_of_an_earlier_version_evaluates(earlier, run_cli):
    status, printed, errors = run_cli("evaluate", "--workdir", "run", "--quiet")
    assert (status, errors) == (0, "")
    assert "5.6688" in printed  # as the earlier version had it at step 4


# Modules of the user's own


def test_classes_and_functions_of_an_imported_module_can_be_named(my_layers):
    run = load("Transformer.sparse_ffw=@Scaled", "Scaled.scale=3.0", layer="dense", imports=[my_layers])
    assert run.trainer().abstract_model.method.scale == 3.0
    assert f"import {my_layers}\n" in run.config.text
    run = load("Transformer.sparse_ffw=@scaled", layer="dense", imports=[my_layers])
    assert run.trainer().abstract_model.method.scale == 2.0


def test_a_subclass_that_hands_its_arguments_on_can_be_configured(my_layers, tmp_path):
    text = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom peer_jax.layers import PEER\n"
        "from peer_jax.fields import Placed\nif TYPE_CHECKING:\n    from somewhere import Thing\n\n\n"
        "class MyPEER(PEER):\n"
        "    def __init__(self, d_model: int, *, extra: Thing = 1, where: Placed[str] = 'here', **kwargs):\n"
        "        super().__init__(d_model, **kwargs)\n        self.extra, self.where = extra, where\n"
    )
    (tmp_path / f"{my_layers}.py").write_text(text)
    bindings = ["Transformer.sparse_ffw=@MyPEER", "MyPEER.num_experts=64", "MyPEER.extra=3", "MyPEER.where='there'"]
    run = load(*bindings, layer="dense", imports=[my_layers])
    method = run.trainer().abstract_model.method
    assert (method.num_experts, method.extra, method.label) == (64, 3, "MyPEER (extra=3)")
    assert run.config.fields["MyPEER.top_k"] == "16"
    assert "MyPEER.where" in run.config.fields.keys() - run.config.identity.keys()
    with pytest.raises(InputError, match=r"MyPEER\.top_k = 2\.5"):
        load(*bindings, "MyPEER.top_k=2.5", layer="dense", imports=[my_layers]).trainer()


def test_an_initialiser_wants_a_number():
    with pytest.raises(InputError, match=r"up/normal\.stddev = 'a' is not of type float"):
        load("UP_STDDEV='a'").trainer()


def test_a_layer_that_is_called_too_early_is_explained():
    with pytest.raises(InputError, match="did you mean @Dense, without brackets"):
        load("Transformer.ffw=@Dense()").trainer()


def test_a_config_can_import_too(my_layers, tmp_path):
    (tmp_path / "mine.gin").write_text(f"import {my_layers}\nTransformer.sparse_ffw = @{my_layers}.Scaled\n")
    run = config.load([*stack("dense"), tmp_path / "mine.gin"], ["Run.steps=3"])
    assert run.trainer().abstract_model.method.name == "Scaled"
    (tmp_path / "config.gin").write_text(run.config.text)
    assert config.load_kept(tmp_path / "config.gin").config == run.config


def test_an_ambiguous_name_wants_its_module(my_layers, tmp_path):
    text = (
        (tmp_path / f"{my_layers}.py").read_text().replace("class Scaled(", "class PEER(").replace("Scaled(", "PEER(")
    )
    (tmp_path / f"{my_layers}.py").write_text(text)
    with pytest.raises(InputError, match=rf"PEER may be peer_jax\.layers\.peer\.PEER and {my_layers}\.PEER"):
        load(imports=[my_layers])


@pytest.mark.parametrize("text", ["1 / 0\n", "import no_such_thing\n", "def (\n"])
def test_a_module_that_can_not_be_imported_is_named(my_layers, tmp_path, text):
    (tmp_path / f"{my_layers}.py").write_text(text)
    with pytest.raises(InputError, match=f"{my_layers} can't be imported") as refusal:
        load(imports=[my_layers])
    assert refusal.value.argument == "import"
