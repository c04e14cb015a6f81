"""Corpora: what is read, what is refused, and that validation and training share no text."""

import gzip
import json
import subprocess
import sys
import sysconfig

import pytest

from peer_jax.data import corpora
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError


def write_jsonl(path, texts, key="text"):
    lines = "".join(json.dumps({key: text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def texts(corpus, split):
    return [document.text for document in corpus.documents(split)]


def test_stdlib_splits_share_no_text_and_hold_every_module_once():
    corpus = corpora.python_stdlib()
    train, validation = list(corpus.documents("train")), list(corpus.documents("validation"))
    assert len(train) > 400
    assert 0.005 < len(validation) / len(train) < 0.1
    assert not {d.text for d in train} & {d.text for d in validation}
    names = [d.name for d in train + validation]
    assert len(set(names)) == len(names)
    assert "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    root = sysconfig.get_path("stdlib")
    for document in validation[:5]:
        with open(f"{root}/{document.name}", encoding="utf-8", newline="") as file:
            text = file.read()
        assert text.startswith(document.text)
        assert document.text == text or 2**13 < len(document.text) <= 2**14


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The folders stdlib, purelib and platlib of an interpreter, for a test to fill."""
    roots = {name: tmp_path / name for name in ("stdlib", "purelib", "platlib")}
    for root in roots.values():
        root.mkdir()
    real = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(roots[name]) if name in roots else real(name))
    return tuple(roots.values())


def write_modules(root, package, count):
    (root / package).mkdir()
    for i in range(count):
        (root / package / f"m{i}.py").write_text(f"# {package} {i}\n" + f"x = {i}\n" * (i % 90) ** 2)


def test_packages_and_stdlib_are_read_once_and_split_by_path(environment, tmp_path):
    stdlib, purelib, platlib = environment
    write_modules(stdlib, "json", 100)
    write_modules(purelib, "numpy", 100)
    write_modules(platlib, "jaxlib", 100)
    for folder in ("site-packages", "dist-packages", "__pycache__"):
        write_modules(stdlib, folder, 1)
    (purelib / "numpy" / "latin.py").write_bytes("# é".encode("latin-1"))
    (purelib / "numpy" / "binary.py").write_bytes(b"a\0b")
    (purelib / "numpy" / "notes.txt").write_text("no module")
    corpus = corpora.python_packages(validation_share=0.3)
    documents = {split: list(corpus.documents(split)) for split in ("train", "validation")}
    names = [document.name for split in documents.values() for document in split]
    assert sorted(names) == sorted(f"{package}/m{i}.py" for package in ("json", "numpy", "jaxlib") for i in range(100))
    assert corpus.name == "python_packages"
    assert {name.split("/")[0] for name in names[:30]} == {"json", "numpy", "jaxlib"}  # not folder by folder
    assert {document.name.split("/")[0] for document in documents["validation"][:20]} == {"json", "numpy", "jaxlib"}
    assert all(len(document.text) <= 2**12 for document in documents["validation"])
    assert max(len(document.text) for document in documents["train"]) > 2**14

    held_out = {document.name for document in documents["validation"]}
    alone = {d.name for d in corpora.python_stdlib(validation_share=0.3).documents("validation")}
    assert alone == {name for name in held_out if name.startswith("json/")}

    # A copy of a held-out file is not trained on, wherever it is. A new release of another package moves no file.
    copied = next(document for document in corpus.documents("validation") if document.name.startswith("numpy/"))
    held = set(texts(corpus, "validation"))
    for i in range(5):
        (platlib / f"vendored{i}.py").write_bytes((purelib / copied.name).read_bytes())
    (purelib / "numpy" / "m0.py").write_text("another release")
    corpora.text_files.python_sources.cache_clear()  # a process that starts after the installation has an empty cache
    again = corpora.python_packages(validation_share=0.3)
    assert not [d.name for d in again.documents("train") if d.name.startswith("vendored")]
    assert held_out <= {d.name for d in again.documents("validation")}
    assert len(held - set(texts(again, "validation"))) <= 1
    assert again.fingerprint() != corpus.fingerprint()


def test_one_folder_under_two_names_is_read_once(environment):
    stdlib, purelib, platlib = environment
    platlib.rmdir()
    platlib.symlink_to(purelib)  # lib64, in many virtual environments
    write_modules(stdlib, "json", 20)
    write_modules(purelib, "numpy", 20)
    assert len(corpora.python_packages().files) == 40


def test_interpreter_without_sources_is_named(environment):
    stdlib, purelib, _ = environment
    write_modules(stdlib, "json", 2)
    with pytest.raises(InputError, match=r"purelib and .*platlib holds no \.py files of installed packages; install"):
        list(corpora.python_packages().files)
    write_modules(purelib, "numpy", 2)
    corpora.text_files.python_sources.cache_clear()
    assert corpora.python_packages().files
    for file in stdlib.rglob("*.py"):
        file.unlink()
    corpora.text_files.python_sources.cache_clear()
    for make in (corpora.python_packages, corpora.python_stdlib):
        with pytest.raises(InputError, match=r"stdlib holds no \.py files of the standard library; use local_files"):
            list(make().files)


@pytest.mark.slow
def test_validation_of_installed_packages_is_spread_over_them():
    """Where configs/data/python_packages.gin cuts validation, the text that is left is from many packages."""
    sizes, total, taken = {}, 0, 2**18
    for document in corpora.python_packages().documents("validation"):
        size = len(document.text.encode())
        if total < taken:
            package = document.name.split("/")[0]
            sizes[package] = sizes.get(package, 0) + size
        total += size
    assert total > 2**20
    assert len(sizes) > 15
    assert max(sizes.values()) < taken / 2


def test_folder_of_all_kinds(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "a.txt").write_text("plain text é\r\n")
    (tmp_path / "deep" / "b.md").write_text("# markdown")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\0\1\2")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"compressed"))
    write_jsonl(tmp_path / "d.jsonl", ["first", "", "second\nline"])
    write_jsonl(tmp_path / "e.json.gz", ["third"])
    corpus = corpora.local_files(tmp_path)
    found = texts(corpus, "train") + texts(corpus, "validation")
    # newlines are kept as they are in the file
    expected = ["plain text é\n" if sys.platform == "win32" else "plain text é\r\n"]
    expected += ["# markdown", "compressed", "first", "second\nline", "third"]
    assert sorted(found) == sorted(expected)
    assert texts(corpus, "train") == texts(corpora.local_files(tmp_path), "train")


def test_copies_of_a_document_stay_in_one_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i % 100}" for i in range(300)])
    write_jsonl(tmp_path / "b.jsonl", [f"text {i}" for i in range(50, 150)])
    corpus = corpora.local_files(tmp_path, validation_share=0.2)
    train, validation = texts(corpus, "train"), texts(corpus, "validation")
    assert len(train) + len(validation) == 400
    assert validation
    assert not set(train) & set(validation)


def test_validation_path_takes_its_texts_out_of_training(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [f"text {i}" for i in range(20)] * 2)
    write_jsonl(tmp_path / "held.jsonl", ["text 3", "text 7", "new"])
    corpus = corpora.local_files(tmp_path / "train.jsonl", validation_path=tmp_path / "held.jsonl")
    assert texts(corpus, "validation") == ["text 3", "text 7", "new"]
    assert texts(corpus, "train") == [f"text {i}" for i in range(20) if i not in (3, 7)] * 2


def test_small_corpora_still_have_validation(tmp_path):
    write_jsonl(tmp_path / "two.jsonl", ["one", "other"])
    corpus = corpora.local_files(tmp_path / "two.jsonl", validation_share=1e-9)
    assert sorted(texts(corpus, "train") + texts(corpus, "validation")) == ["one", "other"]
    assert len(texts(corpus, "validation")) == 1

    lone = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "lone.txt").write_text(lone)
    corpus = corpora.local_files(tmp_path / "lone.txt", validation_share=0.1)
    (train,), (validation,) = texts(corpus, "train"), texts(corpus, "validation")
    assert train + validation == lone
    assert train.endswith("\n")
    assert 0.09 < len(validation) / len(lone) < 0.11


def test_fingerprint_is_of_the_contents(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("hello")
    first = corpora.local_files(tmp_path / "one").fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert corpora.local_files(tmp_path / "two").fingerprint() == first
    assert corpora.local_files(tmp_path / "two", validation_share=0.5).fingerprint() != first
    (tmp_path / "two" / "a.txt").write_text("hellO")
    assert corpora.local_files(tmp_path / "two").fingerprint() != first
    (tmp_path / "two" / "a.txt").write_text("hello")
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "b.txt")
    assert corpora.local_files(tmp_path / "two").fingerprint() != first


def test_tfds_fingerprint_is_of_the_names():
    one = corpora.tfds_corpus("c4/en:3.1.0")
    assert one.name == "c4_en_3.1.0"
    assert one.fingerprint() == corpora.tfds_corpus("c4/en:3.1.0").fingerprint()
    assert one.fingerprint() != corpora.tfds_corpus("c4/en:3.0.1").fingerprint()
    assert one.fingerprint() != corpora.tfds_corpus("c4/en:3.1.0", validation_split=None).fingerprint()


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "gone.txt").write_text("text")
    corpus = corpora.local_files(tmp_path)
    assert len(corpus.files) == 1
    (tmp_path / "gone.txt").unlink()
    for read in (corpus.fingerprint, lambda: list(corpus.documents("train"))):
        with pytest.raises(InputError, match=r"gone\.txt can't be read \(No such file"):
            read()


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist; give a text file"):
        list(corpora.local_files(tmp_path / "nowhere").files)
    with pytest.raises(InputError, match="holds no text files; expected names that end in"):
        list(corpora.local_files(tmp_path).files)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"absent\.txt does not exist"):
        list(corpora.local_files(tmp_path, validation_path=tmp_path / "absent.txt").validation_files)
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(InputError, match="validation_share is"):
            corpora.local_files(tmp_path, validation_share=share)
    with pytest.raises(InputError, match="split is 'test'"):
        corpora.local_files(tmp_path).documents("test")
    with pytest.raises(InputError, match="'c4/en' names no version"):
        corpora.tfds_corpus("c4/en")
    with pytest.raises(InputError, match=r"is not a folder; give the folder that holds c4/en:3\.1\.0"):
        corpora.tfds_corpus("c4/en:3.1.0", data_dir=tmp_path / "absent").fingerprint()


def test_bad_tasks_are_named(tmp_path):
    corpus = corpora.tfds_corpus("c4/en:3.1.0")
    for changes, says in [
        ({"seq_len": 1}, "seq_len is 1"),
        ({"max_train_tokens": -1}, "max_train_tokens is -1"),
        ({"max_validation_tokens": 0}, "max_validation_tokens is 0"),
    ]:
        with pytest.raises(InputError, match=says):
            TextTask(**{"corpus": corpus, "seq_len": 256, **changes})
    with pytest.raises(InputError, match=r"vocabulary '.*none\.model' can't be read \(No such file"):
        TextTask(corpus, 256, vocabulary=str(tmp_path / "none.model")).cache_path()
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk\.model' is not a SentencePiece model"):
        TextTask(corpus, 256, vocabulary=str(tmp_path / "junk.model")).cache_path()


def test_wrong_types_are_named():
    code = """
from peer_jax.data.corpora import local_files, tfds_corpus
from peer_jax.data.text_task import TextTask
c4 = tfds_corpus("c4/en:3.1.0")
for make, says in [
    (lambda: local_files(".", validation_share="0.1"), "validation_share is '0.1'"),
    (lambda: local_files(".", validation_share=True), "validation_share is True"),
    (lambda: TextTask(c4, 256.0), "seq_len is 256.0"),
    (lambda: TextTask("c4", 256), "corpus is 'c4'"),
    (lambda: TextTask(c4, 256, max_train_tokens=1e9), "max_train_tokens is 1000000000.0"),
    (lambda: TextTask(c4, 256, vocabulary=3), "vocabulary is 3"),
    (lambda: tfds_corpus(3), "TFDS builder 3 names no version"),
]:
    try:
        make()
    except ValueError as error:
        assert str(error).startswith(says), error
    else:
        raise AssertionError(says)
"""
    # This runs in another process, because here the import hook of conftest.py would report the types first.
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cache_path_depends_on_all_that_determines_the_contents(tmp_path, monkeypatch):
    monkeypatch.setenv("PEER_JAX_CACHE", str(tmp_path))
    task = TextTask(corpora.tfds_corpus("c4/en:3.1.0"), 256)
    assert task.cache_path().parent == tmp_path
    assert task.cache_path().name.startswith("c4_en_3.1.0-bytes-256-")
    others = [
        TextTask(corpora.tfds_corpus("c4/en:3.0.1"), 256),
        TextTask(task.corpus, 512),
        TextTask(task.corpus, 256, max_train_tokens=10),
        TextTask(task.corpus, 256, max_validation_tokens=10),
    ]
    assert len({t.cache_path().name for t in [task, *others]}) == 5
    assert TextTask(task.corpus, 256, cache_dir="/elsewhere").cache_path().name == task.cache_path().name


def test_naming_a_task_imports_nothing_heavy():
    code = (
        "import sys; from peer_jax.data import corpora, text_task;"
        "text_task.TextTask(corpora.python_stdlib(), 256).cache_path();"
        "assert not {'tensorflow', 'seqio', 'jax', 'grain', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
