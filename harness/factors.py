"""Settings of a trial as flat columns: the dotted keys that users type, and how their levels sort."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Level = int | float | str | bool | None
_LEVELS = (str, int, float, bool, type(None))
#: Keys whose levels replicate a setting rather than change it.
REPLICATES = ("seed", "repeat")


def flatten(spec: Mapping[str, Any], *, prefix: str = "") -> dict[str, Level]:
    """A spec by dotted keys.

    A polymorphic part is named by its class (`task`: `copy`) next to its fields (`task.length`), and the
    attention by its kind.
    """
    flat: dict[str, Level] = {}
    for key, value in spec.items():
        path = f"{prefix}{key}"
        if type(value) in _LEVELS:
            flat[path] = value
            continue
        if not isinstance(value, Mapping):
            flat[path] = _plain(value)
            continue
        fields = dict(value)
        if "_target_" in fields:
            flat[path] = snake_case(str(fields.pop("_target_")).rsplit(".", 1)[-1])
        if path == "attention" and "kind" in fields:
            flat[path] = _plain(fields.pop("kind"))
        flat |= flatten(fields, prefix=f"{path}.")
    return flat


@functools.lru_cache(maxsize=256)
def snake_case(name: str) -> str:
    """`CrossPolytope` → `cross_polytope`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def level_text(level: object) -> str:
    """A level as one types it."""
    if level is None or level != level:
        return "null"
    if isinstance(level, bool):
        return str(level).lower()
    if isinstance(level, float) and level.is_integer() and abs(level) < 1e15:
        return str(int(level))
    return str(level)


def sort_levels(levels: Iterable[str], *, typed: Sequence[str] = ()) -> list[str]:
    """Levels in the order of tables and curves: numbers by value, then words as typed, then by name."""
    order = {text: index for index, text in reversed(list(enumerate(typed)))}

    def key(level: str) -> tuple[int, float, int, str]:
        number = as_number(level)
        if number is not None:
            return (0, number, 0, level)
        return (1, 0.0, order.get(level, len(order)), level)

    return sorted(set(levels), key=key)


def as_number(level: str) -> float | None:
    """The value of a level that is a number."""
    try:
        number = float(level)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _plain(value: object) -> Level:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(level_text(entry) for entry in value)}]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
