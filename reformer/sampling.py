"""Choosing the next token from its logits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.attention.options import at_least
from reformer.randomness import generator


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the most likely one, or one drawn from the most likely ones.

    Args:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens; None is all.
        top_p: then, from the fewest of the most likely ones that have this share of the chance; None is all.
        seed: of the random numbers. Each row of a batch has a stream of its own, of (seed, row), so what it
            draws does not depend on the other rows, nor on how many tokens are asked for.

    Raises:
        ValueError: names the value, the rule and the mend.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature}: logits are divided by it; use 0 for the most likely token, "
                "or more"
            )
        if self.top_k is not None:
            at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p}: a share of the chance; give 0 < top_p ≤ 1, or None for all"
            )

    def uniforms(self, *, rows: int, tokens: int) -> Float[Tensor, "rows tokens"]:
        """One number from [0, 1) for every token that is to be drawn."""
        if self.temperature == 0 or rows == 0:
            return torch.zeros(rows, tokens, dtype=torch.float64)
        return torch.stack(
            [
                torch.rand(tokens, dtype=torch.float64, generator=generator(self.seed, row))
                for row in range(rows)
            ]
        )

    def choose(
        self, logits: Float[Tensor, "batch vocab"], *, uniform: Float[Tensor, " batch"]
    ) -> Int[Tensor, " batch"]:
        """A token id a row, where the cumulative chance of the ids first exceeds its `uniform`."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # Less the largest, so that no division overflows.
        wide = logits.double()
        chances = ((wide - wide.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_k is not None:
            chances = most_likely(chances, count=self.top_k)
        if self.top_p is not None:
            chances = nucleus(chances, share=self.top_p)
        cumulative = chances.cumsum(dim=-1)
        # Divided by its end, the last value is 1 exactly, and so beyond every uniform number.
        return (cumulative / cumulative[:, -1:] <= uniform[:, None]).sum(dim=-1)


def most_likely(chances: Float[Tensor, "batch vocab"], *, count: int) -> Float[Tensor, "batch vocab"]:
    """0 for all but the `count` largest chances and those that tie with the last of them."""
    least = chances.topk(min(count, chances.shape[-1]), dim=-1).values[:, -1:]
    return chances.masked_fill(chances < least, 0.0)


def nucleus(chances: Float[Tensor, "batch vocab"], *, share: float) -> Float[Tensor, "batch vocab"]:
    """0 for all but the fewest largest chances that sum to `share` of the total, and ties with the last one.

    Source: Holtzman, Buys, Du, Forbes, Choi 2020, "The curious case of neural text degeneration".
    """
    ordered = chances.sort(dim=-1, descending=True).values
    above = ordered.cumsum(dim=-1) - ordered
    needed = (above < share * ordered.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    least = ordered.gather(-1, (needed - 1).clamp(min=0))
    return chances.masked_fill(chances < least, 0.0)
