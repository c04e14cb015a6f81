"""Tables of rows: what is written is read again whole, tables of earlier versions are read, and damage is named."""

import csv
import dataclasses
import io
import math
import shutil
from pathlib import Path

import pytest
from test_report import Page, of_class, write_ablation, write_headline, write_run

from peer_jax.analysis import report, results, row_table, tables
from peer_jax.analysis.isoflop import analyse
from peer_jax.analysis.row import distinct, in_order
from peer_jax.errors import InputError
from peer_jax.run_directory import SweepDirectory
from peer_jax.storage import place

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sweep with a baseline of its own and runs that say all, an ablation, and a lone run that has grown."""
    root = tmp_path_factory.mktemp("rows") / "runs"
    methods = ("Dense", "PEER")
    write_headline(root / "headline", budgets=(3e11, 1e12), widths=(16, 24, 32, 64), seeds=(0, 1), methods=methods)
    for d in (16, 32):
        config = {"AdamW.learning_rate": "0.01", "Run.name": "'a, \"b\"\n'"}
        of_class(root / "named", "Any", "swiglu", 2.0 + d, d=d, options={"a": [1, None, "x"]}, config=config)
        of_class(root / "named", "Any", "peer", 1.0 + d, d=d, is_baseline=True, config=config | {"Run.seed": "0"})
    SweepDirectory(root / "named").keep_sweep({"baseline": "swiglu"}, [p.name for p in (root / "named").iterdir()])
    write_ablation(root / "values", {"PEER.x": (1, 2.5, None, True, "batch", "2"), "PEER.y": ([1, 2],)}, zipped=False)
    shutil.copytree(next((root / "headline").glob("dense-d16*")), root / "again" / "copy")
    grown = {"source": "a", "num_experts": 4, "steps": 5, "tokens": 6, "training_flops": 7.0}
    machine = {"platform": "cpu", "device": "cpu", "processor": "A, B", "cores": 1, "all_cores": 2}
    evaluations = {"python": {"loss": 2.0}, "wiki": {"loss": 3.5}}
    write_run(root / "lone", "PKM", 32, 3e11, grown=grown, machine=machine, evaluations=evaluations, loss=2.0)
    return root


def test_an_analysis_of_the_table_is_that_of_the_directories(runs, tmp_path):
    rows = results.read([runs])
    analysis = analyse(rows, resamples=50)
    report.write_report(analysis, [runs], tmp_path / "out")
    table = tmp_path / "out" / "results.csv"
    again = results.read([table])
    # A report names a lone run's budget after the budgets near it.
    assert again == in_order(dataclasses.replace(row, budget=float(f"{row.budget:.1g}")) for row in rows)
    assert {row.table for row in again} == {place(table)}
    assert analyse(again, resamples=50) == analysis
    # A second report on it writes the same table.
    report.write_report(analyse(again, resamples=0), [table], tmp_path / "second")
    assert (tmp_path / "second" / "results.csv").read_bytes() == table.read_bytes()


def test_the_page_of_a_table_has_the_same_numbers_and_says_what_it_lacks(runs, tmp_path):
    failed = runs / "headline" / "peer-d128"
    failed.mkdir(exist_ok=True)
    (failed / "failure.json").write_text('{"reason": "step 17 has loss nan"}')
    first = Page(report.write_report(analyse(results.read([runs]), resamples=50), [runs], tmp_path / "out")).text
    table = tmp_path / "out" / "results.csv"
    analysis = analyse(results.read([table]), resamples=50)
    second = Page(report.write_report(analysis, [table], tmp_path / "second")).text
    for shown in (
        *tables.claims(analysis),
        tables.minima(analysis),
        tables.runs(analysis.rows),
        tables.paired(analysis),
    ):
        for cells in shown.rows:
            assert " ".join(" ".join(cells).split()) in first
            assert " ".join(" ".join(cells).split()) in second
    assert "step 17 has loss nan" in first
    assert "step 17 has loss nan" not in second
    assert "A table of rows has no training curves, no failed runs, and not how rates were chosen" in second
    assert "A table of rows" not in first
    assert "There are no training curves" in second
    assert (tmp_path / "out" / "figures" / "training.svg").exists()
    assert not (tmp_path / "second" / "figures" / "training.svg").exists()


def test_a_run_counts_once_wherever_it_is_read(runs, tmp_path):
    rows = results.read([runs])
    row_table.write(rows, tmp_path / "results.csv")
    merged = results.read([tmp_path / "results.csv", runs, runs / "headline"])
    assert merged == rows
    assert all(row.table is None for row in merged)  # so that their training curves are found
    (copied,) = [row for row in rows if row.copies]
    assert {path.parent.name for path in copied.places} == {"again", "headline"}
    assert len(rows) == len(list(runs.rglob("result.json"))) - 1
    # Half from the table, half from directories.
    row_table.write([row for row in rows if row.method == "Dense"], tmp_path / "dense.csv")
    assert results.read([tmp_path / "dense.csv", runs]) == rows


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"loss": 1.25}, {"settings": {"a": 1}}, {"method": "other"}, {"config": {"a": "2"}}]
)
def test_what_decides_the_numbers_tells_runs_apart(runs, change):
    row = dataclasses.replace(results.read([runs])[0], config={"a": "1"})
    moved = dataclasses.replace(row, run="elsewhere", directory=Path("x/y"), wall_seconds=1.0, tokens_per_second=2.0)
    silent = dataclasses.replace(row, config={}, table=Path("t.csv"))
    assert len(distinct([silent, moved, row])) == 1
    assert distinct([silent, row])[0].config == {"a": "1"}
    assert len(distinct([row, dataclasses.replace(row, **change)])) == 2


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/results.csv")), ids=lambda path: path.parent.name)
def test_tables_of_earlier_versions_are_read(path):
    with path.open(newline="") as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    rows = results.read([path])
    assert len(rows) == len(lines)
    for row in rows:
        line = lines[row.run]
        assert (repr(row.loss), str(row.tokens), row.method) == (line["loss"], line["tokens"], line["method"])
        assert sum(row.flops_by_part.values()) == pytest.approx(row.flops_per_token)
        assert all(row.flops_by_part.values())
        for name, value in row.settings.items():
            assert str(value) == line[name]
    assert any(row.is_baseline for row in rows) == any(line["method"].lower() == "dense" for line in lines.values())
    assert analyse(rows, resamples=0).curves


def written(runs):
    """The cells of a whole table."""
    text = io.StringIO()
    row_table.write(results.read([runs / "headline"]), runs.parent / "whole.csv")
    text.write((runs.parent / "whole.csv").read_text())
    return list(csv.reader(io.StringIO(text.getvalue(), newline="")))


def put(cells, line, column, value):
    cells[line - 1][cells[0].index(column)] = value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda cells: put(cells, 3, "loss", "abc"), r"line 3 column 'loss' is damaged .*not 'abc'"),
        (lambda cells: put(cells, 4, "tokens", ""), r"line 4 column 'tokens' is damaged .*Field required"),
        (lambda cells: put(cells, 2, "budget", "-1"), r"line 2 column 'budget' is damaged .*greater than 0"),
        (lambda cells: put(cells, 2, "params_active", "1.5"), r"line 2 column 'params_active' is damaged"),
        (lambda cells: put(cells, 5, "settings", "{1}"), r"line 5 column 'settings' is damaged .*JSON"),
        (lambda cells: put(cells, 5, "directories", "[]"), r"line 5 column 'directories' is damaged"),
        (lambda cells: put(cells, 5, "flops_per_token/logits", "x"), r"line 5 column 'flops_per_token/logits' is dam"),
        (lambda cells: put(cells, 1, "method", "name"), r"line 1 has no column 'method', so it is no table of runs"),
        (lambda cells: put(cells, 1, "usage", "seed"), r"line 1 has the column 'seed' twice"),
        (lambda cells: cells[6].pop(), r"line 7 has \d+ cells where line 1 has \d+, at column 'config'"),
        (lambda cells: cells[6].append("1"), r"line 7 has \d+ cells where line 1 has \d+, after column 'config'"),
        (lambda cells: cells.__delitem__(slice(1, None)), r"holds no finished run"),
        (lambda cells: cells.clear(), r"line 1 has no column 'run'"),
    ],
)
def test_a_damaged_table_is_named_with_its_line_and_column(runs, tmp_path, damage, words):
    cells = written(runs)
    damage(cells)
    with (tmp_path / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(cells)
    with pytest.raises(InputError, match=words) as raised:
        results.read([tmp_path / "results.csv"])
    assert str(tmp_path / "results.csv") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "can't be read"),
        (b'run,method\n"a', "line 2 has no line end, so the file may be cut off"),
        (b'run,method\n"a\n', "line 1 has no column"),
        (b"a;b\n1;2\n", "line 1 has no column 'run'"),
        (b"# a page\n\ntext\n", "line 1 has no column 'run'"),
    ],
)
def test_a_foreign_file_is_named(tmp_path, content, words):
    (tmp_path / "file.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        results.read([tmp_path / "file.csv"])


def test_a_table_that_was_cut_off_within_a_line_is_refused(runs, tmp_path):
    written(runs)
    content = (runs.parent / "whole.csv").read_bytes()
    whole = len(results.read([runs.parent / "whole.csv"]))
    for end in range(len(content) - 900, len(content), 7):
        (tmp_path / "cut.csv").write_bytes(content[:end])
        if content[end - 1 : end] == b"\n":  # a cut between two lines can't be seen
            assert len(results.read([tmp_path / "cut.csv"])) < whole
        else:
            with pytest.raises(InputError, match=r"line \d+ has no line end"):
                results.read([tmp_path / "cut.csv"])


def test_a_run_that_diverged_is_read_as_it_was_written(tmp_path):
    write_run(tmp_path / "run", "PEER", 32, 3e11, loss=math.nan)
    row_table.write(results.read([tmp_path / "run"]), tmp_path / "results.csv")
    (row,) = results.read([tmp_path / "results.csv", tmp_path / "run"])
    assert math.isnan(row.loss)


def test_the_command_reports_on_tables(runs, tmp_path, run_cli):
    row_table.write(results.read([runs / "headline"]), tmp_path / "results.csv")
    out = ("--out", tmp_path / "out")
    status, printed, errors = run_cli("report", tmp_path / "results.csv", runs / "lone", *out)
    assert (status, errors) == (0, "")
    assert "PEER is below Dense, the baseline" in printed
    assert len(results.read([tmp_path / "out" / "results.csv"])) == 33
    status, _, errors = run_cli("report", tmp_path / "results.csv")
    assert status == 2
    assert "--out is not given" in errors
    (tmp_path / "results.csv").write_text("a,b\n")
    status, printed, errors = run_cli("report", tmp_path / "results.csv", *out)
    assert (status, printed, errors.count("\n")) == (2, "", 1)
    assert "line 1 has no column 'run'" in errors
