"""A training step of PEER compiled for slices of TPUs: what a chip holds and never holds, and what chips send.

The models are small, but their programs are those of large ones: what a chunk may hold is lowered accordingly.
"""

import importlib.util
import math
import re
from typing import NamedTuple

import jax
import pytest
from small_runs import ROOT

from peer_jax import config
from peer_jax.ops import chunks, cross_entropy, traffic
from peer_jax.planning import compiled, topology
from peer_jax.sharding import part_bytes, use

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, the extra `compile`, is not installed"
    ),
    pytest.mark.filterwarnings("default"),  # what libtpu itself warns of
]

N, K, V = 128**2, 8, 259  # experts, top-k of the one head, bytes as vocabulary
ROWS, LOGITS = 2**20, 64 * V * 4  # bytes of the rows and of the logits that a chunk may hold
LONGEST_SORT = 64  # within a row


class Case(NamedTuple):
    """A row of ``seq`` tokens per chip; tables are split over ``expert`` chips, of which there are ``copies``."""

    topology: str
    tables: str
    expert: int
    copies: int
    d: int
    seq: int


CASES = [Case("v5p:2x2x1", "columns", 4, 1, 512, 384), Case("v5p:4x4x4", "rows", 8, 8, 128, 256)]


class Step(NamedTuple):
    case: Case
    compiled: compiled.Compiled
    state: int  # bytes per chip, as those of the parameters
    params: int


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.topology)
def step(request):
    case = request.param
    files = ("base.gin", "layers/peer.gin", "sizes/tiny.gin", "data/python_stdlib.gin")
    bindings = {
        "Transformer.d_model": case.d,
        "Transformer.num_blocks": 1,
        "Transformer.num_heads": case.d // 128,
        "TextTask.seq_len": case.seq,
        "Run.batch_size": case.expert * case.copies,
        "Sharding.expert": case.expert,
        "Sharding.tables": repr(case.tables),
        "NUM_EXPERTS": N,
        "RETRIEVAL_HEADS": 1,
        "PEER.top_k": K,
    }
    run = config.load([ROOT / "configs" / file for file in files], [f"{name}={of}" for name, of in bindings.items()])
    chips = topology.topology(case.topology)
    with use(run.sharding.place(chips.devices)):
        state = run.trainer().abstract_state()
        held = part_bytes(state), part_bytes(state.params)
    cached = jax.config.jax_enable_compilation_cache
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(chunks, "ACCELERATOR_BUDGET", ROWS)
        patch.setattr(cross_entropy, "LOGITS_BUDGET", LOGITS)
        jax.config.update("jax_enable_compilation_cache", False)  # a program that is read back doesn't tell its memory
        try:
            made = compiled.compile_run(run, chips)
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
    return Step(case, made, *held)


def backbone_bytes(step):
    """Bytes of all parameters but the tables, which every chip has."""
    return step.params - 2 * 4 * N * step.case.d // step.case.expert


def shapes(text):
    """The shapes of all arrays of a program."""
    found = set(re.findall(r"\b(?:bf16|pred|[fsu]\d+)\[(\d+(?:,\d+)*)\]", text))
    return {tuple(int(size) for size in shape.split(",")) for shape in found}


def test_the_state_takes_its_exact_size(step):
    """Arrays are padded to tiles, by less than a percent here. The new state takes the place of the old one."""
    batch = 3 * step.case.seq * 4
    memory = step.compiled.memory
    assert 0 <= memory.arguments - (step.state + batch) < 0.01 * step.state
    assert memory.outputs < 2**13  # metrics


def test_temporary_arrays_fit_a_count_by_hand(step):
    """Gradients of a chip's part of two tables, twice where copies are added up; three arrays of the tokens that it
    works on, or of its columns of them; six arrays of pairs, each padded since its last axis has k numbers where a
    tile has 128 lanes; four chunks of rows; and the gradients, logits and activations of the rest. Half as much again
    is allowed for what the compiler can't put into the place of another array.
    """
    _, tables, E, D, d, t = step.case
    gradients = 2 * (2 if D > 1 else 1) * 4 * N * d // E
    tokens = 3 * 4 * E * t * (d if tables == "rows" else d // E)
    pairs = 6 * 4 * E * t * 128
    activations = 16 * 4 * t * d
    counted = gradients + tokens + pairs + 4 * ROWS + backbone_bytes(step) + 3 * LOGITS + activations
    assert step.compiled.memory.temporaries < 1.5 * counted


def test_no_chip_holds_what_is_not_to_be_held(step):
    _, _, _, _, d, t = step.case
    found = shapes(step.compiled.text)
    assert max(map(math.prod, found)) < N * d  # no whole table, nor as many rows as there are pairs
    assert not [shape for shape in found if shape.count(t) > 1]  # attention's scores
    assert not [shape for shape in found if V in shape and math.prod(shape) // V % t == 0]  # all logits
    assert (64, V) in found or (64, 1, V) in found  # those of a chunk


def test_chips_send_what_the_docs_say(step):
    """The op sends what its formulas say, to the byte. The rest is sums of gradients, and some statistics and norms.

    Where tables are split by columns, a second moment per row is a sum over devices: 4 bytes per row of both tables.
    """
    _, tables, E, D, d, t = step.case
    sent = {of.kind: of.size for of in step.compiled.account.collectives}
    expected = traffic.expert_mix_step(t, K, d, N, E, D, tables)
    assert sent.get("all-gather", 0) == expected.all_gather
    assert sent.get("reduce-scatter", 0) * E == expected.reduce_scatter
    assert sent.get("all-to-all", 0) == expected.all_to_all
    moments = 2 * 4 * N if tables == "columns" else 0
    assert 0 < sent["all-reduce"] - (expected.all_reduce + expected.copies + backbone_bytes(step) + moments) < 2**10
    assert set(sent) <= {"all-gather", "reduce-scatter", "all-to-all", "all-reduce"}


def test_loops_over_own_pairs_say_how_often_they_turn(step):
    loops = [loop for loop in step.compiled.account.loops if loop.about]
    assert len(loops) == (2 if step.case.tables == "rows" else 0)
    assert all(loop.turns is not None for loop in step.compiled.account.loops)


def test_sorts_within_a_row_are_short(step):
    sorts = re.findall(r"= \(?[a-z]+\d+\[(\d+(?:,\d+)+)\]\S* .*\bsort\(", step.compiled.text)
    assert all(int(sizes.split(",")[-1]) <= LONGEST_SORT for sizes in sorts)
    assert "top_k_columns" in step.compiled.text
