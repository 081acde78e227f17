"""What a peer is: its package, the settings that it can take, and how its layer and its model are made."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import metadata
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from harness.factors import level_text
from reformer.hashing import CrossPolytope

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Settings by the keys of a spec, with the values that are taken; the first is the one to type.
Settings = Mapping[str, tuple[object, ...]]
#: What every published Reformer computes.
PUBLISHED: Settings = {
    "attention.causality": ("published",),
    "attention.duplicates": ("sum",),
    "attention.seams": ("reference",),
    "attention.backend": ("auto",),
    "model.positions": ("learned", "axial", "sinusoidal"),
}
#: What they are around it, as whole models.
PUBLISHED_MODEL: Settings = {
    "model.residual": ("reversible",),
    "model.positions": ("axial", "learned"),
    "model.norm": ("layer_norm",),
    "model.activation": ("gelu",),
    "model.tie_weights": (False,),
    "model.heads_at_once": (None,),
    "model.loss_chunk_length": (None,),
}


class PeerModel(nn.Module):
    """A language model from elsewhere, trained as ours is.

    Args:
        model: the model.
        logits: of the model and tokens [batch, seq], logits [batch, seq, vocab].
    """

    def __init__(self, model: nn.Module, *, logits: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._logits = logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over targets ≠ −100."""
        return F.cross_entropy(self._logits(self.model, tokens).flatten(0, 1).float(), targets.flatten())


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A published Reformer: its LSH attention layer with projections, and its language model.

    Args:
        name: of the implementation and of the package that it is imported from.
        only: settings of a layer that it does not take any value of, with those that it takes.
        only_model: those of a whole model besides.
        chunks: a sequence is a multiple of so many chunks, and longer than one.
        build: makes the layer, [batch, seq, d_model] → the same, of a spec that `check` lets pass.
        build_model: makes the language model of a spec that `check_model` lets pass.
        multiplies_width: whether its feed-forward layer is a multiple of the model's width.
        whole_blocks: whether a sequence is whole blocks of rows of the feed-forward layer.
    """

    name: str
    only: Settings
    only_model: Settings
    chunks: int
    build: Callable[[TrialSpec], nn.Module]
    build_model: Callable[[TrialSpec], PeerModel]
    multiplies_width: bool = False
    whole_blocks: bool = False

    def check(self, spec: TrialSpec) -> None:
        """Refuse a spec whose layer is not what the peer computes.

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
        self._check_settings(spec, self.only)
        if spec.hashing != CrossPolytope():
            raise ValueError(
                f"hashing={spec.hashing}: {self.name} hashes by random rotations; use hashing=cross_polytope"
            )
        self._check_length(spec)

    def check_model(self, spec: TrialSpec) -> None:
        """Refuse a spec whose model is not the peer's.

        Raises:
            ValueError: as `check`.
        """
        self.check(spec)
        self._check_settings(spec, self.only_model)
        config = spec.reformer_config()
        kinds = {config.kind(layer) for layer in range(config.n_layers)}
        if kinds != {"lsh"}:
            raise ValueError(
                f"model.layers={level_text(spec.model.layers)}: all layers of {self.name} are built as lsh "
                "here; use model.layers=[lsh]"
            )
        if self.multiplies_width and config.feed_forward_width % config.d_model:
            raise ValueError(
                f"model.d_ff={config.feed_forward_width}: {self.name} has a multiple of model.d_model; "
                f"use model.d_ff={4 * config.d_model}"
            )
        block = min(config.ff_chunk_length or spec.task.length, spec.task.length)
        if self.whole_blocks and spec.task.length % block:
            raise ValueError(
                f"model.ff_chunk_length={block}: {self.name} has whole blocks of rows; use a divisor of "
                f"task.length={spec.task.length}, or model.ff_chunk_length=null"
            )
        if config.max_length != spec.task.length:
            raise ValueError(
                f"model.max_length={config.max_length}: {self.name} trains at its full length; "
                "use model.max_length=null"
            )

    def _check_settings(self, spec: TrialSpec, only: Settings) -> None:
        for key, values in only.items():
            found = reduce(getattr, key.split("."), spec)
            if found not in values:
                raise ValueError(
                    f"{key}={level_text(found)}: {self.name} computes {level_text(values[0])}; "
                    f"use {key}={level_text(values[0])}"
                )

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


def near_square(length: int) -> tuple[int, int]:
    """The two factors of a length that are nearest to each other, the smaller one first."""
    rows = next(rows for rows in range(math.isqrt(length), 0, -1) if length % rows == 0)
    return rows, length // rows
