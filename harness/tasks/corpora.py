"""Real bytes that are already on the machine, known by checksum; nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt


class CorpusError(ValueError):
    """A corpus is missing or is not the known one; the message says what to do."""


@dataclass(frozen=True)
class Corpus:
    """A stream of bytes in two parts that share no file.

    Args:
        name: name with its version.
        training: bytes to train on.
        evaluation: bytes of held-out files.
        files: number of files.
        sha256: checksum of the whole stream in its original order.
    """

    name: str
    training: npt.NDArray[np.uint8]
    evaluation: npt.NDArray[np.uint8]
    files: int
    sha256: str


#: sha256 of the stream `pycode`, by the version of sympy that it is made of.
PYCODE_SHA256 = {"1.14.0": "5459d1a3880c29c26a38fff02d4c513e5f03a66d64b231c7e7e1cd0547efa7b7"}
#: Every so many files one is held out.
HELD_OUT_EVERY = 20


def load(name: str) -> Corpus:
    """A corpus by name.

    Raises:
        CorpusError: an unknown name, or a corpus that is missing or changed.
    """
    if name != "pycode":
        raise CorpusError(f"task.corpus={name!r}: use pycode")
    return _pycode()


@cache
def _pycode() -> Corpus:
    """The Python source of sympy, which torch requires: every .py file outside test folders, by path."""
    root = _package_folder("sympy")
    version = importlib.metadata.version("sympy")
    paths = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not {"test", "tests"} & set(path.relative_to(root).parts[:-1])
    )
    contents = [path.read_bytes() + b"\n" for _, path in paths]
    sha256 = hashlib.sha256(b"".join(contents)).hexdigest()
    expected = PYCODE_SHA256.get(version)
    if sha256 != expected:
        known = " or ".join(f"sympy=={known}" for known in PYCODE_SHA256)
        fault = (
            f"has sha256 {sha256[:12]}…, expected {expected[:12]}…"
            if expected
            else "is not known by checksum"
        )
        raise CorpusError(
            f"corpus pycode: the source of sympy {version} {fault}; "
            f"mend: pip install --force-reinstall {known}"
        )
    held_out = [index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for index in range(len(contents))]
    return Corpus(
        name=f"pycode (sympy {version})",
        training=_join([text for text, out in zip(contents, held_out, strict=True) if not out]),
        evaluation=_join([text for text, out in zip(contents, held_out, strict=True) if out]),
        files=len(contents),
        sha256=sha256,
    )


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise CorpusError(f"corpus pycode: the package {name} is not installed; pip install {name}==1.14.0")
    return Path(found.submodule_search_locations[0])


def _join(texts: list[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(texts), dtype=np.uint8)
