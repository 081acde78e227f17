"""Running a branch of a block a second time under the conditions of the first."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from reformer.autocasting import Autocast
from reformer.randomness import RandomState


@dataclass(frozen=True)
class Replay:
    """What a branch needs to give the same values again, taken just before its first run."""

    random: RandomState | None
    training: tuple[tuple[nn.Module, bool], ...]
    autocast: Autocast

    @staticmethod
    def capture(device: torch.device, *, block: nn.Module) -> "Replay":
        """Read modes, random streams and autocast; nothing changes."""
        training = tuple((module, module.training) for module in block.modules()) if block.has_dropout else ()
        return Replay(
            RandomState.capture(device) if any(mode for _, mode in training) else None,
            training,
            Autocast.here(device),
        )

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Gradients on, the same modules in training, the same random numbers, the same autocast."""
        random = self.random.replayed() if self.random is not None else nullcontext()
        with torch.enable_grad(), _in_modes(self.training), random, self.autocast.entered():
            yield


@contextmanager
def _in_modes(training: tuple[tuple[nn.Module, bool], ...]) -> Iterator[None]:
    """Modules in training or not as given, whatever `train()` and `eval()` made of them since."""
    now = [(module, module.training) for module, _ in training]
    try:
        for module, mode in training:
            module.training = mode
        yield
    finally:
        for module, mode in now:
            module.training = mode
