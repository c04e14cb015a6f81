"""The files, page, figures and words of a report on synthetic sweeps, whose files are written here."""

import base64
import csv
import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
import zlib

import numpy as np
import pytest

from peer_jax.analysis import (
    ablation_figures,
    ablations,
    curves,
    figures,
    reading,
    report,
    results,
    row_table,
    style,
    tables,
)
from peer_jax.analysis.isoflop import analyse
from peer_jax.errors import InputError
from peer_jax.run_directory import SCHEMA, RunDirectory, SweepDirectory

SEQ_LEN, BLOCKS, VOCABULARY = 256, 4, 258
GAINS = {"Dense": 0.0, "MoE (token choice)": 0.03, "MoE (expert choice)": 0.05, "PEER": 0.12, "PKM": 0.10}
HEADLINE = {"budgets": (3e11, 3e12), "widths": (16, 24, 32, 48, 64), "seeds": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The parameters and FLOPs of a model with a method and a width."""

    total: int
    active: int
    parts: dict[str, float]

    @classmethod
    def of(cls, method, d, experts):
        backbone = 2 * VOCABULARY * d + BLOCKS * 4 * d * d
        dense = 8 * d * d
        parts = {"attention": BLOCKS * (8.0 * d * d + 4 * SEQ_LEN * d), "logits": 2.0 * d * VOCABULARY}
        parts["Dense"] = 16.0 * d * d * (BLOCKS - (method != "Dense"))
        total = active = backbone + BLOCKS * dense
        if method.startswith("MoE"):
            parts["MoE"] = 16.0 * d * d + 16 * d
            total += 7 * dense
        elif method != "Dense":
            n, h, k = math.isqrt(experts), max(1, d // 16), 16
            parts[method] = 2.0 * d * h * 16 + 2 * h * n * 16 + (4 if method == "PEER" else 2) * h * k * d
            total += (2 if method == "PEER" else 1) * experts * d - dense
            active += 2 * h * k * d - dense + 16 * d * h
        return cls(total, active, parts)


def slug(method):
    """dense, moe-expert-choice, peer, pkm."""
    return re.sub(r"\W+", "-", method.lower()).strip("-")


def write_run(
    folder,
    method,
    d,
    budget,
    *,
    seed=0,
    settings=None,
    penalty=0.0,
    experts=4096,
    loss=None,
    lines=True,
    corpus="python",
    label=None,
    **said,
):
    """Writes a finished run, which belongs to a sweep if ``settings`` is not None.

    ``label`` is what the sweep calls the method. ``said`` is what only results of this version say.
    """
    shape = Shape.of(method, d, experts)
    flops = sum(shape.parts.values())
    steps = max(1, round(budget / (3 * flops * 4 * SEQ_LEN)))
    tokens = steps * 4 * SEQ_LEN
    noise = np.random.default_rng(zlib.crc32(f"{method} {d} {budget} {seed} {settings}".encode()))
    if loss is None:
        loss = 0.9 + 14 / shape.active**0.3 + 170 / tokens**0.42 - GAINS[method] * math.log10(budget / 3e10) / 2
        loss = float(loss + penalty + noise.normal(0, 0.008))
    own = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2), "word_perplexity": 1e5}
    if method != "Dense":
        own["experts"] = {"block_1": {"usage": float(0.9 - 0.02 * math.log2(experts)), "unevenness": 0.2 * math.log(d)}}
    result = {
        "schema": SCHEMA,
        "machine": {"platform": "cpu", "device": "cpu", "devices": 1},
        "versions": {},
        **{"method": method, "is_causal": method != "MoE (expert choice)", "d_model": d, "num_blocks": BLOCKS},
        "num_experts": None if method == "Dense" else 8 if method.startswith("MoE") else experts,
        **{"params_total": shape.total, "params_active": shape.active},
        **{"forward_flops_per_token": flops, "forward_flops_by_part": shape.parts},
        **{"seed": seed, "steps": steps, "batch_size": 4, "seq_len": SEQ_LEN, "tokens": tokens},
        **{
            "training_flops": 3 * flops * tokens,
            "tokens_per_second": 1e9 / flops,
            "wall_seconds": tokens * flops / 1e9,
        },
        **{"epochs": tokens / 1.1e7, "corpus": {"name": corpus, "cache": f"{corpus}-{SEQ_LEN}"}},
        "evaluations": {corpus: own},
        **said,
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    if settings is not None:
        point = {"method": label or method, "size": f"d{d}", "budget": budget, "seed": seed, "settings": settings}
        (folder / "point.json").write_text(json.dumps(point))
    if lines:
        every = max(1, steps // 200)
        made = [
            json.dumps({"step": step, "loss": loss + 2.5 * (10 / (step + 10)) ** 0.7 + float(noise.normal(0, 0.05))})
            for step in range(every, steps + 1, every)
        ]
        (folder / "metrics.jsonl").write_text("\n".join([*made, '{"step": 9, "validation_loss": 2.0}', '{"ste']))


def write_headline(root, *, budgets, widths, seeds, methods=tuple(GAINS), lines=True):
    """Writes runs of methods at equal FLOPs."""
    for budget in budgets:
        for method in methods:
            for d in widths:
                for seed in seeds:
                    folder = root / f"{slug(method)}-d{d}-{budget:g}-seed{seed}"
                    write_run(folder, method, d, budget, seed=seed, settings={}, lines=lines)
    describe(root, methods={"dense": {"AdamW.learning_rate": 0.004}, "peer": {"TABLE_RATE": 0.064}})


def describe(root, **fields):
    """Writes what a sweep of an earlier version says of itself."""
    sweep = {"tuning": "Rates were tried at d32, 3e11 FLOPs, one seed.", "methods": ["dense", "peer"], "seeds": [0]}
    sweep |= {"rate_exponents": {"AdamW.learning_rate": -0.5}, "rates_at": 64}
    (root / "sweep.json").write_text(json.dumps(sweep | fields))


def write_ablation(root, axes, *, methods=("PEER",), seeds=(0, 1), zipped=False, widths=(32,), budgets=(3e11,)):
    """Writes runs with all combinations of the values of the axes, or with the first of each, the second of each ..."""
    grid = zip(*axes.values(), strict=True) if zipped else _product(*axes.values())
    for number, values in enumerate(grid):
        for method in methods:
            for budget in budgets:
                for d in widths:
                    for seed in seeds:
                        settings = dict(zip(axes, values, strict=True))
                        penalty = 0.03 * math.sin(number) ** 2
                        experts = settings.get("NUM_EXPERTS", 4096)
                        folder = root / f"{slug(method)}-{budget:g}-d{d}-{number}-seed{seed}"
                        write_run(
                            folder, method, d, budget, seed=seed, settings=settings, penalty=penalty, experts=experts
                        )


def _product(first, *others):
    return [(value, *rest) for value in first for rest in (_product(*others) if others else [()])]


def write_report(directories, out, resamples=1000):
    return report.write_report(analyse(results.read(directories), resamples=resamples), directories, out)


def write_everything(root):
    """Writes sweeps of all kinds, with a failed and a diverged run among them."""
    write_headline(root / "headline", **HEADLINE)
    failed = root / "headline" / "peer-d128-3e12-seed0"
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"reason": "step 17 has loss nan; there is no checkpoint yet"}))
    write_run(root / "headline" / "pkm-d8-3e11-seed0", "PKM", 8, 3e11, settings={}, loss=math.nan)
    write_ablation(root / "number", {"NUM_EXPERTS": (1024, 4096, 16384)}, methods=("PEER", "PKM"))
    write_run(root / "number" / "dense", "Dense", 32, 3e11, settings={})
    write_ablation(root / "heads", {"PEER.top_k": (4, 8, 16, 32), "PEER.num_heads": (1, 2, 4)}, seeds=(0,))
    write_ablation(root / "paired", {"PEER.num_heads": (1, 2, 4, 8), "PEER.top_k": (64, 32, 16, 8)}, zipped=True)
    write_ablation(root / "norm", {"PEER.query_norm": ("batch", "layer", None)}, budgets=(3e11, 3e12))
    rates = {"AdamW.learning_rate": (0.002, 0.004, 0.008), "TABLE_RATE": (0.016, 0.064, 0.256)}
    write_ablation(root / "rates", rates, methods=("PEER", "PKM"), seeds=(0,))
    describe(root / "rates", tuning="", methods=["peer", "pkm"], rate_exponents={})


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The directory that holds the runs and the report on them."""
    root = tmp_path_factory.mktemp("report")
    write_everything(root / "runs")
    write_report([root / "runs"], root / "out", resamples=200)
    return root


class Page(html.parser.HTMLParser):
    """The content of a page. Tags that don't match are an error."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, path):
        super().__init__()
        self.images, self.links, self.ids, self.tags, self.words, self.open = [], [], [], set(), [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.images += [given] if tag == "img" else []
        self.links += [given[name] for name in ("href", "src") if name in given]
        assert not any(name.startswith("on") for name in given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_a_report_is_a_page_figures_and_a_table(everything):
    out = everything / "out"
    figures_ = ["isoflop_active", "isoflop_total", "isoflop_tokens", "isoflop_seconds", "optimum", "training", "usage"]
    figures_ += ["equal_seconds", "equal_parameters", "flops"]
    figures_ += [f"ablation_{number}" for number in range(1, 6)]
    expected = {"results.csv", "report.html"} | {f"figures/{f}.{kind}" for f in figures_ for kind in ("svg", "png")}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == expected
    for path in (out / "figures").iterdir():
        start = path.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else start.startswith(b"<?xml")
    with (out / "results.csv").open() as file:
        written = list(csv.DictReader(file))
    # The dense run of one ablation is also a run of the headline, so it counts once and belongs to both.
    assert len(written) == len(list((everything / "runs").rglob("result.json"))) - 1
    (twice,) = [json.loads(line["directories"]) for line in written if len(json.loads(line["directories"])) > 1]
    assert [path.removeprefix(str(everything)) for path in twice] == [
        "/runs/headline/dense-d32-3e+11-seed0",
        "/runs/number/dense",
    ]


def test_the_page_needs_no_other_file(everything):
    page = Page(everything / "out" / "report.html")
    assert len(page.images) == 15
    for image in page.images:
        assert len(image["alt"]) > 10
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        xml.etree.ElementTree.fromstring(base64.b64decode(data, validate=True))
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags
    assert "http" not in page.text
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.ids)


def test_the_page_says_what_there_is_to_say(everything):
    text = Page(everything / "out" / "report.html").text
    for words in (
        "peer-d128-3e12-seed0 step 17 has loss nan; there is no checkpoint yet",  # the failed run
        "1 run ended without a finite loss and is left out of the fits",
        "MoE (expert choice): not causal",
        "MoE (expert choice), not causal",
        "Rates were tried at d32, 3e11 FLOPs, one seed.",
        "AdamW.learning_rate is multiplied by (d_model / 64)^-0.5",
        "The sweep does not say how its rates were chosen.",
        "runs belong to no sweep that says how rates were chosen",
        "has the lowest fitted minimum of the causal methods",
        "The standard deviation over seeds is",
        "a in N_opt ~ C^a",
        "L(N, D) = E + A / N^alpha + B / D^beta",
        "h=8, k=8",  # settings that were paired
    ):
        assert words in text, words
    runs = [path.parent.relative_to(everything / "runs") for path in (everything / "runs").rglob("result.json")]
    assert [str(run) for run in runs if str(run) not in text] == ["number/dense"]  # a run of the headline, too


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = """<script>addEventListener("load", async () => {
  await Promise.all([...document.images].map((image) => image.decode()));
  document.documentElement.dataset.widths = [...document.images].map((image) => image.naturalWidth).join(" ");
  document.documentElement.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
});</script>"""


def browse(page, folder, width):
    """What a browser makes of a page, and what it writes to its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--window-size={width},2000", "--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"]
    flags += ["--virtual-time-budget=20000"]
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [1200, 500], ids=["desktop", "phone"])
def test_a_browser_shows_the_page(everything, tmp_path, width):
    if BROWSER is None:
        pytest.skip("there is no chromium on the PATH (Debian's package chromium)")
    page = tmp_path / "report.html"
    page.write_text((everything / "out" / "report.html").read_text().replace("</body>", MEASURE + "</body>"))
    dumped, console = browse(page, tmp_path, width)
    assert console == []
    widths = re.search(r'data-widths="([\d ]*)"', dumped)[1].split()
    assert len(widths) == 15
    assert all(int(image) > 100 for image in widths)
    # Wide tables and figures scroll within the page; the page itself does not.
    assert int(re.search(r'data-overflow="(-?\d+)"', dumped)[1]) <= 0


def test_a_report_on_one_run(tmp_path):
    write_run(tmp_path / "run", "PEER", 32, 3e11)
    text = Page(write_report([tmp_path / "run"], tmp_path / "out", resamples=0)).text
    assert "1 finished run from" in text
    assert "There is one causal series, PEER" in text
    assert "1 size" in text
    assert "The runs belong to no sweep that says how rates were chosen." in text
    assert "No run has failed" in text


def test_one_size_and_seed_show_no_order(tmp_path):
    """The runs belong to no sweep, so the budget of each run is what it spent."""
    for method in GAINS:
        write_run(tmp_path / method, method, 32, 3e11, lines=False)
    text = Page(write_report([tmp_path], tmp_path / "out", resamples=0)).text
    assert "5 methods" in text
    assert "at 3e11 training FLOPs" in text
    assert "No causal method has a minimum among the sizes tried. The lowest loss measured is" in text
    assert "Each point has one seed, so it is not known whether that order is more than noise." in text
    assert "the run directories hold no metrics" in text


@pytest.mark.slow
def test_a_report_on_several_directories(tmp_path):
    write_headline(tmp_path / "a", budgets=(3e11,), widths=(16, 32, 64), seeds=(0,), methods=("Dense",), lines=False)
    write_headline(tmp_path / "b", budgets=(3e11,), widths=(16, 32, 64), seeds=(0,), methods=("PKM",), lines=False)
    shutil.copytree(tmp_path / "a", tmp_path / "copies")
    folders = [tmp_path / name for name in ("a", "b", "copies")]
    text = Page(write_report(folders, tmp_path / "out", resamples=0)).text
    assert "6 finished runs" in text  # copies of a run count once
    assert "Against the baseline budget series baseline" in text
    assert "of another run" not in text
    for run in (tmp_path / "copies").iterdir():  # repeated with other numbers, they are no copies
        if (result := run / "result.json").exists():
            result.write_text(
                re.sub(r'"loss": ([\d.]+)', lambda found: f'"loss": {float(found[1]) + 0.01}', result.read_text())
            )
    again = Page(write_report([*folders, folders[0]], tmp_path / "again", resamples=0)).text
    assert "9 finished runs" in again  # a directory given twice is read once
    assert "3 runs have the method, size, budget, settings and seed of another run" in again
    assert str(tmp_path / "copies" / "dense-d16-3e+11-seed0") in again  # the name alone is not enough


def test_query_batch_norm_is_compared_as_in_the_paper(tmp_path):
    axes = {"PEER.query_norm": ("batch", "layer", None), "NUM_EXPERTS": (1024, 4096)}
    write_ablation(tmp_path, axes)
    rows = results.read([tmp_path])
    shown = tables.query_norm(rows)
    assert [cells[3] for cells in shown.rows] == ["1024", "4096"]
    for cells in shown.rows:
        for norm, told in zip((None, "batch"), cells[4].split(" / "), strict=True):
            settings = {"PEER.query_norm": norm, "NUM_EXPERTS": int(cells[3])}
            own = [row.perplexity for row in rows if row.settings == settings]
            assert len(own) == 2  # seeds
            assert float(told) == pytest.approx(np.mean(own), abs=5e-4)
    assert tables.query_norm([row for row in rows if row.settings["PEER.query_norm"] == "batch"]).rows == []


def test_losses_on_different_texts_are_not_compared(tmp_path):
    for method, corpus, loss in (("Dense", "python", 2.0), ("PEER", "wiki", 1.0)):
        for d in (16, 32, 64):
            write_run(tmp_path / f"{method}{d}", method, d, 3e11, settings={}, corpus=corpus, loss=loss, lines=False)
    text = Page(write_report([tmp_path], tmp_path / "out", resamples=0)).text
    assert "The runs are on 2 different texts (python and wiki)" in text
    assert "PEER, on wiki" in text
    assert "Against the minimum of Dense" not in text


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(tmp_path):
    write_headline(tmp_path / "runs", budgets=(3e11, 1e12), widths=(16, 32, 64), seeds=(0,), methods=("PEER",))
    for out in ("first", "second"):
        write_report([tmp_path / "runs"], tmp_path / out, resamples=50)
    first, second = (
        {path.relative_to(tmp_path / out): path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()}
        for out in ("first", "second")
    )
    assert first == second


def test_names_are_text_and_no_markup(tmp_path, capsys):
    hostile = '<img src=x onerror="alert(1)">&amp;$x$ [red]'
    for number, value in enumerate((hostile, "$", "{{ 1 + 1 }}")):
        write_run(tmp_path / "runs" / f"{hostile}{number}", "PEER", 32, 3e11, settings={hostile: value})
    (tmp_path / "runs" / "failed").mkdir()
    (tmp_path / "runs" / "failed" / "failure.json").write_text(json.dumps({"reason": hostile}))
    describe(tmp_path / "runs", tuning=hostile, methods={hostile: {hostile: hostile}}, rate_exponents={hostile: 1})
    page = Page(write_report([tmp_path / "runs"], tmp_path / "out", resamples=0))
    assert page.text.count(hostile) > 8
    assert "{{ 1 + 1 }}" in page.text
    assert all(image["src"].startswith("data:") for image in page.images)
    report.table(results.read([tmp_path / "runs"]))
    assert "[red]" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    write_run(tmp_path / "run", "Dense", 32, 3e11, lines=False)
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"taken.* can't be made .*: choose another"):
        write_report([tmp_path / "run"], tmp_path / "taken")
    with pytest.raises(InputError, match="holds no finished run"):
        write_report([tmp_path / "nothing"], tmp_path / "out")


def test_tables_in_the_terminal(tmp_path, capsys):
    write_headline(tmp_path, budgets=(3e11,), widths=(16, 32, 64), seeds=(0,), methods=tuple(GAINS)[:3], lines=False)
    rows = results.read([tmp_path])
    report.table(rows)
    printed = capsys.readouterr().out
    assert "MoE (expert choice) *" in printed
    assert "* not causal" in printed
    assert f"{rows[0].loss:.4f}" in printed
    report.minima_table(analyse(rows, resamples=0))
    printed = capsys.readouterr().out
    assert "N_opt" in printed
    assert "Dense" in printed
    report.minima_table(analyse(rows[:1], resamples=0))
    assert capsys.readouterr().out == ""


def test_where_there_is_nothing_to_draw_there_is_no_figure(tmp_path):
    write_run(tmp_path / "run", "Dense", 32, 3e11, lines=False)
    rows = results.read([tmp_path])
    analysis = analyse(rows, resamples=0)
    looks = style.looks(analysis)
    assert figures.isoflop(analysis, "params_active", looks) is None
    assert figures.optimum(analysis, looks) is None
    assert figures.training(curves.read(analysis.curves), looks) is None
    assert figures.usage(rows, looks) is None
    assert figures.flops(rows, looks) is not None


def test_training_curves_are_smoothed_and_skip_the_start(tmp_path):
    write_run(tmp_path / "run", "Dense", 32, 3e11)
    (curve,) = curves.read(analyse(results.read([tmp_path]), resamples=0).curves)
    spent = curve.row.training_flops
    assert 0.05 * spent <= curve.flops[0] < 0.07 * spent
    assert curve.flops[-1] <= spent
    assert np.abs(np.diff(curve.losses)).max() < 0.1
    assert abs(curve.at(1.0) - curve.row.loss - 2.5 * (10 / (curve.row.steps + 10)) ** 0.7) < 0.1


KINDS = [
    ("number", {"NUM_EXPERTS": (1024, 4096)}, {}, "line", "number of experts N"),
    ("grid", {"PEER.top_k": (4, 8), "PEER.num_heads": (1, 2, 4)}, {}, "heat map", "heads h and retrieved per head, k"),
    ("paired", {"PEER.num_heads": (1, 2), "PEER.top_k": (16, 8)}, {"zipped": True}, "dots", "heads h and retrieved"),
    ("norm", {"PEER.query_norm": ("batch", None)}, {}, "dots", "query norm"),
    ("three", {"A.x": (1, 2), "A.y": (1, 2), "A.z": (1, 2)}, {}, "dots", "A.x and A.y and A.z"),
    ("unheard", {"AdamW.b2": (0.9, 0.98, 0.99)}, {}, "line", "AdamW.b2"),
]


@pytest.mark.parametrize(("name", "axes", "how", "kind", "title"), KINDS, ids=[k[0] for k in KINDS])
def test_an_ablation_gets_the_figure_that_suits_it(tmp_path, name, axes, how, kind, title):
    write_ablation(tmp_path / name, axes, seeds=(0, 1), **how)
    (found,) = ablations.find(results.read([tmp_path]))
    assert found.kind == kind
    assert found.title.startswith(title)
    assert sum(len(own) for panel in found.panels for own in panel.losses["PEER"].values()) == 2 * len(found.values)
    assert ablation_figures.ablation(found, looks_of(tmp_path)) is not None


def looks_of(root):
    return style.looks(analyse(results.read([root]), resamples=0))


def test_a_method_without_the_varied_option_is_a_level(tmp_path):
    """A dense model has no number of experts. It is drawn as a line at its own loss."""
    write_ablation(tmp_path, {"NUM_EXPERTS": (1024, 4096, 16384)}, seeds=(0,))
    write_run(tmp_path / "dense", "Dense", 32, 3e11, settings={}, loss=2.125)
    (found,) = ablations.find(results.read([tmp_path]))
    assert found.kind == "line"
    assert found.panels[0].losses["Dense"] == {(ablations.UNUSED,): [2.125]}
    drawn = ablation_figures.ablation(found, looks_of(tmp_path))
    levels = [line for line in drawn.axes[0].lines if set(line.get_ydata()) == {2.125}]
    assert len(levels) == 1


def test_a_sweep_that_varies_nothing_is_no_ablation(tmp_path):
    write_ablation(tmp_path, {"NUM_EXPERTS": (1024,)})
    assert ablations.find(results.read([tmp_path])) == []


def test_looks_follow_from_the_series_and_the_baseline():
    series = [("dense", True), ("dense_swiglu", True), ("moe", False), ("peer", True), ("peer, k=8", True)]
    looks = style.styles(series, baseline=["dense_swiglu"])
    assert (looks["dense_swiglu"].colour, looks["dense_swiglu"].marker) == ("#000000", "o")
    assert len({(look.colour, look.marker) for look in looks.values()}) == 5
    assert looks["moe"].label == "moe, not causal"
    assert [look.line == "-" for look in looks.values()] == [True, True, False, True, True]
    many = style.styles([(f"method_{number}", True) for number in range(30)])
    assert len({(look.colour, look.marker, str(look.line)) for look in many.values()}) == 30


def test_names_too_long_for_a_legend_stay_apart():
    names = [f"peer, sweep=/a/directory/with/a/very/long/name/{last}" for last in "ab"]
    assert [look.label for look in style.styles([(name, True) for name in names]).values()] == names
    assert len(style.styles([(names[0], True)])[names[0]].label) < len(names[0])


def test_all_figures_of_a_report_draw_a_method_alike(everything):
    """This includes methods that only some of the figures show."""
    analysis = analyse(results.read([everything / "runs"]), resamples=0)
    looks = style.looks(analysis)
    assert looks["Dense"].colour == "#000000"
    trained = figures.training(curves.read(figures.in_picture(analysis)), looks)
    used = figures.usage(analysis.rows, looks)
    losses = figures.isoflop(analysis, "params_active", looks)
    for found in ablations.find(analysis.rows):
        if found.kind == "line":
            assert {line.get_color() for line in ablation_figures.ablation(found, looks).axes[0].lines} <= {
                looks[name].colour for name in GAINS
            }
    for made, known in ((trained, GAINS), (used, GAINS.keys() - {"Dense"}), (losses, GAINS)):
        keys = {key.get_label(): key.get_color() for key in made.legends[0].legend_handles if hasattr(key, "get_color")}
        for name in known:
            label = name + (", not causal" if name == "MoE (expert choice)" else "")
            assert keys[label] == looks[name].colour


@pytest.mark.slow
def test_many_series_are_too_many_for_a_figure(tmp_path):
    axes = {"PEER.top_k": (1, 2, 3, 4, 5, 6, 7, 8)}
    write_ablation(tmp_path / "k", axes, seeds=(0,), widths=(16, 32, 64))
    write_headline(tmp_path / "plain", budgets=(3e11,), widths=(16, 32, 64), seeds=(0,), methods=("PEER",), lines=False)
    text = Page(write_report([tmp_path], tmp_path / "out", resamples=0)).text
    assert "These series are in the tables, but not in the figures: PEER, top_k=1; PEER, top_k=2" in text


@pytest.mark.parametrize(("low", "high"), [(1.8e4, 2.3e5), (1e4, 1.1e4), (1e5, 1e9), (3.0, 5.0), (2e11, 3.2e12)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = style.round_numbers(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("number", "text"), [(12345, "12.3k"), (999.9, "1k"), (999_600, "1M"), (5e12, "5T"), (0.25, "0.25"), (None, "-")]
)
def test_numbers_are_short(number, text):
    assert reading.si(number) == text


# What a report reads


def of_class(root, name, label, loss, *, seed=0, d=32, **said):
    """Writes a run of a sweep that calls its method by a label of its own."""
    said = {"layer": name, "options": {}, "is_baseline": False} | said
    write_run(root / f"{label}-d{d}-seed{seed}", name, d, 3e11, settings={}, label=label, loss=loss, seed=seed, **said)


@pytest.mark.slow
def test_the_label_of_the_sweep_is_the_method_and_the_class_a_column(tmp_path):
    runs = tmp_path / "runs"
    for d in (16, 32, 64):
        of_class(runs, "PEER", "peer", 1.5, d=d)
        of_class(runs, "PEER", "peer_layer_norm", 2.5, d=d, options={"query_norm": "layer"})
        of_class(runs, "Dense", "gelu", 2.0, d=d, is_baseline=True)
        of_class(runs, "Dense", "swiglu", 2.25, d=d, options={"activation": "swiglu"})
    write_run(runs / "lone", "Dense", 32, 3e11)  # of an earlier version, outside the sweep
    text = Page(write_report([runs], tmp_path / "out", resamples=0)).text
    assert "5 methods (Dense; gelu; peer; peer_layer_norm; swiglu)" in text
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {(row["method"], row["size"]): row for row in csv.DictReader(file)}
    assert len(rows) == 13
    assert rows["peer", "d32"]["loss"] == "1.5"
    assert rows["peer_layer_norm", "d32"]["layer"] == "PEER"
    assert json.loads(rows["peer_layer_norm", "d32"]["options"]) == {"query_norm": "layer"}
    assert [rows["Dense", "d32"][name] for name in ("layer", "options")] == ["", ""]
    assert not {"found", "directory", "text", "table"} & rows["peer", "d32"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [None, "swiglu"])
def test_the_page_names_the_baseline(tmp_path, baseline):
    """The baseline is the method that the sweep names, else the layer that says so, whatever they are called."""
    for d, loss in ((16, 2.2), (32, 2.0), (64, 2.1)):
        for label, better, is_baseline in (("gelu", 0.0, True), ("swiglu", 0.1, False), ("peer", 0.2, False)):
            of_class(tmp_path / "runs", "Any", label, loss - better, d=d, is_baseline=is_baseline)
    runs = [path.name for path in (tmp_path / "runs").iterdir()]
    SweepDirectory(tmp_path / "runs").keep_sweep({"baseline": baseline, "tuning": ""}, runs)
    analysis = analyse(results.read([tmp_path / "runs"]), resamples=0)
    text = Page(report.write_report(analysis, [tmp_path / "runs"], tmp_path / "out")).text
    expected = baseline or "gelu"
    assert f"Against {expected} Differences in loss" in text
    assert {found.series: found.difference for found in analysis.comparisons} == pytest.approx(
        {"swiglu": -0.1, "peer": -0.2} if baseline is None else {"gelu": 0.1, "peer": -0.1}
    )
    assert style.looks(analysis)[expected].colour == "#000000"
    assert style.looks(analysis)["peer"].colour != "#000000"


def test_runs_of_other_rates_are_not_one_point(tmp_path):
    """Neither two lone runs, in one directory or in two, nor the runs of two sweeps that are reported together."""
    for name, loss in (("0.012", 1.5), ("0.0001", 2.5)):
        config = {"AdamW.learning_rate": name, "Run.seed": "0"}
        write_run(tmp_path / "lone" / name, "PEER", 32, 3e11, loss=loss, config=config)
        write_run(tmp_path / name / "run", "PEER", 32, 3e11, loss=loss, config=config)
        for d in (16, 32):
            said = {"config": config | {"AdamW.learning_rate": str(float(name) / d)}}
            of_class(tmp_path / f"sweep-{name}", "PEER", "peer", loss, d=d, **said)
    for folders in (["lone"], ["0.012", "0.0001"]):
        directories = [tmp_path / folder for folder in folders]
        out = tmp_path / "out" / folders[0]
        text = Page(write_report(directories, out, resamples=0)).text
        assert (
            "The lowest loss measured is 1.5000 nats per token by PEER, learning_rate=0.012 (size d32, 1 run)" in text
        )
        assert "the next lowest 2.5000 by PEER, learning_rate=0.0001 (size d32, 1 run)" in text
        with (out / "results.csv").open() as file:
            rows = {row["AdamW.learning_rate"]: row["loss"] for row in csv.DictReader(file)}
        assert rows == {"0.012": "1.5", "0.0001": "2.5"}
    (found,) = ablations.find(analyse(results.read([tmp_path / "lone"]), resamples=0).rows)
    assert (found.title, found.values) == ("learning rate", ((0.0001,), (0.012,)))
    merged = [tmp_path / "sweep-0.012", tmp_path / "sweep-0.0001"]
    found = {curve.series: curve.best()[1] for curve in analyse(results.read(merged), resamples=0).curves}
    assert found == {f"peer, sweep={merged[0]}": 1.5, f"peer, sweep={merged[1]}": 2.5}
    (curve,) = analyse(results.read(merged[:1]), resamples=0).curves  # alone, its rates follow the width
    assert (curve.series, len(curve.points("params_active"))) == ("peer", 2)


def test_each_sweep_of_a_directory_tells_the_tuning_of_its_own_runs(tmp_path):
    root = tmp_path / "runs"
    for seed, name in enumerate(("first", "second", "both", "lone")):
        write_run(root / name, "PEER", 32, 3e11, seed=seed, settings={}, lines=False)
    shutil.copytree(root / "both", tmp_path / "runs" / "both-again")  # a copy that belongs to no sweep
    directory = SweepDirectory(root)
    directory.keep_sweep({"tuning": "Rates were tried by day.", "methods": {"peer": {"A.b": 1}}}, ["first", "both"])
    directory.keep_sweep({"tuning": "Rates were tried by night.", "methods": ["peer"]}, ["second", "both", "unmade"])
    told, untold = report.tuning(results.read([root]))
    assert {(sweep.text, sweep.runs) for sweep in told} == {
        ("Rates were tried by day.", 2),
        ("Rates were tried by night.", 2),
    }
    assert untold == ["lone"]
    text = Page(write_report([root], tmp_path / "out", resamples=0)).text
    assert "Rates were tried by day." in text
    assert "Rates were tried by night." in text
    assert "1 of the runs belong to no sweep" in text


listed = []
sys.addaudithook(lambda event, given: listed.append(str(given[0])) if event in ("os.listdir", "os.scandir") else None)


def test_nothing_inside_of_a_run_is_walked(tmp_path):
    root = tmp_path / "runs"
    for number in range(1000):
        folder = root / f"run{number}"
        (folder / "checkpoints" / "5" / "run").mkdir(parents=True)
        (folder / "config.gin").write_text("")
    write_run(root / "finished", "PEER", 32, 3e11, lines=False)
    shutil.copytree(root / "finished", root / "run7" / "checkpoints" / "5" / "run", dirs_exist_ok=True)
    listed.clear()
    rows = results.read([root])
    assert [row.run for row in rows] == ["finished"]
    assert report.failures([root]).rows == []
    assert listed
    assert set(listed) <= {str(root)}


def test_a_row_is_read_without_the_others(tmp_path):
    write_ablation(tmp_path, {"PEER.top_k": (4, 8)}, seeds=(0,))
    rows = results.read([tmp_path])
    assert [results.row(RunDirectory(row.directory), tmp_path) for row in rows] == rows
    alone = results.row(RunDirectory(rows[0].directory), rows[0].directory)
    assert alone.run == rows[0].directory.name
    row_table.write(rows[:1], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        (written,) = csv.DictReader(file)
    assert (written["run"], float(written["loss"]), written["PEER.top_k"]) == (rows[0].run, rows[0].loss, "4")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(InputError, match="holds no finished run"):
        results.row(RunDirectory(tmp_path / "unfinished"), tmp_path)
