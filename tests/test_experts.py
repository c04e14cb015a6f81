"""What experts tell and how they are used, on routings whose answers are known or worked out by loops."""

import itertools
import math
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peer_jax.analysis.experts import ablations, domains, information, similarity, statements, usage
from peer_jax.analysis.experts.trace import UNKNOWN, Labels, Trace
from peer_jax.layers import PKM, MoE


def traced(indices, gates=None, num_experts=None):
    indices = np.asarray(indices, np.int32)
    gates = np.ones(indices.shape, np.float32) if gates is None else np.asarray(gates, np.float32)
    n = int(indices.max()) + 1 if num_experts is None else num_experts
    return Trace(0, n, indices, gates, np.arange(0), np.zeros((0, 4), np.float32))


def random_trace(rng, tokens=60, heads=3, k=4, n=9):
    gates = rng.random((tokens, heads, k)) * (rng.random((tokens, heads, k)) < 0.8)
    return traced(rng.integers(n, size=gates.shape), gates, n)


def labelled(of, names=None, **how):
    of = np.asarray(of)
    return Labels("task", tuple(map(str, range(of.max() + 1))) if names is None else names, of, **how)


def informed(trace, of):
    return information.mutual_information(
        information.joint(information.Uses.of(trace), np.asarray(of), int(max(of)) + 1)
    )


# Mutual information


@pytest.mark.parametrize("whole", [2**23, 0], ids=["whole", "sorted"])
def test_mutual_information_is_that_of_the_table_of_all_pairs(rng, monkeypatch, whole):
    monkeypatch.setattr(information, "WHOLE", whole)
    trace, of = random_trace(rng), rng.integers(4, size=60)
    table = np.zeros((9, 4))
    for token in range(60):
        gates = trace.gates[token].astype(np.float64)
        for place in np.ndindex(gates.shape):
            if gates.sum() > 0:
                table[trace.indices[token][place], of[token]] += gates[place] / gates.sum()
    table /= table.sum()
    expected = sum(
        p * math.log(p / (table[e].sum() * table[:, c].sum())) for (e, c), p in np.ndenumerate(table) if p > 0
    )
    assert informed(trace, of) == pytest.approx(expected, abs=1e-12)


def test_mutual_information_in_closed_form():
    four = np.arange(400) % 4
    assert informed(traced(four[:, None, None]), four) == pytest.approx(math.log(4))  # an expert per label
    assert informed(traced((four // 2)[:, None, None]), four) == pytest.approx(
        math.log(2)
    )  # an expert per pair of labels
    assert informed(traced((np.arange(400) // 4 % 5)[:, None, None]), four) == pytest.approx(0, abs=1e-12)
    # Two heads: one has an expert per label, one always the same expert, with weights p and 1 - p. The label is known
    # from the first, and the second tells nothing.
    p = 0.25
    both = traced(np.stack([four, np.full(400, 4)], 1)[..., None], np.tile([[p], [1 - p]], (400, 1, 1)))
    assert informed(both, four) == pytest.approx(p * math.log(4))


def planted(rng, of, n, share, r=4):
    """Tokens use experts of their label in a share of the cases, and any others otherwise."""
    labels = of.max() + 1
    own = of[:, None] * (n // labels) + rng.integers(n // labels, size=(len(of), r))
    return np.where(rng.random((len(of), r)) < share, own, rng.integers(n, size=(len(of), r)))[:, None]


@pytest.mark.parametrize("by_document", [False, True])
def test_planted_specialisation_is_found_and_none_is_found_where_none_is(rng, by_document):
    documents = np.arange(6000) // 50
    of = rng.integers(3, size=120)[documents]
    labels = labelled(of, by_document=by_document)
    found = information.specialisation(traced(planted(rng, of, 300, 1.0)), labels, documents, seed=0)
    assert found.verdict == "yes"
    assert found.information == pytest.approx(found.entropy)
    assert 0.9 < found.share <= 1
    weak = information.specialisation(traced(planted(rng, of, 300, 0.3)), labels, documents, seed=0)
    assert weak.verdict == "yes"
    assert 0.01 < weak.share < 0.2
    none = information.specialisation(traced(planted(rng, of, 300, 0.0)), labels, documents, seed=0)
    assert none.verdict == "no"
    assert none.information > 0.005  # so much is told by chance
    assert none.information == pytest.approx(none.chance, abs=6 * none.spread)
    assert abs(none.share) < 0.01
    assert "no more than chance" in none.sentence


def test_experts_for_topics_are_not_taken_for_experts_of_domains(rng):
    """Each document has experts of its own, and labels are drawn for documents: knowing the expert tells the label."""
    documents = np.arange(4000) // 40
    labels = rng.integers(2, size=100)[documents]
    trace = traced(planted(rng, documents, 500, 0.9))
    over_tokens = information.specialisation(trace, labelled(labels), documents, seed=0)
    assert over_tokens.verdict == "yes"  # a shuffle that takes the tokens of a document apart is misled
    over_documents = information.specialisation(trace, labelled(labels, by_document=True), documents, seed=0)
    assert over_documents.verdict == "no"
    assert (over_documents.shuffled, over_documents.units) == ("documents", 100)


def test_experts_for_topics_of_files_are_not_taken_for_experts_of_folders(rng):
    """Each file has experts of its own in all of its six pieces, and files are in folders at random."""
    pieces = np.arange(4800) // 20
    folders = rng.integers(2, size=40)
    names = [f"{folders[file]}/{file}.py" for file in np.arange(240) // 6]
    labels, documents = domains.by_folder(names, pieces), domains.documents([0] * 240, names, pieces)
    trace = traced(planted(rng, documents, 400, 0.9))
    over_pieces = information.specialisation(trace, labels, pieces, seed=0)
    assert over_pieces.verdict == "yes"  # misled
    over_files = information.specialisation(trace, labels, documents, seed=0)
    assert (over_files.verdict, over_files.units) == ("no", 40)


def test_pieces_are_of_the_documents_of_their_text_and_name():
    found = domains.documents([0, 0, 1, 0, 1, 0], ["a", "b", "a", "a", None, None], np.array([0, 1, 2, 2, 3, 4, 5]))
    assert found.tolist() == [0, 1, 2, 2, 0, 3, 4]


def test_what_cannot_be_known_is_unknown(rng):
    trace = traced(rng.integers(5, size=(100, 1, 2)))
    one = information.specialisation(trace, labelled(np.zeros(100, int)), np.arange(100), seed=0)
    assert (one.verdict, one.share) == ("unknown", 0)
    assert "can't specialise" in one.sentence
    few = information.specialisation(
        trace, labelled(np.arange(100) // 50, by_document=True), np.arange(100) // 25, seed=0
    )
    assert few.verdict == "unknown"
    assert "4 documents are too few" in few.sentence


def test_tokens_without_a_label_or_an_expert_do_not_count():
    trace = traced([[[0]], [[1]], [[0]], [[1]], [[2]], [[0]]], [[[1]], [[1]], [[1]], [[1]], [[1]], [[0]]])
    labels = labelled(np.array([0, 1, 0, 1, UNKNOWN, 1]))
    found = information.specialisation(trace, labels, np.arange(6), seed=0)
    assert found.information == pytest.approx(math.log(2))
    assert found.entropy == pytest.approx(math.log(2))


def test_the_most_specialised_experts_come_first(rng):
    of = rng.integers(4, size=20000)
    indices = rng.integers(50, size=(20000, 1, 3))
    indices[of == 2, 0, 0] = 7  # expert 7 has many uses of one label
    found, special = information.specialists(traced(indices), labelled(of))
    assert found[0] == 7
    assert special[0] > 0.2
    # Tokens of label 2 have only two other experts, those of other labels three. The estimate of this KL from 1100 uses
    # is too large by 3 / 2200 on average, which is taken off; the mean of 49 experts is known to about 0.0003.
    divergence = 3 * 3 / 11 * math.log(12 / 11) + 2 / 11 * math.log(8 / 11)
    assert np.mean(special[1:]) == pytest.approx(divergence, abs=1e-3)
    rare = traced(np.concatenate([indices, np.full((5, 1, 3), 50)]))
    assert 50 not in information.specialists(rare, labelled(np.append(of, [3] * 5)))[0]


# Usage


def test_together_counts_what_loops_count(rng):
    trace = random_trace(rng)
    sets = [
        {int(e) for e, g in zip(i.flat, g.flat, strict=True) if g > 0}
        for i, g in zip(trace.indices, trace.gates, strict=True)
    ]
    counts = {}
    for one in sets:
        for pair in itertools.combinations(sorted(one), 2):
            counts[pair] = counts.get(pair, 0) + 1
    tokens = sum(bool(one) for one in sets)
    often = [sum(e in one for one in sets) for e in range(9)]
    found = usage.together(trace, seed=0, most=1000)
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert dict(zip(pairs, found.counts.tolist(), strict=True)) == counts
    assert (found.tokens, found.pairs) == (tokens, len(counts))
    assert found.counts.tolist() == sorted(found.counts.tolist(), reverse=True)
    for (a, b), lift in zip(pairs, found.lift, strict=True):
        assert lift == pytest.approx(counts[a, b] * tokens / (often[a] * often[b]))
    logs = [n * math.log(n * tokens / (often[a] * often[b])) for (a, b), n in counts.items()]
    assert found.excess == pytest.approx(sum(logs) / sum(counts.values()))


def test_experts_alone_are_not_together():
    found = usage.together(traced(np.arange(5)[:, None, None]), seed=0)
    assert (found.pairs, found.mean_lift) == (0, None)


@pytest.mark.parametrize("n", [64, 2**20])
def test_experts_chosen_independently_are_together_as_often_as_by_chance(rng, n):
    indices = rng.integers(n, size=(400, 4, 4))
    found = usage.together(traced(indices, num_experts=n), seed=0)
    assert found.mean_lift == pytest.approx(1, abs=0.02)
    if n > 64:
        assert math.exp(found.excess) > 100  # without the comparison with chance
        assert np.isnan(found.lift).all()
    groups = rng.integers(8, size=(400, 1, 1)) * 8 + rng.integers(8, size=(400, 4, 4))
    assert usage.together(traced(groups, num_experts=n), seed=0).mean_lift > 2


def test_no_more_pairs_are_counted_than_allowed(rng, monkeypatch):
    monkeypatch.setattr(usage, "MOST_PAIRS", 20)
    monkeypatch.setattr(usage, "MOST_SLOTS", 4)
    found = usage.together(random_trace(rng), seed=0, most=1000)
    assert (found.slots, found.tokens >= 3) == (4, True)
    assert 0 < found.counts.sum() <= 20


def test_overlap_counts_what_loops_count(rng):
    trace = random_trace(rng)
    found = usage.overlap(trace, seed=0)
    used = trace.gates > 0
    for a, b in itertools.permutations(range(3), 2):
        shared = own = 0
        for t in range(60):
            other = {trace.indices[t, b, j] for j in range(4) if used[t, b, j]}
            for i in range(4):
                if used[t, a, i]:
                    own += 1
                    shared += trace.indices[t, a, i] in other
        assert found["heads"][a, b] == pytest.approx(shared / own)
    distinct = [len(set(trace.indices[t][used[t]].tolist())) for t in range(60)]
    assert found["distinct"] == pytest.approx(np.mean(distinct))
    assert found["used"] == pytest.approx(used.sum() / 60)


def test_usage_in_closed_form():
    trace = traced([[[0, 1]], [[0, 2]]], [[[0.5, 0.5]], [[0.5, 0.5]]], 8)
    found = usage.summary(trace)
    assert (found["usage"], found["dead"], found["half"]) == (3 / 8, 5, 1)
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert found["unevenness"] == pytest.approx(math.log(8) - entropy)
    assert found["effective"] == pytest.approx(math.exp(entropy))
    ranks, mass = usage.curve(trace)
    assert dict(zip(ranks.tolist(), mass.tolist(), strict=True)) == {
        1: 4.0, 2: 2.0, 3: 2.0, 4: 0.0, 5: 0.0, 6: 0.0, 7: 0.0, 8: 0.0
    }  # fmt: skip


def test_a_million_experts_take_memory_by_their_uses(rng):
    """A [tokens, experts] array of single bytes would take 2 GiB."""
    n, tokens = 2**20, 2048
    trace = traced(rng.integers(n, size=(tokens, 4, 8)), rng.random((tokens, 4, 8)), n)
    labels = labelled(rng.integers(250, size=tokens))
    tracemalloc.start()
    usage.summary(trace), usage.curve(trace), usage.together(trace, seed=0), usage.overlap(trace, seed=0)
    information.specialisation(trace, labels, np.arange(tokens), seed=0, permutations=1)
    information.specialists(trace, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28


# Similarity and statements


def test_router_rows_that_follow_experts_are_found(rng):
    rows = rng.normal(size=(40, 8))
    alike = similarity.regress(similarity.cosines(rows), similarity.cosines(rows @ rng.normal(size=(8, 30))), seed=0)
    assert alike.correlation > 0.5
    assert alike.chance < 0.01
    other = similarity.regress(similarity.cosines(rows), similarity.cosines(rng.normal(size=(40, 8))), seed=0)
    assert other.chance > 0.02
    exact = similarity.regress(similarity.cosines(rows), 2 * similarity.cosines(rows) + 1, seed=0)
    assert (exact.slope, exact.r_squared) == (pytest.approx(2), pytest.approx(1))
    assert similarity.regress(np.ones((9, 9)), np.ones((9, 9)), seed=0) is None


def test_neurons_that_were_shuffled_are_matched(rng):
    neurons = rng.normal(size=(12, 6))
    found = similarity.match_neurons(0, 1, neurons, neurons[rng.permutation(12)])
    assert found.after == pytest.approx(1)
    assert found.before < 0.5
    assert similarity.match_neurons(0, 1, neurons, neurons).tau == pytest.approx(1)
    assert similarity.match_neurons(0, 1, neurons, neurons[::-1]).tau == pytest.approx(-1)


def coarse(**how):
    how = {"num_experts": 4, "d_ff": 6, "routing": "token_choice", "top_k": 2, "activation": "geglu"} | how
    return MoE(4, **how, rngs=nnx.Rngs(0))


def every_expert(n):
    """Every expert is used once, at tokens whose vectors are kept."""
    indices = np.arange(n, dtype=np.int32)[:, None, None]
    return Trace(0, n, indices, np.ones(indices.shape, np.float32), np.arange(n), np.ones((n, 4), np.float32))


def test_neurons_of_coarse_experts_are_matched(rng):
    layer, order = coarse(), rng.permutation(6)
    layer.up[...] = layer.up[...].at[1].set(layer.up[...][0][:, order])
    layer.gate[...] = layer.gate[...].at[1].set(layer.gate[...][0][:, order])
    layer.down[...] = layer.down[...].at[1].set(layer.down[...][0][order])
    found = similarity.static(layer, every_expert(4), seed=0)
    assert len(found.matchings) == 6
    by_pair = {(m.first, m.second): m.after for m in found.matchings}
    assert by_pair.pop((0, 1)) == pytest.approx(1)
    assert max(by_pair.values()) < 0.9
    assert found.similar["up, mean neuron"][0, 1] == pytest.approx(1)


def test_neurons_are_sampled(monkeypatch):
    monkeypatch.setattr(similarity, "MATCHED_NEURONS", 3)
    monkeypatch.setattr(similarity, "COMPONENTS", 20)
    sizes, match = [], similarity.match_neurons
    monkeypatch.setattr(
        similarity, "match_neurons", lambda *of: (sizes.append((of[2].shape, of[3].shape)), match(*of))[1]
    )
    layer = coarse()
    for kernel in (layer.up, layer.down, layer.gate):  # all neurons of an expert are alike
        kernel[...] = jnp.ones_like(kernel[...]) * jnp.arange(4.0)[:, None, None] ** 2
    points, experts = similarity.static(layer, every_expert(4), seed=0).components
    assert sizes == [((3, 12), (3, 12))] * 6
    assert points.shape == (20, 2)
    distances = np.abs(points[:, None, 0] - points[None, :, 0])
    expected = np.abs(experts[:, None] ** 2 - experts[None] ** 2) * math.sqrt(12)
    np.testing.assert_allclose(distances, expected, atol=1e-5)


def test_outputs_of_single_experts_are_without_the_shared_expert(rng):
    layer = coarse(shared_d_ff=5)
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    each = similarity.outputs(layer, np.asarray(x), np.tile(np.arange(4), (3, 1)))
    indices, gates = layer.route(x)
    weights = np.zeros((3, 4))
    np.put_along_axis(weights, np.asarray(indices).reshape(3, -1), np.asarray(gates).reshape(3, -1), axis=1)
    expected = layer(x)[0] - layer.shared(x)[0]
    np.testing.assert_allclose(np.einsum("tr,trd->td", weights, each), expected, atol=1e-5)


def test_outputs_of_all_heads_are_compared():
    """Outputs of the first head's eight experts are alike, and opposite to those of the second head's."""
    layer = PKM(4, 16, num_heads=2, top_k=8, d_key=4, rngs=nnx.Rngs(0))
    layer.values[...] = jnp.asarray(np.repeat([1.0, -1.0], 8)[:, None] * np.ones(4), jnp.float32)
    indices = np.tile(np.arange(16, dtype=np.int32).reshape(1, 2, 8), (16, 1, 1))
    trace = Trace(0, 16, indices, np.ones(indices.shape, np.float32), np.arange(16), np.ones((16, 4), np.float32))
    # Two of 16 experts are alike in 7 of 15 cases.
    assert similarity.dynamic(layer, trace, seed=0).chosen == pytest.approx(-1 / 15, abs=0.1)


# Changes of a layer


@pytest.mark.parametrize("used", [[0, 1], [1, 4, 5]])
def test_every_used_expert_is_replaced_by_another_used_one(used):
    indices = np.repeat(used, 4)[:, None, None]
    indices[0] = used[-1]
    found = ablations.changes(traced(indices), labelled(np.arange(len(indices)) % 2), can_mix=True, seed=0)
    moved = np.asarray(found["experts permuted"][0].instead)[used]
    assert sorted(moved) == used
    assert (moved != used).all()
    assert set(np.asarray(found["one expert for all"][0].instead).tolist()) == {used[-1]}
    # With one expert per head, there is nothing to shuffle and none but the strongest.
    assert not {"weights shuffled", "strongest alone"} & set(found)


def dynamic(block, others, larger=0.5, rank=0.0):
    empty = np.zeros(0)
    return similarity.Dynamic(block, 10, 0.1, others, larger, 0.01, rank, 0.01, None, empty, empty)


@pytest.mark.parametrize(
    ("cosines", "answers"),
    [
        ([0.5, 0.3, 0.2, 0.1, 0.4], ["yes", "yes"]),
        ([0.1, 0.2, 0.3, 0.4, 0.1], ["no", "no"]),
        ([0.3, 0.1], ["unknown", "unknown"]),
    ],
)
def test_diversity_with_depth(cosines, answers):
    found = statements.diversity([dynamic(block, one) for block, one in enumerate(cosines)], len(cosines))
    assert [one.verdict for one in found] == answers


def test_norms_that_follow_the_router():
    def answer(larger, rank):
        return statements.norms_follow_the_router([dynamic(0, 0.0, larger, rank)]).verdict

    assert [answer(0.8, 0.5), answer(0.8, 0.0), answer(0.5, -0.5), answer(0.52, 0.02)] == ["yes", "partly", "no", "no"]
    assert statements.norms_follow_the_router([]).verdict == "unknown"
    assert statements.neurons_are_experts([]).verdict == "unknown"


# Labels


def test_labels_of_files_and_positions():
    names = ["json/decoder.py", "abc.py", None, "corpus.jsonl:12", "json/encoder.pyi"]
    documents = np.array([0, 0, 1, 2, 3, 4])
    folders = domains.by_folder(names, documents)
    assert [folders.names[i] if i != UNKNOWN else None for i in folders.of] == [
        *("json", "json", "(no folder)", None, "(no folder)", "json")
    ]
    kinds = domains.by_suffix(names, documents)
    assert [kinds.names[i] if i != UNKNOWN else None for i in kinds.of] == [".py", ".py", ".py", None, ".jsonl", ".pyi"]
    assert folders.by_document
    positions = domains.by_position(np.array([0, 1, 2, 3, 4, 7, 8]))
    assert [positions.names[i] for i in positions.of] == ["0", "1", "2-3", "2-3", "4-7", "4-7", "8-15"]


def test_small_folders_are_one_label():
    names = [f"folder{i}/file.py" for i in range(40)]
    documents = np.repeat(np.arange(40), np.arange(40) + 1)
    labels = domains.by_folder(names, documents)
    assert len(labels.names) == domains.MOST_FOLDERS + 1
    assert labels.names[labels.of[0]] == domains.OTHER
    assert labels.names[labels.of[-1]] == "folder39"
