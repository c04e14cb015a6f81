"""Training on 8 devices: five steps equal one device's for every layer and mesh; what the devices send one another.

Tables and experts are large beside a batch, so that a collective of a device's part of one shows by its size.
"""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives, makers
from eight_devices import measured
from flax import nnx
from reference import relative_error
from test_step import SMOOTH, B, S, V, ragged

from peer_jax.layers import PEER, PKM, Dense, MoE, MuMoE, SoftMoE
from peer_jax.models import Transformer, ViT
from peer_jax.sharding import Sharding, split_batch, use
from peer_jax.training.step import Trainer

pytestmark = pytest.mark.slow

D, N, E, F = 16, 64**2, 8, 128
IMAGE, PATCH, CLASSES = (8, 6, 3), 2, 7
SLOTS = 5  # unlike the capacities of experts, by whose sizes all-to-alls are told apart
TABLE, KERNEL = 4 * N * D, 4 * E * D * F  # bytes
STEPS = 5
RETRIEVAL = {"num_experts": N, "num_heads": 2, "d_key": 4, "top_k": 4}
LAYERS = {
    "dense": functools.partial(Dense, d_ff=24),
    "expert choice": functools.partial(MoE, num_experts=E, d_ff=F),
    "token choice": functools.partial(MoE, num_experts=E, d_ff=F, routing="token_choice", top_k=2),
    "dropless": functools.partial(MoE, num_experts=E, d_ff=F, routing="token_choice", top_k=2, capacity_factor=None),
    "soft moe": functools.partial(SoftMoE, num_experts=E, d_ff=F, slots_per_expert=SLOTS),
    "mumoe": functools.partial(MuMoE, num_experts=E, rank=4),
    "pkm": functools.partial(PKM, **RETRIEVAL),
    "peer": functools.partial(PEER, **RETRIEVAL),
    "peer, layer norm": functools.partial(PEER, **RETRIEVAL, query_norm="layer"),
}
# A block of each of the layers, and what is unusual.
MODELS = {
    "coarse": (["dense", "expert choice", "token choice", "soft moe"], {}),
    "retrieval": (["pkm", "peer"], {}),
    "dropless": (["dropless"], {}),
    "multilinear": (["mumoe"], {}),
    "vision": (["peer", "soft moe"], {"vision": True}),
    "moment a row": (["pkm", "peer"], {"moment": "row"}),
    "bfloat16": (["peer"], {"dtype": jnp.bfloat16}),
    "touched": (["pkm", "peer"], {"touched": True}),
    "shared": (["pkm", "pkm"], {"touched": True, "shared": True}),
    "accumulation": (["peer, layer norm"], {"touched": True, "accumulation": 2, "remat": True}),
}
ALONE = ((1, 1, 1), "rows")
# Devices along data, fsdp and expert, and the form of the tables.
SPLIT = [((1, 1, 8), "rows"), ((2, 1, 4), "rows"), ((4, 1, 2), "rows")]
COLUMNS = [(mesh, "columns") for mesh, _ in SPLIT]
WHOLE = [((8, 1, 1), "rows")]  # no table is split: rows are columns
FSDP = [((2, 2, 2), "rows"), ((1, 8, 1), "rows")]
RETRIEVING = [
    *(("retrieval", *case) for case in [*SPLIT, *COLUMNS, *WHOLE, *FSDP]),
    ("moment a row", (2, 1, 4), "columns"),
]
TOUCHED = [
    ("touched", (2, 1, 4), "rows"),
    ("touched", (1, 2, 4), "columns"),
    ("touched", (8, 1, 1), "rows"),
    ("shared", (2, 1, 4), "rows"),
    ("accumulation", (2, 2, 2), "rows"),
]
OTHERS = [("bfloat16", (2, 2, 2), "rows")]
COARSE = [("coarse", *case) for case in [*SPLIT, *WHOLE, *FSDP]]
DROPLESS = [("dropless", *case) for case in [*SPLIT, *WHOLE]]
MULTILINEAR = [("multilinear", (2, 2, 2), "rows")]
VISION = [("vision", (2, 2, 2), "rows"), ("vision", (2, 1, 4), "columns")]
# What a process measures.
GROUPS = {"retrieving": RETRIEVING + TOUCHED + OTHERS, "coarse": COARSE + DROPLESS + MULTILINEAR + VISION}
CASES = [case for cases in GROUPS.values() for case in cases]
# As in test_step, whose optimiser is smooth on purpose: sums in another order, some dozen roundings of 6e-8, but here
# through five steps.
EQUAL = 1e-5
# A rounding of 2^-9, some dozen times.
BF16 = 2**-5


@functools.cache
def trainer(model, *, on_mesh=False):
    names, options = MODELS[model]
    dtype, remat = options.get("dtype", jnp.float32), options.get("remat", False)
    tables = {"table_second_moment": options.get("moment", "element")}
    if "touched" in options:  # compared with steps on whole tables, on one device
        updates = "touched" if on_mesh else "all"
        tables = {"table_second_moment": "row", "table_b1": 0.0, "table_updates": updates}

    def build(*, rngs):
        layers = iter(names)

        def next_layer(*arguments, **types):
            return LAYERS[next(layers)](*arguments, **types)

        sparse = {"sparse_ffw": next_layer, "sparse_blocks": "all", "share_tables": "shared" in options}
        more = {"embed_init": nnx.initializers.normal(1.0), "dtype": dtype, "remat": remat}
        if "vision" in options:
            del more["embed_init"]
            return ViT(IMAGE, PATCH, CLASSES, D, len(names), 2, ffw=Dense, **sparse, **more, rngs=rngs)
        return Transformer(V, D, len(names), 2, ffw=Dense, **sparse, **more, rngs=rngs)

    optimizer = SMOOTH.__class__(**SMOOTH.__dict__ | tables)
    return Trainer(build, optimizer, accumulation=options.get("accumulation", 1))


@functools.cache
def initial(model):
    return jax.device_get(trainer(model).init(0))


def batch(model, step):
    """Packed rows, 8 for each micro-batch, of unlike tokens; or images, of which some count for nothing.

    Were the first token of a row its second, too, they would be as good as one another, and rounding would choose the
    one that an expert takes.
    """
    seeds = [step + 100 * part for part in range(trainer(model).accumulation)]
    rng = np.random.default_rng(seeds)
    if "vision" in MODELS[model][1]:
        images, labels = rng.integers(0, 256, (B, *IMAGE), np.uint8), rng.integers(0, CLASSES, B, np.int32)
        return {"inputs": images, "targets": labels, "segment_ids": (np.arange(B) % 5 > 0).astype(np.int32)}
    inputs = rng.permuted(np.tile(np.arange(V, dtype=np.int32), (B * len(seeds), 1)), axis=1)[:, :S]
    parts = [ragged(seed) for seed in seeds]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | {"inputs": inputs}


class Trained:
    """Five steps on a mesh: states after the first and the last, all losses, and the compiled program."""

    def __init__(self, model, mesh, form):
        data, fsdp, expert = mesh
        devices = jax.devices()[: data * fsdp * expert]
        placement = Sharding(data=data, fsdp=fsdp, expert=expert, tables=form).place(devices)
        made = trainer(model, on_mesh=placement is not None)
        with use(placement):
            self.shardings = made.shardings()

            def begin():
                state = initial(model)
                return state if placement is None else jax.device_put(state, self.shardings)

            rates = [made.optimizer.rates(made.labels, step, 2 * STEPS) for step in range(STEPS)]
            self.step = made.compiled_step().lower(begin(), split_batch(batch(model, 0)), rates[0]).compile()

            def run():
                state, states, metrics = begin(), [], []
                for step in range(STEPS):
                    state, measured = self.step(state, split_batch(batch(model, step)), rates[step])
                    measured.pop("touched_rows", None)  # a step on whole tables doesn't know it
                    states.append(jax.device_get(state))
                    metrics.append(jax.device_get(measured))
                self.last = state
                return states, metrics

            self.states, self.metrics = run()
            self.again = run()

    def repeats(self):
        """Whether both runs gave the same bits."""
        pairs = zip(jax.tree.leaves((self.states, self.metrics)), jax.tree.leaves(self.again), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    def stays(self):
        """Whether the state is still where it belongs."""
        pairs = zip(jax.tree.leaves(self.last), jax.tree.leaves(self.shardings), strict=True)
        return all(leaf.sharding.is_equivalent_to(planned, leaf.ndim) for leaf, planned in pairs)


def difference(actual, expected):
    """The largest relative error, each leaf relative to its size."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return float(np.max([relative_error(a, e) for a, e in pairs], initial=0.0))


def part_of_table(case):
    """Rows and columns of a device's part."""
    _, (*_, expert), form = case
    return (N // expert, D) if form == "rows" else (N, D // expert)


def measure(group):
    """By model: the least that any parameter moves on one device; by case: its differences from that, and the rest."""
    cases = GROUPS[group]
    alone = {model: Trained(model, *ALONE) for model in dict.fromkeys(model for model, *_ in cases)}
    found = {}
    for model, one in alone.items():
        before, after = (jax.tree.leaves(state.params) for state in (initial(model), one.states[-1]))
        found[model] = min(float(np.max(np.abs(new - old))) for new, old in zip(after, before, strict=True))
    for case in cases:
        one, many = alone[case[0]], Trained(*case)
        found[str(case)] = {
            "differences": {
                "metrics": difference(many.metrics, one.metrics),
                "gradients": difference(many.states[0].optimizer.mu, one.states[0].optimizer.mu),
                "parameters": difference(many.states[-1].params, one.states[-1].params),
                "optimizer": difference(many.states[-1].optimizer, one.states[-1].optimizer),
                "statistics": difference(many.states[-1].others, one.states[-1].others),
            },
            "repeats": many.repeats(),
            "stays": many.stays(),
            "sent": collectives(many.step.as_text()),
            "made": makers(many.step.as_text(), *part_of_table(case)),
        }
    return found


once = functools.cache(measured)


def found(model, *case):
    """What was measured of a case, or of a model on one device."""
    group = next(group for group, cases in GROUPS.items() if model in {name for name, *_ in cases})
    return once("test_sharded_training", "measure", group)[str((model, *case)) if case else model]


# Equal to one device


@pytest.mark.parametrize("model", MODELS)
def test_one_device_moves_every_parameter(model):
    """Else what follows would compare nothing."""
    assert found(model) > 5e-4


@pytest.mark.parametrize(("model", "mesh", "form"), CASES)
def test_five_steps_equal_one_device_s(model, mesh, form):
    """Metrics of every step; Adam's first moment after one, which is the clipped gradient; all of the state after five.

    And both steps that a mesh makes from the same are the same, bit for bit.
    """
    case = found(model, mesh, form)
    assert case["repeats"]
    assert case["stays"]
    differences = case["differences"]
    if model == "bfloat16":  # in which scores are so coarse that rounding soon decides what is retrieved
        assert max(differences["metrics"], differences["gradients"]) < BF16, differences
    else:
        assert max(differences.values()) < EQUAL, differences


# What is sent


def sizes(model, mesh, form, *kinds):
    return [size for kind, size in found(model, mesh, form)["sent"] if kind in kinds]


def kinds(model, mesh, form):
    return {kind for kind, _ in found(model, mesh, form)["sent"]}


@pytest.mark.parametrize(("model", "mesh", "form"), RETRIEVING)
def test_tables_stay_where_they_are(model, mesh, form):
    """No part of one is sent, and its gradient is only between devices that hold the same part."""
    data, fsdp, expert = mesh
    part = TABLE // expert
    required = {"all-reduce"}
    if expert > 1:
        required |= {"all-gather", "reduce-scatter"} | ({"all-to-all"} if form == "columns" else set())
    # Dense kernels, and the embeddings of tokens.
    backbone = {"all-gather", "all-to-all", "collective-permute"} if fsdp > 1 else set()
    found_kinds = kinds(model, mesh, form)
    assert required <= found_kinds <= required | backbone
    moved = sizes(model, mesh, form, *found_kinds - {"all-reduce"})
    # The operand of a reduce-scatter is as many times larger as there are devices along an axis.
    assert max(moved, default=0) * expert < part
    reduced = sum(size for size in sizes(model, mesh, form, "all-reduce") if size >= part)
    if data * fsdp == 1:
        assert reduced == 0
    else:
        assert 3 * part <= reduced < 3.5 * part  # those of `values`, `down` and `up`, maybe others along with them


@pytest.mark.parametrize(("model", "mesh", "form"), TOUCHED)
def test_steps_on_touched_rows_make_and_send_nothing_of_a_table_s_size(model, mesh, form):
    """A micro-batch touches at most 384 rows of a part, which has 1024 or more. Gradients of two tables are no sum."""
    assert found(model, mesh, form)["made"] == []
    assert found("retrieval", (2, 1, 4), form)["made"]
    assert sum(sizes(model, mesh, form, "all-reduce")) < 2 * TABLE // mesh[-1]
    others = kinds(model, mesh, form) - {"all-reduce"}
    assert max(sizes(model, mesh, form, *others), default=0) * mesh[-1] < TABLE // mesh[-1]


@pytest.mark.parametrize(("model", "mesh", "form"), COARSE)
def test_rows_go_to_their_experts_and_come_back(model, mesh, form):
    """By all-to-all, as their gradients do: E C rows of a sequence a device. Experts, routers' scores: not at all."""
    _, fsdp, expert = mesh
    sent = Counter(sizes(model, mesh, form, "all-to-all"))
    for capacity in (math.ceil(S / E), math.ceil(2 * S / E), SLOTS):
        assert sent.pop(4 * E * capacity * D, 0) == (4 if expert > 1 else 0)
    # With fsdp, also the embeddings of tokens, and a device's own experts, of which it holds a part of the width.
    assert max(sent, default=0) <= (4 * S * D if fsdp > 1 else 0)
    assert max(sizes(model, mesh, form, "all-gather"), default=0) == (KERNEL // expert if fsdp > 1 else 0)
    assert max(sizes(model, mesh, form, "collective-permute"), default=0) <= (4 * S * D if fsdp > 1 else 0)


@pytest.mark.parametrize(("model", "mesh", "form"), DROPLESS)
def test_experts_are_not_gathered_without_capacity_either(model, mesh, form):
    moved = sizes(model, mesh, form, "all-gather", "all-to-all", "collective-permute")
    assert bool(moved) == (mesh[-1] > 1)
    assert max(moved, default=0) < KERNEL // E
