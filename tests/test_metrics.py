"""metrics.jsonl, TensorBoard and the progress bar."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from peer_jax.run_directory import RunDirectory
from peer_jax.training.metrics import MetricsLog, ProgressBar


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """(step, tag) -> value of each event file, in the order they were opened; records are length, crc, data, crc."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, scalars = path.read_bytes(), {}
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            scalars |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
        found.append(scalars)
    return found


def write(folder, resume_step, *new):
    with MetricsLog(RunDirectory(folder), resume_step) as log:
        for step in new:
            log.write(step, {"loss": step / 2, "validation_loss": 1.0})


def test_scalars_by_step(tmp_path):
    write(tmp_path, 0, 1, 2, 2)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [{"step": step, "loss": step / 2, "validation_loss": 1.0} for step in (1, 2, 2)]


def test_lines_are_there_before_the_log_is_closed(tmp_path):
    with MetricsLog(RunDirectory(tmp_path), 0) as log:
        log.write(1, {"loss": 2.0})
        assert steps(tmp_path) == [1]


def test_numbers_come_back_bit_for_bit(tmp_path):
    value = 0.1 + 1e-17 + 2**-52
    with MetricsLog(RunDirectory(tmp_path), 0) as log:
        log.write(1, {"loss": value})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == value


def test_resuming_drops_later_steps(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    write(tmp_path, 2, 3, 5)
    assert steps(tmp_path) == [1, 2, 3, 5]
    write(tmp_path, 0, 1)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "loss": 1.5}', "{", '{"step"}\n', "\x00\x00\x00\n"])
def test_half_written_line_is_dropped(tmp_path, tail):
    """A line counts only with its end; what a crash of the machine leaves may be anything."""
    write(tmp_path, 0, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write(tmp_path, 9, 10)
    assert steps(tmp_path) == [1, 2, 10]


def test_event_files_hold_the_scalars(tmp_path):
    write(tmp_path, 0, 1, 2)
    (scalars,) = events(tmp_path)
    assert scalars[1, "loss"] == 0.5
    assert scalars[2, "loss"] == 1.0
    assert scalars[2, "validation_loss"] == 1.0


@pytest.mark.parametrize("total", [1, 7, 100])
def test_bar_off_the_terminal_is_about_ten_lines(capsys, total):
    with ProgressBar("train", total) as bar:
        for done in range(1, total + 1):
            bar.update(done, f"loss {done}")
    printed = capsys.readouterr()
    assert printed.out == ""
    shown = printed.err.splitlines()
    assert min(total, 10) <= len(shown) <= 12
    assert shown[-1] == f"train {total}/{total} loss {total}"


def test_disabled_bar_is_silent(capsys):
    with ProgressBar("train", 10, enabled=False) as bar:
        for done in range(1, 11):
            bar.update(done, "loss 1")
    assert capsys.readouterr() == ("", "")


def test_bar_starts_where_the_run_does(capsys):
    with ProgressBar("train", 100, 55) as bar:
        bar.update(56)
        bar.update(60)
    assert capsys.readouterr().err.splitlines() == ["train 60/100 "]
