"""What a query may see, in order of severity: padding, the future, other buckets, itself.

A masked pair gets `MASKED`, a token's own key `SELF`: finite both, so that a row in which nothing is left
is still a softmax, and far enough apart in float32 that the order holds in every dtype, since scores are
masked in float32 or wider.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.attention.options import LSHOptions
from reformer.attention.sorting import SortOrder

MASKED = -1e30
SELF = -1e5


@dataclass(frozen=True)
class Visibility:
    """Which pairs a window shows, as one integer a token and round.

    A query in round r sees a key in the ordering of round r' iff their codes' difference is in a range; see
    `visibility`. With rounds kept apart r' = r. Where they touch (`seams="reference"`) the codes count
    chunks over all rounds, modulo their number.

    Args:
        codes: the integers, by position.
        low: smallest code difference, query minus key, that is visible.
        high: largest one.
        modulus: number of chunks over all rounds where the seams wrap around; else None.
        views: (query round, key round) whose pairs can meet in one window, in the order in which a pair is
            looked for.
        groups: where the seams wrap around and buckets are kept apart, the number of buckets of all rounds,
            and a code is chunk·groups + bucket; else 1.
    """

    codes: Int[Tensor, "batch heads rounds seq"]
    low: int
    high: int
    modulus: int | None
    views: tuple[tuple[int, int], ...]
    groups: int = 1

    def sees(self, query_codes: Int[Tensor, "*q"], key_codes: Int[Tensor, "*k"]) -> Bool[Tensor, "*qk"]:
        """Whether a window shows these pairs."""
        difference = query_codes - key_codes
        same = difference % self.groups == 0 if self.groups > 1 else None
        difference = difference // self.groups if self.groups > 1 else difference
        if self.modulus is not None:
            difference = (difference - self.low) % self.modulus + self.low
        seen = (difference >= self.low) & (difference <= self.high)
        return seen if same is None else seen & same


def visibility(
    order: SortOrder,
    buckets: Int[Tensor, "batch heads rounds seq"],
    *,
    options: LSHOptions,
    n_chunks: int,
) -> Visibility:
    """Codes such that one subtraction decides a pair.

    - published: the chunk index; visible from −`after` to `before` chunks.
    - same bucket: chunk + bucket·(before + after + 1): pairs of unequal buckets are out of range, since the
      order is sorted by bucket.
    - strict: slot + bucket·(band + 1), visible from 0 to band: the last `band` entries of the own bucket.
    """
    rounds = order.slots.shape[2]
    before, after = options.n_chunks_before, options.after
    if options.strict:
        codes = order.slots + buckets * (options.band + 1)
        return Visibility(codes, 0, options.band, None, _apart(rounds))
    chunks = order.slots // options.chunk_length
    if options.same_bucket and not options.wraps:
        return Visibility(chunks + buckets * (before + after + 1), -after, before, None, _apart(rounds))
    if not options.wraps:
        return Visibility(chunks, -after, before, None, _apart(rounds))
    every_round = torch.arange(rounds, device=chunks.device)[:, None] * n_chunks
    if options.same_bucket:
        # The bucket of another round is another bucket: the seams show something only within one round.
        count = int(buckets.max() - buckets.min()) + 1
        own = buckets + torch.arange(rounds, device=chunks.device)[:, None] * count
        codes = (chunks + every_round) * (rounds * count) + own
        return Visibility(codes, -after, before, rounds * n_chunks, _apart(rounds), rounds * count)
    reach = range(-(-before // n_chunks) * -1, -(-after // n_chunks) + 1)
    views = tuple(
        (query_round, key_round)
        for query_round in range(rounds)
        for key_round in sorted({(query_round + step) % rounds for step in reach})
    )
    return Visibility(chunks + every_round, -after, before, rounds * n_chunks, views)


def _apart(rounds: int) -> tuple[tuple[int, int], ...]:
    return tuple((index, index) for index in range(rounds))


def mask_scores(
    scores: Float[Tensor, "*outer query key"],
    *,
    hidden: Bool[Tensor, "*#outer #query key"],
    own: Bool[Tensor, "*#outer query key"],
) -> Float[Tensor, "*outer query key"]:
    """Penalise a token's own key, then hide what is hidden: a hidden own key is never raised again.

    `scores` is overwritten.
    """
    return scores.masked_fill_(own, SELF).masked_fill_(hidden, MASKED)
