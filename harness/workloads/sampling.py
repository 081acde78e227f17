"""How many steps are timed: until their time is known well enough, or enough has been spent on it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.metrics.time import after_warm_up

#: Fewer tell nothing of their spread.
_LEAST = 5
#: The normal quantile of a two-sided 95 % interval.
_Z = 1.959964


@dataclass(kw_only=True)
class Sampling:
    """When to stop timing steps.

    Args:
        at_most: steps.
        budget_s: seconds after which no further step begins; one there is always. None is no limit.
        precision: half the width of the mean's 95 % interval, as a share of it, that is good enough; what
            warms up is left out. 0 never is.
        stopped_by: what ended it: `steps`, `budget` or `precision`.
    """

    at_most: int
    budget_s: float | None = None
    precision: float = 0.0
    stopped_by: str = "steps"

    def __post_init__(self) -> None:
        if self.at_most < 1:
            raise ValueError(f"workload.timed_steps={self.at_most}: must be at least 1")
        if self.budget_s is not None and self.budget_s < 0:
            raise ValueError(f"workload.budget_s={self.budget_s}: must not be negative")
        if not 0 <= self.precision < 1:
            raise ValueError(
                f"workload.precision={self.precision}: give a share, such as 0.02, or 0 for none"
            )

    def steps(self, times: Callable[[], Sequence[float]]) -> Iterator[int]:
        """Numbers of steps.

        Args:
            times: seconds of the steps so far; asked for only where a precision is wanted.
        """
        started = time.perf_counter()
        for step in range(self.at_most):
            if step and self.budget_s is not None and time.perf_counter() - started > self.budget_s:
                self.stopped_by = "budget"
                return
            if self.precision and step >= _LEAST and relative_half_width(times()) <= self.precision:
                self.stopped_by = "precision"
                return
            yield step


def relative_half_width(times: Sequence[float]) -> float:
    """Half the width of the interval of the mean step, as a share of it; infinite for too few steps."""
    kept = after_warm_up(times)
    if len(kept) < _LEAST:
        return math.inf
    mean = statistics.fmean(kept)
    error = statistics.stdev(kept) / math.sqrt(len(kept))
    return _t(len(kept) - 1) * error / mean if mean > 0 else math.inf


def _t(degrees: int) -> float:
    """Student's quantile that belongs to `_Z`, by Cornish and Fisher: within 1 % from 4 degrees on."""
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / degrees + second / degrees**2 + third / degrees**3
