"""Random streams that never touch the global one, and replaying the global one for a recompute."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def generator(*keys: int, device: torch.device = torch.device("cpu")) -> torch.Generator:
    """A generator for a tuple of keys; different tuples give unrelated streams."""
    state = 0x243F6A8885A308D3
    for key in keys:
        state = _mix((state + 0x9E3779B97F4A7C15 + (key & _WORD)) & _WORD)
    return torch.Generator(device).manual_seed(state & (2**63 - 1))


def dropout(x: Float[Tensor, "*shape"], p: float, *, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Zero a share of the entries and scale up the others, drawn from a generator on the entries' device."""
    kept = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return x * kept / (1 - p)


@dataclass(frozen=True)
class RandomState:
    """The global random streams at one moment: the CPU's, and the device's if it is another."""

    cpu: Tensor
    device: torch.device
    cuda: Tensor | None

    @staticmethod
    def capture(device: torch.device) -> "RandomState":
        """Read the streams; they go on unchanged."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), device, cuda)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers again inside the block; afterwards the streams are where they were."""
        devices = [self.device] if self.cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


_WORD = 2**64 - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)
