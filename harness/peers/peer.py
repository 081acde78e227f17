"""What a peer is: its package, the settings that it can take, and how its layer is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import metadata
from typing import TYPE_CHECKING

from torch import nn

from harness.factors import level_text
from reformer.hashing import CrossPolytope

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: What every published Reformer computes, by the keys of a spec; the first value is the one to type.
PUBLISHED: Mapping[str, tuple[object, ...]] = {
    "attention.causality": ("published",),
    "attention.duplicates": ("sum",),
    "attention.seams": ("reference",),
    "attention.backend": ("auto",),
    "model.positions": ("learned", "axial", "sinusoidal"),
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A published LSH attention layer with its projections.

    Args:
        name: of the implementation and of the package that it is imported from.
        only: settings that it does not take any value of, with those that it takes.
        chunks: a sequence is a multiple of so many chunks, and longer than one.
        build: makes the layer, [batch, seq, d_model] → the same, of a spec that `check` lets pass.
    """

    name: str
    only: Mapping[str, tuple[object, ...]]
    chunks: int
    build: Callable[[TrialSpec], nn.Module]

    def check(self, spec: TrialSpec) -> None:
        """Refuse a spec that is not what the peer computes.

        Raises:
            ValueError: names the key, the value, and what the peer takes; or the extra to install.
        """
        if importlib.util.find_spec(self.name) is None:
            raise ValueError(
                f"workload.implementation={self.name}: the package {self.name} is not installed; "
                "install the extra 'peers', in the checkout by pip install -e '.[peers]'"
            )
        kind = spec.reformer_config().kind(0)
        if kind != "lsh":
            raise ValueError(f"attention={kind}: {self.name} is an LSH layer; use attention=lsh")
        for key, values in self.only.items():
            found = reduce(getattr, key.split("."), spec)
            if found not in values:
                raise ValueError(
                    f"{key}={level_text(found)}: {self.name} computes {level_text(values[0])}; "
                    f"use {key}={level_text(values[0])}"
                )
        if spec.hashing != CrossPolytope():
            raise ValueError(
                f"hashing={spec.hashing}: {self.name} hashes by random rotations; use hashing=cross_polytope"
            )
        self._check_length(spec)

    def _check_length(self, spec: TrialSpec) -> None:
        length, multiple = spec.task.length, self.chunks * spec.attention.chunk_length
        if length % multiple or length <= spec.attention.chunk_length:
            longer = max(2 * spec.attention.chunk_length, -(-length // multiple) * multiple)
            raise ValueError(
                f"task.length={length}: {self.name} hashes multiples of {multiple} tokens, more than a chunk "
                f"of {spec.attention.chunk_length}; use task.length={longer}"
            )

    @property
    def version(self) -> str:
        """Of the package that is installed."""
        return metadata.version(self.name)
