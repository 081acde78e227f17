"""The interface of a workload: what one trial does and measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from harness.devices import DTYPES
from harness.forecast import Forecast
from harness.record import Measurement

if TYPE_CHECKING:
    from harness.spec import TrialSpec


#: Marks a field that an encoded spec leaves out at its default: trials from before it keep their ids.
OMITTED = "omitted"


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """What a trial does with its model.

    To add one, write a frozen dataclass in a file of its own under `harness/workloads/` and a yaml of the
    same name under `conf/workload/` whose `_target_` is the class.
    """

    #: Whether times are among what it measures: such trials take turns on a machine.
    timed: ClassVar[bool] = True

    #: Whether there are trained weights in the end.
    trains: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        """Run the trial in this process.

        Args:
            spec: what to run.
            progress: told now and then, in a line, how far it is.
        """

    def keeping(self, spec: TrialSpec, *, progress: Callable[[str], None], weights: Path) -> Measurement:
        """The same; a workload that trains keeps the weights in that file besides."""
        return self(spec, progress=progress)

    def forecast(self, spec: TrialSpec) -> Forecast | None:
        """What such a trial will cost, if a formula tells."""
        return None

    def backend(self, spec: TrialSpec) -> str:
        """What computes the attention of such a trial (see `reformer.ReformerConfig.backend_on`).

        Raises:
            ValueError: the workload, or the backend that is asked for, cannot run that spec.
        """
        return spec.reformer_config().backend_on(torch.device(spec.device), dtype=DTYPES[spec.dtype])
