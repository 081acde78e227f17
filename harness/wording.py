"""One line for what a user got wrong: the value, the rule, and the mend."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Nothing is configured under this key."""
    names = list(known)
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in names if name == leaf or name.endswith(f".{leaf}")]
    meant = " or ".join(repr(name) for name in elsewhere or [nearest(key, names)] if name)
    hint = f"did you mean {meant}?" if meant else "'harness run --cfg job' prints every key"
    return f"unknown key {key!r}; {hint}"


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """The group has no such option."""
    near = nearest(option, options)
    hint = f"did you mean {near!r}? " if near else ""
    return f"{group}={option}: no such {group}; {hint}there are: {', '.join(options) or 'none'}"


def unknown_command(command: str, commands: Sequence[str]) -> str:
    """The harness has no such command."""
    near = nearest(command, commands)
    if near:
        return f"unknown command {command!r}; did you mean {near!r}?"
    if "=" in command:
        return f"unknown command {command!r}; settings come after a command: harness run {command}"
    return f"unknown command {command!r}; there are: {', '.join(commands)}"


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that was probably meant; empty if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else ""


def counted(n: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def complain(message: str) -> None:
    """Tell what is wrong, in one line on standard error."""
    print(f"harness: {one_line(message)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Text without line breaks, cut where nobody would read on."""
    line = " ".join(text.split())
    return line if len(line) <= 600 else f"{line[:597]}..."


def flat_keys(config: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """The dotted keys of a nested mapping, inner ones included."""
    keys = []
    for key, value in config.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys.extend(flat_keys(value, prefix=f"{prefix}{key}."))
    return keys
