"""Plain data ↔ `TrialSpec`: typed decoding with errors a user can act on."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import os
import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from harness.environment import available_cpus
from harness.spec import TrialSpec
from harness.workloads.workload import OMITTED

#: Keys of the composed config that are outside the spec, because they change no number.
OUTSIDE_SPEC = (
    "cell",
    "experiment",
    "hydra",
    "memory_limit_gib",
    "rerun",
    "results_dir",
    "retries",
    "study",
    "timeout_s",
    "timing",
)
TARGET = "_target_"
#: Tables keep integers in 64 bits.
_LARGEST = 2**63 - 1
#: Nothing else is ever imported from a config, unless the environment variable below names its prefix.
ALLOWED_PREFIXES = ("reformer.", "harness.")
ALLOW_VARIABLE = "HARNESS_ALLOW_TARGETS"


class SpecError(ValueError):
    """A config cannot be decoded; the message names the key, the value, the rule and the mend."""


def decode(data: Mapping[str, Any]) -> TrialSpec:
    """Build the spec of a trial from plain data.

    Args:
        data: a composed config without the keys in `OUTSIDE_SPEC`, or an encoded spec. `threads: null` is
            every CPU that this process may use.

    Raises:
        SpecError: names the key, the value, the rule and the mend.
    """
    plain = dict(data)
    if plain.get("threads", 0) is None:
        plain["threads"] = available_cpus()
    spec = _decode(plain, TrialSpec, "")
    assert isinstance(spec, TrialSpec)
    return spec


def encode(spec: Any) -> Any:
    """Plain JSON data that `decode` turns back into an equal spec."""
    if is_dataclass(spec) and not isinstance(spec, type):
        plain = {
            field.name: encode(value)
            for field in fields(spec)
            if (value := getattr(spec, field.name)) != field.default or not field.metadata.get(OMITTED)
        }
        if _has_variants(type(spec)):
            return {TARGET: f"{type(spec).__module__}.{type(spec).__qualname__}", **plain}
        return plain
    if isinstance(spec, (list, tuple)):
        return [encode(entry) for entry in spec]
    return spec


def _decode(value: Any, kind: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(value, typing.get_args(kind), path)
    if origin is tuple:
        return _decode_tuple(value, typing.get_args(kind), path)
    if is_dataclass(kind):
        return _decode_dataclass(value, typing.cast(type, kind), path)
    return _decode_scalar(value, kind, path)


def _decode_union(value: Any, kinds: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _decode(value, kind, path)
        except SpecError as error:
            errors.append(error)
    allowed = " or ".join("null" if kind is type(None) else _word(kind) for kind in kinds)
    raise SpecError(f"{path}={_shown(value)}: must be {allowed}") from errors[0]


def _decode_tuple(value: Any, kinds: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        # One value stands for a list of one: model.layers=local.
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_decode(entry, kinds[0], path) for entry in entries)
    if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
        raise SpecError(f"{path}={_shown(value)}: must be a list of {len(kinds)}")
    return tuple(_decode(entry, kind, path) for entry, kind in zip(value, kinds, strict=True))


def _decode_scalar(value: Any, kind: Any, path: str) -> Any:
    if type(value) is int and abs(value) > _LARGEST:
        raise SpecError(f"{path}={_shown(value)}: no integer of 64 bits; use at most {_LARGEST}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise SpecError(f"{path}={_shown(value)}: must be {_word(kind)}")
    return value


def _decode_dataclass(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise SpecError(f"{path}={_shown(value)}: must be a group of settings, not a single value")
    given = {str(key): entry for key, entry in value.items()}
    base = kind
    if _has_variants(kind):
        kind = _target(given.pop(TARGET, None), kind, path)
    known = {field.name: field for field in fields(kind)}
    for name in given:
        if name not in known:
            hint = _elsewhere(name, base, path) or _suggestion(name, list(known), path)
            raise SpecError(f"{_join(path, name)}: no such key{hint}")
    missing = [
        name
        for name, field in known.items()
        if name not in given and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise SpecError(f"{_join(path, missing[0])}: missing; give it a value")
    hints = typing.get_type_hints(kind)
    arguments = {name: _decode(entry, hints[name], _join(path, name)) for name, entry in given.items()}
    try:
        return kind(**arguments)
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(str(error)) from error


def _target(name: Any, base: type, path: str) -> type:
    """The class that a `_target_` names."""
    if not isinstance(name, str):
        raise SpecError(f"{_join(path, TARGET)}={_shown(name)}: must be the import path of a {base.__name__}")
    extra = tuple(prefix for prefix in os.environ.get(ALLOW_VARIABLE, "").split(",") if prefix)
    if not name.startswith((*ALLOWED_PREFIXES, *extra)):
        raise SpecError(
            f"{_join(path, TARGET)}={name!r}: only {' and '.join(ALLOWED_PREFIXES)} are imported; "
            f"allow others with the environment variable {ALLOW_VARIABLE}"
        )
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{_join(path, TARGET)}={name!r}: cannot be imported ({error})") from error
    if not (inspect.isclass(found) and issubclass(found, base) and is_dataclass(found)) or inspect.isabstract(
        found
    ):
        raise SpecError(f"{_join(path, TARGET)}={name!r}: is no {base.__name__}")
    return found


def _has_variants(kind: type) -> bool:
    """Whether a field of this type names its class: abstract interfaces and what implements them."""
    return any(inspect.isabstract(base) for base in kind.__mro__)


def _suggestion(name: str, known: list[str], path: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {_join(path, near[0])}?"
    return f"; known here: {', '.join(sorted(known)) or 'nothing'}"


def _elsewhere(name: str, base: Any, path: str) -> str:
    """Which other variants have that key; each is called as its module is, beside that of their base."""
    if not _has_variants(base):
        return ""
    package = importlib.import_module(base.__module__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    owners = [kind for kind in base.__subclasses__() if name in {field.name for field in fields(kind)}]
    words = sorted(kind.__module__.rpartition(".")[2] for kind in owners)
    return f"; it is one of {path}={' or '.join(words)}" if words else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {' and '.join(_word(entry) for entry in typing.get_args(kind))}"
    return {int: "an integer", float: "a number", str: "a word", bool: "true or false"}.get(kind, str(kind))
