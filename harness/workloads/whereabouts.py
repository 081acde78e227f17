"""Where in a long step a model is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass

from harness.probes import Probe
from harness.record import Sample
from reformer.trunk import Trunk

#: Seconds between two progress lines.
EVERY_S = 1.0


@dataclass
class Whereabouts:
    """A probe that tells the phase and the layer, now and then, and leaves the watching to another one.

    Args:
        probe: the other one.
        model: whose layers are told; a model that is not ours has none to tell.
        step: what the line begins with.
        tell: told in a line.
    """

    probe: Probe
    model: object
    _: KW_ONLY
    step: str
    tell: Callable[[str], None]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As that of the other probe."""
        with self.probe.phase(name), self._telling(name) if isinstance(self.model, Trunk) else nullcontext():
            yield

    def samples(self) -> tuple[Sample, ...]:
        """Those of the other probe."""
        return self.probe.samples()

    @contextmanager
    def _telling(self, phase: str) -> Iterator[None]:
        assert isinstance(self.model, Trunk)
        blocks, told = list(self.model.blocks), time.monotonic()

        def reached(layer: int) -> None:
            nonlocal told
            if time.monotonic() - told > EVERY_S:
                told = time.monotonic()
                self.tell(f"{self.step}, {phase}, layer {layer} of {len(blocks)}")

        # Backward calls these modules too where it computes a branch again.
        hooks = [
            part.register_forward_pre_hook(lambda *_, layer=layer: reached(layer))
            for layer, block in enumerate(blocks, start=1)
            for part in block.children()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
