"""Which pairs of each chunk's window are hidden: the masks of LSH attention, chunk by chunk."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from reformer.attention import chunking, masking
from reformer.attention.options import LSHOptions
from reformer.attention.sorting import SortOrder

#: Integers up to here are compared in 32 bits, at half the memory traffic; their differences fit there too.
_LARGEST_NARROW = 2**30 - 1


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Rounds one after the other on the chunk axis, and the chunks that each one sees.

    Args:
        order: the sorted order of every round.
        chunk_length: tokens a chunk.
        offsets: chunks in a window, relative to its own.
    """

    order: SortOrder
    chunk_length: int
    offsets: tuple[int, ...]

    @property
    def rounds(self) -> int:
        return self.order.positions.shape[2]

    @property
    def chunks(self) -> int:
        """Chunks a round."""
        return self.order.positions.shape[3] // self.chunk_length

    def queries(
        self, x: Shaped[Tensor, "batch heads all_slots"]
    ) -> Shaped[Tensor, "batch heads all_chunks chunk 1"]:
        """A value a slot, as rows of pairs."""
        rows: Tensor = x.unflatten(2, (-1, self.chunk_length)).unsqueeze(-1)
        return rows

    def keys(
        self, x: Shaped[Tensor, "batch heads all_slots"]
    ) -> Shaped[Tensor, "batch heads all_chunks 1 window"]:
        """A value a slot, as columns of pairs."""
        return chunking.look_around(self.queries(x), offsets=self.offsets).transpose(-1, -2)

    def by_slot(self, x: Shaped[Tensor, "batch heads seq"]) -> Shaped[Tensor, "batch heads all_slots"]:
        """A value a position, in the order of the slots of all rounds."""
        return x.gather(-1, self.order.positions.flatten(2, 3))

    def query_rounds(self) -> Int[Tensor, "all_chunks 1"]:
        """Round of each chunk."""
        device = self.order.positions.device
        return torch.arange(self.rounds * self.chunks, device=device)[:, None] // self.chunks

    def key_rounds(self) -> Int[Tensor, "all_chunks n_offsets"]:
        """Round of the chunks in each window, before wrapping around at both ends."""
        index = chunking.window_chunks(
            self.rounds * self.chunks, offsets=self.offsets, device=self.order.positions.device
        )
        return index.div(self.chunks, rounding_mode="floor")

    def per_key(self, x: Shaped[Tensor, "all_chunks n_offsets"]) -> Shaped[Tensor, "all_chunks 1 window"]:
        """A value a chunk of each window, as columns of pairs."""
        return x.repeat_interleave(self.chunk_length, dim=1)[:, None, :]


def window_masks(
    windows: Windows,
    *,
    buckets: Int[Tensor, "batch heads rounds padded"],
    real: Bool[Tensor, "batch padded"],
    options: LSHOptions,
) -> tuple[
    Bool[Tensor, "batch heads all_chunks chunk window"], Bool[Tensor, "batch heads all_chunks chunk window"]
]:
    """Pairs of each window that are hidden, and those of a token with itself.

    With `duplicates="count"` the first view that shows a pair keeps it: the same softmax as subtracting
    log N, and one dropout decision a pair.
    """
    seen = masking.visibility(windows.order, buckets, options=options, n_chunks=windows.chunks)
    if options.strict:
        hidden, own = _strict_masks(
            windows, seen=seen, bucket_span=int(buckets.max() - buckets.min()), options=options
        )
    else:
        hidden, own = _chunk_masks(windows, seen=seen, real=real, options=options)
    if options.duplicates == "count":
        if seen.modulus is None:
            _hide_seen_before(hidden, windows=windows, seen=seen)
        else:
            _hide_seen_in_earlier_view(hidden, windows=windows, seen=seen)
    return hidden, own


def _strict_masks(
    windows: Windows, *, seen: masking.Visibility, bucket_span: int, options: LSHOptions
) -> tuple[
    Bool[Tensor, "batch heads all_chunks chunk window"], Bool[Tensor, "batch heads all_chunks chunk window"]
]:
    """One subtraction decides all: the same bucket and a later slot imply a later position, padding has a
    bucket of its own, and codes of different rounds are kept too far apart to meet."""
    # More than the widest difference of two codes of a round, plus the band.
    apart = windows.order.positions.shape[3] + (bucket_span + 1) * (options.band + 1)
    rounds = torch.arange(windows.rounds, device=seen.codes.device)[:, None]
    codes = seen.codes.gather(-1, windows.order.positions) + rounds * apart
    codes = _narrow(codes).flatten(2, 3)
    difference = windows.queries(codes) - windows.keys(codes)
    return (difference < seen.low).logical_or_(difference > seen.high), difference == 0


def _chunk_masks(
    windows: Windows,
    *,
    seen: masking.Visibility,
    real: Bool[Tensor, "batch padded"],
    options: LSHOptions,
) -> tuple[
    Bool[Tensor, "batch heads all_chunks chunk window"], Bool[Tensor, "batch heads all_chunks chunk window"]
]:
    positions = _narrow(windows.order.positions.flatten(2, 3))
    query, key = windows.queries(positions), windows.keys(positions)
    own = query == key
    hidden = ~windows.keys(windows.by_slot(real[:, None].expand(-1, positions.shape[1], -1))).expand_as(own)
    if options.causal:
        hidden = hidden | (key > query)
    if seen.modulus is None:
        hidden = hidden | windows.per_key(windows.key_rounds() != windows.query_rounds())
    if seen.modulus is None or seen.groups > 1:
        codes = seen.codes.gather(-1, windows.order.positions).flatten(2, 3)
        hidden = hidden | ~seen.sees(windows.queries(codes), windows.keys(codes))
    return hidden, own


def _hide_seen_before(
    hidden: Bool[Tensor, "batch heads all_chunks chunk window"],
    *,
    windows: Windows,
    seen: masking.Visibility,
) -> None:
    """Hide, in every round, what an earlier one shows, where rounds are kept apart."""
    codes = _narrow(seen.codes)
    for index in range(windows.rounds - 1):
        here = windows.by_slot(codes[:, :, index])
        later = (index + 1) * windows.chunks
        query, key = windows.queries(here)[:, :, later:], windows.keys(here)[:, :, later:]
        hidden[:, :, later:].logical_or_(seen.sees(query, key))


def _hide_seen_in_earlier_view(
    hidden: Bool[Tensor, "batch heads all_chunks chunk window"],
    *,
    windows: Windows,
    seen: masking.Visibility,
) -> None:
    """Hide, in every window, what an earlier view shows, where the seams let rounds see each other."""
    table = torch.zeros(windows.rounds, windows.rounds, dtype=torch.int64)
    for rank, (query_round, key_round) in enumerate(seen.views):
        table[query_round, key_round] = rank
    table = table.to(hidden.device)
    ranks = windows.per_key(table[windows.query_rounds(), windows.key_rounds() % windows.rounds])
    for rank, (query_round, key_round) in enumerate(seen.views[:-1]):
        query = windows.queries(windows.by_slot(seen.codes[:, :, query_round]))
        key = windows.keys(windows.by_slot(seen.codes[:, :, key_round]))
        hidden.logical_or_(seen.sees(query, key) & (ranks > rank))


def _narrow(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The same integers, in 32 bits if that is wide enough."""
    return x.int() if int(x.abs().max()) <= _LARGEST_NARROW else x
