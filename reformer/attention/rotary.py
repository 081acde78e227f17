"""Positions as angles: vectors that are turned by where they stand, so that logits know distances alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Wavelengths are spread geometrically from 2π to this many times 2π tokens.
BASE = 10_000.0


def angles(positions: Int[Tensor, "*outer seq"], *, dim: int) -> Float[Tensor, "*outer seq pairs"]:
    """Angle of each position at ⌈dim / 2⌉ wavelengths: position·BASE^(−2i/dim).

    In float64: in float32 the angles of a millionth token are off by several hundredths.

    Source: Vaswani et al. 2017, §3.5.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    return positions.double().unsqueeze(-1) * BASE**-exponent


def rotate(
    x: Float[Tensor, "batch heads seq dim"], *, positions: Int[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch heads seq dim"]:
    """Turn each vector by the angles of its position, coordinate i together with i + dim / 2.

    The product of two rotated vectors depends on their positions' difference alone, and lengths stay as they
    were, so keys at unit length are the same before and after.

    Args:
        x: queries or keys, of even width.
        positions: where they stand in their row; None counts from 0.

    Source: Su et al. 2021, "RoFormer", §3.2; its neighbouring coordinates are here halves apart.
    """
    if positions is None:
        positions = torch.arange(x.shape[2], device=x.device)[None]
    angle = angles(positions, dim=x.shape[3])[:, None]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
