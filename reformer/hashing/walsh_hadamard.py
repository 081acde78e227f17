"""The fast Walsh–Hadamard transform."""

import torch
from jaxtyping import Float
from torch import Tensor


def walsh_hadamard(x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
    """x·H with H[i, j] = (−1)^popcount(i & j), in O(size·log size) additions; size is a power of two.

    The rows of ±H are the words of the first-order Reed–Muller code of length `size` (0 as +1, 1 as −1), so
    the result is the correlation of x with each of them.
    """
    step = 1
    while step < x.shape[-1]:
        first, second = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return x
