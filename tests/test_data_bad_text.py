"""What is no text is named, left out or counted, and never hangs, ends in a traceback or is trained on."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from peer_jax.data import corpora
from peer_jax.data.prepared import prepared
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError


def write_jsonl(path, texts, key="text"):
    lines = "".join(json.dumps({key: text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def texts(corpus, split):
    return [document.text for document in corpus.documents(split)]


def _binary(path):
    (path / "x.txt").write_bytes(b"abc\0def")


def _latin1(path):
    (path / "x.txt").write_bytes("é".encode("latin-1"))


def _cut_gzip(path):
    (path / "x.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:30])


def _not_gzip(path):
    (path / "x.txt.gz").write_bytes(b"plain")


def _bad_json(path):
    (path / "x.jsonl").write_text('{"text": "fine"}\n{"text": \n')


def _no_key(path):
    (path / "x.jsonl").write_text('{"text": "fine"}\n{"content": "elsewhere"}\n')


def _number(path):
    (path / "x.jsonl").write_text('{"text": 3}\n')


def _no_object(path):
    (path / "x.jsonl").write_text("[1]\n")


def _surrogate(path):
    (path / "x.jsonl").write_text('{"text": "\\ud800"}\n')


def _nested(path):
    (path / "x.jsonl").write_text('{"text": "fine"}\n' + "[" * 100_000 + "]" * 100_000 + "\n")


def _long_keys(path):
    (path / "x.jsonl").write_text(json.dumps({"k" * 20_000: 1} | {f"key{i:02}": i for i in range(50)}) + "\n")


def _zstd(path):
    (path / "x.txt").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(range(200)))


def _zstd_lines(path):
    (path / "x.jsonl").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(range(200)))


def _bzip2(path):
    (path / "x.txt").write_bytes(bz2.compress(b"text"))


def _xz(path):
    (path / "x.txt").write_bytes(lzma.compress(b"text"))


def _utf16(path):
    (path / "x.txt").write_text("text", encoding="utf-16")


def _only_others(path):
    for name in ("a.rs", "b.rs", "c.txt.zst", "Makefile"):
        (path / name).write_text("text")


def _pipe(path):
    os.mkfifo(path / "x.txt")


def _empty(path):
    (path / "x.txt").write_text("")


def _too_short(path):
    (path / "x.txt").write_text("a")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_binary, r"x\.txt: a binary file"),
        (_latin1, r"x\.txt: not UTF-8 text \(byte 0\)"),
        (_cut_gzip, r"x\.txt\.gz can't be read"),
        (_not_gzip, r"x\.txt\.gz can't be read"),
        (_bad_json, r"x\.jsonl, line 2: not JSON"),
        (_no_key, r"x\.jsonl, line 2: no string under text_key 'text' \(found content\)"),
        (_number, r"x\.jsonl, line 1: no string under text_key 'text'"),
        (_no_object, r"x\.jsonl, line 1: no string under text_key 'text' \(found no keys\)"),
        (_surrogate, r"x\.jsonl, line 1: half of a surrogate pair"),
        (_nested, r"x\.jsonl, line 2: JSON that is nested too deeply"),
        (_long_keys, r"\(found key00, key01, key02, key03, key04, key05, key06, key07 and 43 more\)"),
        (_zstd, r"x\.txt is compressed with zstd; text is read as UTF-8, plain or compressed with gzip \(\.gz\)"),
        (_zstd_lines, r"x\.jsonl is compressed with zstd; text is read"),
        (_bzip2, r"x\.txt is compressed with bzip2; text is read"),
        (_xz, r"x\.txt is compressed with xz; text is read"),
        (_utf16, r"x\.txt is UTF-16 text; text is read as UTF-8"),
        (_only_others, r"but it has others \(2 \.rs, 1 \.zst, 1 no suffix\): give patterns for them"),
        (_pipe, r"but it has others \(1 pipes or devices\)"),
        (_empty, "holds no text: every document in it is empty"),
        (_too_short, r"x\.txt is the only document and too short"),
    ],
)
def test_bad_files_are_named(tmp_path, make, says):
    make(tmp_path)
    corpus = corpora.local_files(tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        list(corpus.documents("train"))
    assert "\n" not in str(caught.value)


def test_what_a_program_adds_to_text_is_not_trained_on(tmp_path):
    """A byte order mark is removed, integers may have any number of digits, and a pipe does not hang."""
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first", "n": ' + b"9" * 5000 + b"}\n")
    os.mkfifo(tmp_path / "pipe.txt")
    corpus = corpora.local_files(tmp_path, split="documents")
    assert sorted(texts(corpus, "train") + texts(corpus, "validation")) == ["first", "marked"]
    assert corpus.passed_over == "1 pipes or devices"
    with pytest.raises(InputError, match=r"pipe\.txt is neither a file nor a folder"):
        corpora.local_files(tmp_path / "pipe.txt").fingerprint()


def test_bad_lines_and_files_can_be_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"no": 1}\n{broken\n{"text": "last"}\n')
    _bzip2(tmp_path)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:30])
    (tmp_path / "latin.md").write_bytes("é".encode("latin-1"))
    stops, skips = (corpora.local_files(tmp_path, on_error=what) for what in ("stop", "skip"))
    with pytest.raises(InputError):
        list(stops.documents("train"))
    found = texts(skips, "train") + texts(skips, "validation")
    assert sorted(found) == sorted([*(f"text {i}" for i in range(50)), "last"])
    shown = sorted(sentence.removeprefix(f"{tmp_path}/") for sentence in skips.left_out)
    assert [sentence.split(";")[0].split(" (")[0] for sentence in shown] == [
        "a.jsonl, line 51: no string under text_key 'text'",
        "a.jsonl, line 52: not JSON",
        "cut.txt.gz can't be read",
        "latin.md: not UTF-8 text",
        "x.txt is compressed with bzip2",
    ]
    assert skips.fingerprint() != stops.fingerprint()
    assert stops.left_out == []


def test_patterns_name_other_files(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("a.rs", "src/b.rs", "src/c.js", "d.txt", ".hidden.rs"):
        (tmp_path / name).write_text(name)
    assert corpora.local_files(tmp_path).passed_over == "2 .rs, 1 .js"
    for patterns, expected in [
        ("*.rs", ["a.rs", "src/b.rs"]),
        (("src/*", "*.txt"), ["d.txt", "src/b.rs", "src/c.js"]),
        (["*"], ["a.rs", "d.txt", "src/b.rs", "src/c.js"]),
    ]:
        assert sorted(file.relative for file in corpora.local_files(tmp_path, patterns=patterns).files) == expected
    with pytest.raises(InputError, match=r"no name matches '\*\.go', but it has others \(2 \.rs, 1 \.js, 1 \.txt\)"):
        list(corpora.local_files(tmp_path, patterns="*.go").files)
    for bad in ((), "", ("*.rs", "")):
        with pytest.raises(InputError, match=r"patterns is .*; give patterns of file names, such as \('\*\.rs'"):
            corpora.local_files(tmp_path, patterns=bad)


def test_empty_paths_are_not_the_current_folder(tmp_path):
    for make in (
        lambda: corpora.local_files(""),
        lambda: corpora.local_files(tmp_path, validation_path=""),
        lambda: corpora.tfds_corpus("c4/en:3.1.0", data_dir=""),
        lambda: prepared(""),
        lambda: TextTask(corpora.local_files(tmp_path), 8, cache_dir=""),
    ):
        with pytest.raises(InputError, match=r"(path|data_dir|cache_dir) is ''; give"):
            make()
    with pytest.raises(InputError, match="gs://bucket/text is an address"):
        corpora.local_files("gs://bucket/text")
