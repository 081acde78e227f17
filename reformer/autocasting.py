"""The autocast of one moment, entered again at another."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Autocast:
    """Whether operators on a device cast to a narrower type, and to which."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def here(device: torch.device) -> Autocast:
        """As it is where this is called."""
        kind = device.type
        return Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def entered(self, *, cache: bool = True) -> AbstractContextManager[object]:
        """As it was, inside; `cache`: weights that are cast stay so until the outermost autocast ends."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=cache)
