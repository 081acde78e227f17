"""How a branch is added to a residual stream, and taken off it again."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

#: Bits of a float32 behind the leading one: so many binary places of a number below 2 are exact.
_FRACTION_BITS = 23


class Lifting(ABC):
    """What a residual stream does with a branch. One object serves one forward pass."""

    @abstractmethod
    def start(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """A stream that begins as `x`."""

    @abstractmethod
    def add(
        self, x: Float[Tensor, "batch seq d_model"], branch: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """The stream with a branch on it."""

    @abstractmethod
    def subtract(
        self, y: Float[Tensor, "batch seq d_model"], branch: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """The stream before the branch was added; the memory of `branch` may be used for it."""

    @abstractmethod
    def check(self) -> None:
        """Refuse, after the last block, streams that cannot be taken back."""


class FloatLifting(Lifting):
    """Addition in floating point: taking a branch off again gives the stream back up to rounding."""

    def start(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return x

    def add(
        self, x: Float[Tensor, "batch seq d_model"], branch: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        return x + branch

    def subtract(
        self, y: Float[Tensor, "batch seq d_model"], branch: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        return torch.sub(y, branch, out=branch) if branch.dtype == y.dtype else y - branch

    def check(self) -> None:
        """Nothing is promised, so nothing is refused."""


class IntegerLifting(Lifting):
    """Addition of multiples of 2^-bits, which is exact in float32: taking a branch off undoes it to the bit.

    Branches and the start are rounded to the grid, straight through for gradients; streams are float32, also
    where autocast makes branches narrower, or float64.

    Source: integer lifting of lossless wavelets, Calderbank, Daubechies, Sweldens, Yeo 1998.
    """

    def __init__(self, *, bits: int) -> None:
        self.bits = bits
        self._peak: Tensor | None = None

    @property
    def limit(self) -> float:
        """Streams below it, and the sum or difference of two of them, are exact in float32."""
        return 2.0 ** (_FRACTION_BITS - self.bits)

    def start(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """`x`, rounded.

        Raises:
            ValueError: a type too narrow for exact sums.
        """
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"residual='reversible_exact' in {x.dtype}: sums are exact from float32 on; "
                "keep the parameters in float32 and use autocast"
            )
        return self._watched(self._round(x))

    def add(
        self, x: Float[Tensor, "batch seq d_model"], branch: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        return self._watched(x + self._round(branch))

    def subtract(
        self, y: Float[Tensor, "batch seq d_model"], branch: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        return y - self._round(branch)

    def check(self) -> None:
        """Refuse a pass whose streams left the exact range; the one place that waits for the device.

        Raises:
            OverflowError: names the largest value, the rule and the mend.
        """
        peak = float(self._peak) if self._peak is not None else 0.0
        self._peak = None
        # A NaN passes, as it does through the other residual kinds.
        if peak >= self.limit:
            raise OverflowError(
                f"residual='reversible_exact': a stream reached {peak:g}; with grid_bits={self.bits} sums "
                f"are exact below {self.limit:g}; lower grid_bits or use residual='reversible'"
            )

    def _round(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        wide = x if x.dtype == torch.float64 else x.float()
        rounded: Tensor = _RoundToGrid.apply(wide, 2.0**self.bits)  # type: ignore[no-untyped-call]
        return rounded

    def _watched(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """The stream itself; its largest magnitude is kept on the device until `check`."""
        if x.numel():
            low, high = x.detach().aminmax()
            peak = torch.maximum(-low, high)
            # The larger one, or the one that is not NaN.
            self._peak = peak if self._peak is None else torch.fmax(self._peak, peak)
        return x


def build_lifting(residual: str, *, grid_bits: int) -> Lifting:
    """The lifting of one forward pass of a residual kind."""
    return IntegerLifting(bits=grid_bits) if residual == "reversible_exact" else FloatLifting()


class _RoundToGrid(torch.autograd.Function):
    """The nearest multiple of 1/scale, ties to even; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        # A power of two: multiplying and dividing by it round nothing.
        return (x * scale).round_().div_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients, None)
