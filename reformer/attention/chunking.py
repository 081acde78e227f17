"""Cutting a sequence into chunks and letting each see its neighbours."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from torch import Tensor


def n_chunks(seq: int, *, chunk_length: int) -> int:
    """Chunks needed for `seq` tokens; the last may be filled with padding."""
    return -(-seq // chunk_length)


def pad_to_chunks(
    x: Shaped[Tensor, "*outer seq dim"], *, chunk_length: int
) -> Shaped[Tensor, "*outer padded dim"]:
    """Append zero rows until the sequence is a whole number of chunks."""
    missing = n_chunks(x.shape[-2], chunk_length=chunk_length) * chunk_length - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def split_chunks(
    x: Shaped[Tensor, "*outer seq dim"], *, chunk_length: int
) -> Shaped[Tensor, "*outer chunks chunk dim"]:
    """Cut a whole number of chunks."""
    chunks: Tensor = x.unflatten(-2, (-1, chunk_length))
    return chunks


def merge_chunks(x: Shaped[Tensor, "*outer chunks chunk dim"]) -> Shaped[Tensor, "*outer seq dim"]:
    """Undo `split_chunks`."""
    return x.flatten(-3, -2)


def look_around(
    x: Shaped[Tensor, "*outer chunks chunk dim"], *, offsets: Sequence[int]
) -> Shaped[Tensor, "*outer chunks window dim"]:
    """Rows that a chunk sees: those of the chunks at `offsets` from it, wrapping around at both ends."""
    return torch.cat([x if offset == 0 else x.roll(-offset, dims=-3) for offset in offsets], dim=-2)


def window_chunks(
    chunks: int, *, offsets: Sequence[int], device: torch.device
) -> Int[Tensor, "chunks n_offsets"]:
    """Index of each chunk that `look_around` shows, before wrapping: outside `[0, chunks)` it is a wrap."""
    return torch.arange(chunks, device=device)[:, None] + torch.tensor(list(offsets), device=device)
