"""One table for several blocks: the model is that of equal copies, and whatever counts or keeps tables has one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error
from small_runs import ADAM, assert_same, interrupt_at, leaves, load, losses, train, without_times

from peer_jax.errors import InputError, Interrupted
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.models import Transformer
from peer_jax.planning import capacity
from peer_jax.training import growth
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("trains")

V, D, N, BLOCKS = 13, 8, 64, 3
SIZES = {"num_experts": N, "num_heads": 2, "top_k": 2, "d_key": 4}
MEMORY_PLUS = functools.partial(PKM, gated=True, query_norm="qk", share_sub_keys=False)
TABLES = {PEER: ("down", "up"), MEMORY_PLUS: ("values",)}
# Sums of the same terms in another order.
FP32 = 2e-6


def transformer(layer, *, share_tables, sparse_blocks=(0, 2), seed=0, rngs=None, **sizes):
    sparse = functools.partial(layer, **SIZES | sizes)
    options = {"sparse_blocks": sparse_blocks, "share_tables": share_tables}
    rngs = nnx.Rngs(seed) if rngs is None else rngs
    return Transformer(V, D, BLOCKS, 2, ffw=Dense, sparse_ffw=sparse, **options, rngs=rngs)


def abstract(*arguments, **options):
    return nnx.eval_shape(functools.partial(transformer, *arguments, **options))


def text(seed=0):
    inputs, targets = np.random.default_rng(seed).integers(V, size=(2, 3, 5)).astype(np.int32)
    return {"inputs": inputs, "targets": targets, "segment_ids": np.ones_like(inputs)}


def loss_and_gradient(model):
    """The loss of a text, and its gradient."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return nnx.merge(graph, params, rest, copy=True).cross_entropy(*map(jnp.asarray, text().values()))[0]

    return jax.jit(jax.value_and_grad(loss))(params)


# The model


@pytest.mark.parametrize("layer", TABLES, ids=["PEER", "Memory+"])
def test_gradient_of_a_shared_table_is_the_sum_of_those_of_copies(layer):
    """And of everything else it is the same: sub-keys, queries and gates are those of a block."""
    shared, copies = (transformer(layer, share_tables=share) for share in (True, False))
    for name in TABLES[layer]:
        assert getattr(shared.blocks[2].ffw, name) is getattr(shared.blocks[0].ffw, name)
    before = dict(nnx.to_flat_state(nnx.state(copies)))
    assert not np.array_equal(before["blocks", 0, "ffw", "sub_keys"], before["blocks", 2, "ffw", "sub_keys"])
    for name in TABLES[layer]:  # all else is equal by construction: sharing takes nothing from the random numbers
        getattr(copies.blocks[2].ffw, name)[...] = getattr(copies.blocks[0].ffw, name)[...]

    (loss, gradient), (expected_loss, expected) = (loss_and_gradient(model) for model in (shared, copies))
    assert relative_error(loss, expected_loss) < FP32
    gradient, expected = (dict(nnx.to_flat_state(found)) for found in (gradient, expected))
    for name in TABLES[layer]:
        second = expected.pop(("blocks", 2, "ffw", name)).get_value()
        at = "blocks", 0, "ffw", name
        assert np.any(second)
        assert np.any(expected[at].get_value())
        expected[at] = expected[at].replace(expected[at].get_value() + second)
    assert gradient.keys() == expected.keys()
    for path, found in gradient.items():
        assert relative_error(found.get_value(), expected[path].get_value()) < FP32, path


def test_a_block_shares_with_itself():
    """Which changes nothing."""
    shared, alone = (transformer(PKM, share_tables=share, sparse_blocks=[1]) for share in (True, False))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(shared), nnx.state(alone))
    assert shared.num_active_params() == alone.num_active_params()


def test_more_than_ten_blocks_share_the_first_one_s_table():
    """The paths of blocks are numbers, which come in their order, not in that of the alphabet."""
    layer = functools.partial(PKM, **SIZES)
    build = functools.partial(Transformer, V, D, 12, 2, ffw=Dense, sparse_ffw=layer, sparse_blocks=[2, 10, 11])
    model = nnx.eval_shape(lambda: build(share_tables=True, rngs=nnx.Rngs(0)))
    ((path, (table, layers)),) = model.tables().items()
    assert path in dict(nnx.to_flat_state(nnx.state(model)))
    assert table is model.blocks[10].ffw.values
    assert layers == [model.blocks[index].ffw for index in (2, 10, 11)]


def growing_memory(d_model, *, sizes=[16, 64], **types):  # noqa: B006, each layer takes a size from the list
    return PKM(d_model, sizes.pop(0), num_heads=1, top_k=2, d_key=2, **types)


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        (functools.partial(MoE, num_experts=2), "MoE has no tables for blocks to share: set Transformer.share_tables"),
        (
            growing_memory,
            r"PKM can't share its table 'values' of the shape \[64, 8\] .* make all sparse blocks alike",
        ),
    ],
)
def test_what_can_t_be_shared_is_refused(sparse, words):
    options = {"sparse_ffw": sparse, "sparse_blocks": "all", "share_tables": True}
    with pytest.raises(InputError, match=words):
        Transformer(V, D, 2, 2, ffw=Dense, **options, rngs=nnx.Rngs(0))


# Counts


@pytest.mark.parametrize("layer", TABLES, ids=["PEER", "Memory+"])
def test_parameters_flops_and_moments_count_a_shared_table_once(layer):
    shared, copies = (abstract(layer, share_tables=share) for share in (True, False))
    table = len(TABLES[layer]) * N * D
    assert shared.num_params() == copies.num_params() - table
    assert shared.flops_per_token(5) == copies.flops_per_token(5)
    # Each block uses other rows, 4 of 64, so as many parameters are active as in copies.
    assert shared.num_active_params() == copies.num_active_params()
    # With 16 rows, of which each block uses 16, all are active, and they are active once.
    shared, copies = (abstract(layer, share_tables=share, num_experts=16, top_k=8) for share in (True, False))
    assert copies.num_active_params() == copies.num_params()
    assert shared.num_active_params() == shared.num_params() == copies.num_params() - table * 16 // N

    def build(share, *, rngs):
        return transformer(layer, share_tables=share, rngs=rngs)

    size = {}
    for share in (True, False):
        made = Trainer(functools.partial(build, share), AdamW(learning_rate=0.1))
        size[share] = sum(leaf.size for leaf in jax.tree.leaves(made.abstract_state().optimizer))
    assert size[True] == size[False] - 2 * table


def test_a_plan_holds_a_shared_table_once_and_splits_it(tiny):
    run = load(tiny, "Run.steps=10", *ADAM, layer="memory_plus")
    copies = load(tiny, "Run.steps=10", *ADAM, "Transformer.share_tables=False", layer="memory_plus")
    whole, table = 4 * run.trainer().abstract_model.num_params(), 4 * 64 * 16
    assert capacity.plan(run).memory.parameters == whole
    assert capacity.plan(copies).memory.parameters == whole + table
    split = capacity.plan(run, {"expert": 4})
    assert split.memory.parameters == whole - table * 3 // 4
    assert split.memory.optimizer == pytest.approx(2 * split.memory.parameters, rel=1e-3)  # and the count of steps
    assert not split.unknown


# Runs


@pytest.mark.parametrize("updates", ["all", "touched"])
def test_a_run_with_a_shared_table_resumes_bitwise_from_a_checkpoint_that_has_it_once(
    tiny, tmp_path, monkeypatch, updates
):
    resting = ["AdamW.untouched_rows='rest'", "AdamW.table_updates='touched'"] if updates == "touched" else []
    bindings = ["Run.steps=8", "Run.evaluate_every=8", *ADAM, *resting]
    never = train(tiny, tmp_path / "never", *bindings, layer="memory_plus")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            train(tiny, tmp_path / "stopped", *bindings, layer="memory_plus")
    resumed = train(tiny, tmp_path / "stopped", *bindings, layer="memory_plus")
    assert without_times(resumed) == without_times(never)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "never")
    run = load(tiny, *bindings, layer="memory_plus")
    state = leaves(tmp_path / "never", run)
    assert_same(leaves(tmp_path / "stopped", run), state)
    for part in (".params", ".optimizer.mu", ".optimizer.nu"):
        tables = [array.shape for path, array in state.items() if path.startswith(part) and "values" in path]
        assert tables == [(64, 16)], part
    parameters = sum(array.size for path, array in state.items() if path.startswith(".params"))
    assert parameters == never["params_total"] == run.trainer().abstract_model.num_params()


# Growing and freezing


def test_a_shared_table_grows_and_is_frozen_as_one():
    """Old rows, moments included, come to where they belong once; new ones are zero. Then old ones stay as they are."""

    def trainer(num_experts, frozen=None):
        def build(*, rngs):
            return transformer(PKM, share_tables=True, rngs=rngs, num_experts=num_experts)

        return Trainer(build, AdamW(learning_rate=0.1, warmup_steps=0), frozen_experts=frozen)

    small, large = trainer(N), trainer(4 * N)
    rates = small.optimizer.rates(small.labels, 0, 2)
    state, _ = jax.jit(small.step)(small.init(0), text(), rates)
    grown = growth._grown(large, small, state, 1)
    n = math.isqrt(N)
    moved = [row // n * 2 * n + row % n for row in range(N)]
    new = sorted(set(range(4 * N)) - set(moved))
    for before, after in (
        (state.params, grown.params),
        (state.optimizer.mu, grown.optimizer.mu),
        (state.optimizer.nu, grown.optimizer.nu),
    ):
        assert "values" not in after["blocks"][2]["ffw"]
        old, table = (np.asarray(part["blocks"][0]["ffw"]["values"]) for part in (before, after))
        np.testing.assert_array_equal(table[moved], old)
        assert not np.any(table[new])
    after, _ = jax.jit(trainer(4 * N, frozen=N).step)(grown, text(1), rates)
    table = np.asarray(after.params["blocks"][0]["ffw"]["values"])
    np.testing.assert_array_equal(table[moved], np.asarray(state.params["blocks"][0]["ffw"]["values"]))
    assert np.any(table[new])


def test_normalised_sub_keys_do_not_grow():
    small, large = (abstract(PKM, share_tables=True, query_norm="qk", num_experts=size) for size in (N, 4 * N))
    with pytest.raises(InputError, match=r"num_experts can't grow from 64 with query_norm='qk', .* leave num_experts"):
        large.blocks[0].ffw.grow(small.blocks[0].ffw)
