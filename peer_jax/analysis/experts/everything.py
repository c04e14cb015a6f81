"""All analyses of the experts of a model on a text, as values; ``page.write`` shows them."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from peer_jax.analysis.experts import ablations, domains, information, pages, passes, similarity, statements, usage
from peer_jax.analysis.experts.gates import GateMap, gate_map
from peer_jax.analysis.experts.mean_outputs import mean_outputs
from peer_jax.analysis.experts.trace import Text, Trace
from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.pipeline import TextTask, ensure_prepared, open_cache
from peer_jax.errors import InputError
from peer_jax.models import Transformer
from peer_jax.sharding import use
from peer_jax.training import room
from peer_jax.training.metrics import ProgressBar
from peer_jax.training.restore import check_is_text, check_tasks, restore_model
from peer_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class BlockLook:
    """What was found of the experts of one block.

    Attributes:
        trace: what was seen.
        layer: what reports call the layer.
        usage, together, overlap: see ``usage``.
        specialisation: for each kind of label.
        gates: for each kind of label of which there are several.
        static: the comparison of parameters.
        dynamic: the comparison of outputs; None if the layer can't compute those of single experts.
        ablations: what changes of the layer cost; empty if none were tried.
        pages: of some experts.
        index: the experts of each token.
    """

    trace: Trace
    layer: str
    usage: dict[str, Any]
    together: usage.Together
    overlap: dict[str, Any]
    specialisation: list[information.Specialisation]
    gates: list[GateMap]
    static: similarity.Static
    dynamic: similarity.Dynamic | None
    ablations: list[ablations.Ablation]
    pages: list[dict[str, Any]]
    index: dict[str, list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Unrouted:
    """A layer that has experts and does not tell which of them a token uses.

    Attributes:
        block: its block.
        layer: what reports call the layer.
        zeroed: what it costs to leave the layer out; None if it wasn't tried.
    """

    block: int
    layer: str
    zeroed: ablations.Ablation | None

    @property
    def sentence(self) -> str:
        """What is known of the layer and what isn't."""
        cost = "" if self.zeroed is None else f" Without the layer, the loss is {self.zeroed.cost:+.4f} nats per token."
        return (
            f"{self.layer} does not route tokens to experts: use, specialisation, outputs and pages of its experts are "
            f"unknown.{cost}"
        )


@dataclasses.dataclass(frozen=True)
class Look:
    """What was found of the experts of a model.

    Attributes:
        texts: the names of the texts.
        text: the tokens.
        by: the kind of label that the most specialised experts are specialised by.
        is_causal: whether no layer lets a token see later ones.
        blocks: those that route.
        unrouted: those whose layers have experts and don't route.
        statements: those of "A Closer Look into Mixture-of-Experts".
    """

    texts: list[str]
    text: Text
    by: str
    is_causal: bool
    blocks: list[BlockLook]
    unrouted: list[Unrouted]
    statements: list[statements.Statement]

    @property
    def ablations(self) -> list[list[ablations.Ablation]]:
        """What changes cost, of each block whose layer was changed."""
        tried = [of.ablations for of in self.blocks] + [[of.zeroed] for of in self.unrouted if of.zeroed is not None]
        return sorted((of for of in tried if of), key=lambda of: of[0].block)


def look_into(
    runs: Sequence[Run],
    workdir: str | os.PathLike,
    *,
    checkpoint: str = "last",
    tokens: int,
    batch_size: int | None = None,
    seed: int = 0,
    ablate: bool = True,
    progress: bool = True,
) -> tuple[int, Look]:
    """Looks into the experts of the model in ``workdir``, on one device.

    Args:
        runs: the first makes the model; each names a text by its task.
        workdir: the run directory.
        checkpoint: "last", "best" or a step.
        batch_size: rows per batch; None: as the first run evaluates with.
        tokens, seed, ablate, progress: see ``look``.

    Returns:
        The checkpoint's step, and what was found.

    Raises:
        InputError: as ``look``; or if there is no such checkpoint, or the texts don't fit the model.
    """
    check_is_text(runs[0], "analysed")
    check_tasks(runs)
    with use(None):
        step, model = restore_model(runs[0], workdir, checkpoint)
        batch_size = batch_size or runs[0].eval_batch_size()
        room.check_evaluation(model, batch_size=batch_size, seq_len=runs[0].task.seq_len)
        tasks = [run.task for run in runs]
        how = {"tokens": tokens, "batch_size": batch_size, "seed": seed, "ablate": ablate, "progress": progress}
        return step, look(model, tasks, **how)


def look(
    model: Transformer,
    tasks: Sequence[TextTask],
    *,
    tokens: int,
    batch_size: int,
    seed: int = 0,
    ablate: bool = True,
    progress: bool = False,
) -> Look:
    """Looks into every layer that routes. Those that have experts and don't route are zeroed, and that is all.

    Args:
        model: in evaluation mode.
        tasks: the texts, of whose validation splits random rows are taken; prepared first if need be.
        tokens: about how many tokens to take, of all texts together.
        batch_size: rows per batch.
        seed: of everything random.
        ablate: also run the model with its layers changed, which takes most of the time.
        progress: show bars.

    Raises:
        InputError: if no layer routes or has experts, or a text can't be read.
    """
    layers = [block.ffw for block in model.blocks]
    silent = [block for block, layer in enumerate(layers) if not layer.routes and layer.num_experts is not None]
    if not silent and not any(layer.routes for layer in layers):
        raise InputError(f"{model.method.label} does not route tokens to experts: analyse a run whose layers do")
    sources = [open_cache(ensure_prepared(task, progress=progress), "validation") for task in tasks]
    run = passes.Passes(model, passes.draw(sources, tokens, seed), batch_size, progress)
    text, traces = passes.collect(run, seed=seed)
    text = _named(tasks, run.rows, text)
    vocabulary = vocabularies.load(tasks[0].vocabulary)
    shown = [vocabulary.piece(i) for i in range(model.vocab_size)]
    labels = [
        *text.domains,
        domains.by_token(text.inputs, shown, "token"),
        domains.by_token(text.targets, shown, "next token"),
        domains.by_position(text.positions),
    ]
    by = next(kind for kind in labels if len(kind.names) > 1)
    blocks = []
    for trace in traces:
        layer = layers[trace.block]
        chosen = pages.choose(trace, by, seed=seed)
        no_direction = layer.expert_outputs(jnp.zeros(1, jnp.int32)) is None
        means = mean_outputs(run, trace.block, list(chosen)) if no_direction and chosen else None
        with ProgressBar(f"analyse block {trace.block}", len(labels) + 3, enabled=progress) as bar:
            specialisation = []
            for done, kind in enumerate(labels, start=1):
                specialisation.append(information.specialisation(trace, kind, text.documents, seed=seed))
                bar.update(done, kind.kind)
            used = usage.summary(trace), usage.together(trace, seed=seed), usage.overlap(trace, seed=seed)
            maps = [found for kind in labels if (found := gate_map(trace, kind)) is not None]
            bar.update(len(labels) + 1, "usage")
            compared = similarity.static(layer, trace, seed=seed), similarity.dynamic(layer, trace, seed=seed)
            bar.update(len(labels) + 2, "similarity")
            written = pages.pages(model, trace, text, chosen, vocabulary, means)
            made = written, pages.index(trace, text, vocabulary)
            bar.update(len(labels) + 3, "pages")
        costs = ablations.ablate(run, text, trace, by, seed=seed) if ablate else []
        blocks.append(BlockLook(trace, layer.label, *used, specialisation, maps, *compared, costs, *made))
    checked = statements.check(
        [of.static for of in blocks], [of.dynamic for of in blocks if of.dynamic is not None], len(model.blocks)
    )
    unrouted = [
        Unrouted(block, layers[block].label, ablations.zero(run, text, block) if ablate else None) for block in silent
    ]
    return Look([task.corpus.name for task in tasks], text, by.kind, model.is_causal, blocks, unrouted, checked)


def _named(tasks: Sequence[TextTask], rows: passes.Rows, text: Text) -> Text:
    """The text with its documents, and with labels of where the tokens come from, as far as they are known."""
    of_piece = passes.text_of_pieces(rows, text.pieces)
    pieces, names = passes.pieces(text), [None] * len(of_piece)
    for number, task in enumerate(tasks):
        own = [place for place, of in enumerate(of_piece) if of == number]
        for place, name in zip(own, domains.name_documents(task, [pieces[place] for place in own]), strict=True):
            names[place] = name
    found = (
        domains.by_task([tasks[number].corpus.name for number in of_piece], text.pieces),
        domains.by_folder(names, text.pieces),
        domains.by_suffix(names, text.pieces),
    )
    documents = domains.documents(of_piece.tolist(), names, text.pieces)
    return dataclasses.replace(text, documents=documents, domains=tuple(kind for kind in found if kind.names))
