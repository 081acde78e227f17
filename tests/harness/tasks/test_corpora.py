"""Text that is already on the machine: the documented stream, its two parts, and what to do about another."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import sympy

from harness.tasks import Text, corpora
from harness.tasks.corpora import CorpusError

SHA256 = "5459d1a3880c29c26a38fff02d4c513e5f03a66d64b231c7e7e1cd0547efa7b7"


def sympy_files() -> list[Path]:
    """Every .py outside test folders, in the order of the stream."""
    root = Path(sympy.__file__).parent
    found = {path.relative_to(root).as_posix(): path for path in root.glob("**/*.py")}
    return [
        found[name] for name in sorted(found) if "/test/" not in f"/{name}" and "/tests/" not in f"/{name}"
    ]


def stream(paths: list[Path]) -> bytes:
    return b"".join(path.read_bytes() + b"\n" for path in paths)


def test_pycode_is_the_documented_stream() -> None:
    corpus = corpora.load("pycode")
    assert corpus.sha256 == SHA256
    assert corpus.files == 854
    assert corpus.training.size + corpus.evaluation.size == 16_613_125
    assert corpus.name == "pycode (sympy 1.14.0)"


def test_every_twentieth_file_is_held_out_and_none_is_in_both_parts() -> None:
    corpus, files = corpora.load("pycode"), sympy_files()
    held_out = files[19::20]
    assert hashlib.sha256(stream(files)).hexdigest() == SHA256
    assert corpus.evaluation.tobytes() == stream(held_out)
    assert corpus.training.tobytes() == stream([path for path in files if path not in held_out])


def test_a_corpus_is_read_once() -> None:
    assert corpora.load("pycode") is corpora.load("pycode")


def test_an_unknown_corpus_is_told_with_the_known_one() -> None:
    with pytest.raises(CorpusError) as caught:
        corpora.load("enwik8")
    assert str(caught.value) == "task.corpus='enwik8': use pycode"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next load read the corpus again."""
    monkeypatch.setattr(corpora, "_pycode", corpora._pycode.__wrapped__)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: None) -> Path:
    """An empty folder that passes for the installed sympy, version 1.0."""
    monkeypatch.setattr(corpora, "_package_folder", lambda name: tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_files_are_in_the_order_of_their_paths_and_tests_are_left_out(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(package, b_py="2", a__z_py="1", a__tests__x_py="no", test__y_py="no", test_py="3", tests_py="4")
    (package / "notes.txt").write_text("no")
    expected = b"1\n2\n3\n4\n"
    monkeypatch.setattr(corpora, "PYCODE_SHA256", {"1.0": hashlib.sha256(expected).hexdigest()})
    corpus = corpora.load("pycode")
    assert corpus.training.tobytes() == expected
    assert corpus.evaluation.size == 0
    assert corpus.files == 4


def test_a_changed_source_is_refused_with_what_to_install(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(package, a_py="edited")
    monkeypatch.setattr(corpora, "PYCODE_SHA256", {"1.0": SHA256})
    with pytest.raises(CorpusError) as caught:
        corpora.load("pycode")
    found = hashlib.sha256(b"edited\n").hexdigest()[:12]
    assert str(caught.value) == (
        f"corpus pycode: the source of sympy 1.0 has sha256 {found}…, expected 5459d1a3880c…; "
        "mend: pip install --force-reinstall sympy==1.0"
    )


def test_another_version_is_refused_with_the_known_one(package: Path) -> None:
    write(package, a_py="new")
    with pytest.raises(CorpusError) as caught:
        corpora.load("pycode")
    assert str(caught.value) == (
        "corpus pycode: the source of sympy 1.0 is not known by checksum; "
        "mend: pip install --force-reinstall sympy==1.14.0"
    )


@pytest.mark.usefixtures("unread")
def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError) as caught:
        Text(length=64)
    assert str(caught.value) == (
        "corpus pycode: the package sympy is not installed; pip install sympy==1.14.0"
    )
