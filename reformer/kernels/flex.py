"""LSH attention by FlexAttention: the chunks that a chunk sees are a band of blocks in sorted order.

A round at a time, on rows in its order: the band is the block mask, the same for every input of a shape, and
what it hides beyond that is told from positions and codes. Backward makes a round again and weighs its
gradients by the round's share of the whole: so nothing but the order of a round is kept of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from reformer.kernels.rounds import Kernel, Rounds, key_norms
from reformer.kernels.union import Pattern, beside, read_order

#: Slots a block: the smallest that all tiles of FlexAttention's kernels divide.
BLOCK = 128

#: Of batch, head, query and key, whether they see each other.
_MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def forward(
    qk: Float[Tensor, "batch heads seq dim"], v: Float[Tensor, "batch heads seq value"], rounds: Rounds
) -> tuple[Float[Tensor, "batch heads seq value"], Float[Tensor, "batch heads seq"]]:
    """The output, and the log-sum-exp of each row, −∞ where a token sees nothing but itself."""
    wide = torch.promote_types(qk.dtype, torch.float32)
    keys = _keys(qk, rounds)
    out = torch.zeros_like(beside(v, dtype=wide))
    logsumexp = torch.full(qk.shape[:3], -math.inf, dtype=wide, device=qk.device)
    for here in _each(rounds):
        part, sums = (here.unsort(x) for x in here.attend(here.sort(qk), here.sort(keys), here.sort(v)))
        total = torch.logaddexp(logsumexp, sums)
        # Where nothing was seen so far, both are −∞ and their difference is no number.
        share = torch.where(total == -math.inf, 0.0, (sums - total).exp())
        out.lerp_(part.to(wide), share.unsqueeze(-1))
        logsumexp = total
    out = torch.where(_alone(logsumexp), v.to(wide), out)
    if rounds.real is not None:
        out = out.masked_fill_(~rounds.real[:, None, :, None], 0)
    return out.to(v.dtype), logsumexp


def backward(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    rounds: Rounds,
    *,
    out: Float[Tensor, "batch heads seq value"],
    logsumexp: Float[Tensor, "batch heads seq"],
    dout: Float[Tensor, "batch heads seq value"],
) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq value"]]:
    """The gradients of qk and v."""
    wide = logsumexp.dtype
    keys = _keys(qk, rounds)
    alone = _alone(logsumexp)
    if rounds.real is not None:
        dout = dout.masked_fill(~rounds.real[:, None, :, None], 0)
    dqueries, dkeys = (torch.zeros_like(beside(qk, dtype=wide)) for _ in range(2))
    dv = torch.where(alone, dout.to(wide), 0.0)
    dout = dout.masked_fill(alone, 0)
    delta = (dout.to(wide) * out).sum(-1)
    for here in _each(rounds):
        leaves = [here.sort(x).requires_grad_() for x in (qk, keys, v)]
        with torch.enable_grad():
            part, sums = here.attend(*leaves)
        # The whole is Σ share·part, with share = exp(sums − logsumexp).
        total = here.sort(logsumexp)
        share = torch.where(total == -math.inf, 0.0, (sums.detach() - total).exp())
        dpart = here.sort(dout)
        dsums = share * ((dpart.to(wide) * part.detach()).sum(-1) - here.sort(delta))
        dpart = (dpart * share.unsqueeze(-1)).to(part.dtype)
        found = torch.autograd.grad((part, sums), leaves, (dpart, dsums.to(sums.dtype)))
        for gathered, gradient in zip((dqueries, dkeys, dv), found, strict=True):
            gathered += here.unsort(gradient)
    return _through_norms(qk, dqueries, dkeys, rounds).to(qk.dtype), dv.to(v.dtype)


KERNEL = Kernel(attend=forward, differentiate=backward)


@dataclass(frozen=True, kw_only=True)
class _Round:
    """A round in its order.

    Args:
        index: which one; on the device, where it is no reason to compile again.
        positions: position of each slot.
        slots: slot of each position.
        codes: of all rounds, by slot of this one.
        pattern: which keys a query meets.
    """

    index: Int[Tensor, ""]
    positions: Int[Tensor, "batch heads seq"]
    slots: Int[Tensor, "batch heads seq"]
    codes: Int[Tensor, "rounds batch heads seq"]
    pattern: Pattern

    def sort(self, x: Tensor) -> Tensor:
        """What each position has, by slot."""
        return _pick(x, self.positions)

    def unsort(self, x: Tensor) -> Tensor:
        """What each slot has, by position."""
        return _pick(x, self.slots)

    def attend(
        self,
        queries: Float[Tensor, "batch heads seq dim"],
        keys: Float[Tensor, "batch heads seq dim"],
        values: Float[Tensor, "batch heads seq value"],
    ) -> tuple[Float[Tensor, "batch heads seq value"], Float[Tensor, "batch heads seq"]]:
        """Attention by slot, and the log-sum-exp of each row."""
        attend = _compiled() if queries.device.type == "cuda" else attend_in_order
        return attend(
            queries,
            keys,
            values,
            index=self.index,
            positions=self.positions,
            codes=self.codes,
            pattern=self.pattern,
        )


def attend_in_order(
    queries: Float[Tensor, "batch heads seq dim"],
    keys: Float[Tensor, "batch heads seq dim"],
    values: Float[Tensor, "batch heads seq value"],
    *,
    index: Int[Tensor, ""],
    positions: Int[Tensor, "batch heads seq"],
    codes: Int[Tensor, "rounds batch heads seq"],
    pattern: Pattern,
) -> tuple[Float[Tensor, "batch heads seq value"], Float[Tensor, "batch heads seq"]]:
    """Attention within a round on rows in its order, and the log-sum-exp of each row.

    Everything that the mask reads is an argument, so that another round or input of that shape compiles
    nothing again.
    """
    # A lambda: it is counted by its arguments, which a type checker's wrapper would hide.
    visible = lambda batch, head, query, key: _visible(  # noqa: E731
        batch, head, query, key, index=index, positions=positions, codes=codes, pattern=pattern
    )
    mask = band(queries.shape[2], pattern=pattern, visible=visible, device=queries.device)
    out, aux = flex_attention(
        queries, keys, values, block_mask=mask, scale=1.0, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return out, aux.lse


@no_type_check
def _visible(batch, head, query, key, *, index, positions, codes, pattern):
    """Whether slots of this round see each other: numbers all, of whatever kind FlexAttention makes them."""
    low, high = pattern.span
    difference = codes[index, batch, head, query] - codes[index, batch, head, key]
    seen = (difference >= low) & (difference <= high)
    if not pattern.strict:
        own, other = positions[batch, head, query], positions[batch, head, key]
        seen = seen & ((other < own) if pattern.causal else (other != own))
    if pattern.count:
        # The first round that shows a pair keeps it.
        for earlier in range(codes.shape[0] - 1):
            difference = codes[earlier, batch, head, query] - codes[earlier, batch, head, key]
            shown = (difference >= low) & (difference <= high)
            seen = seen & ~(shown & (index > earlier))
    return seen


def band(seq: int, *, pattern: Pattern, visible: _MaskMod, device: torch.device) -> BlockMask:
    """The blocks that the chunks around a block's chunks lie in, listed without a look at the others."""
    kv_num_blocks, kv_indices = _blocks_around(
        seq, chunk=pattern.chunk_length, before=pattern.before, after=pattern.after, device=device
    )
    q_num_blocks, q_indices = _blocks_around(
        seq, chunk=pattern.chunk_length, before=pattern.after, after=pattern.before, device=device
    )
    return BlockMask(
        seq_lengths=(seq, seq),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _blocks_around(
    seq: int, *, chunk: int, before: int, after: int, device: torch.device
) -> tuple[Int[Tensor, "1 1 blocks"], Int[Tensor, "1 1 blocks around"]]:
    """How many blocks each block sees, and which."""
    count = -(-seq // BLOCK)
    starts = torch.arange(count, device=device) * BLOCK
    first = (starts // chunk - before).clamp(min=0) * chunk // BLOCK
    last_slots = (starts + BLOCK - 1).clamp(max=seq - 1)
    last = ((last_slots // chunk + after + 1) * chunk - 1).clamp(max=seq - 1) // BLOCK
    around = min(count, ((before + after + 2) * chunk + BLOCK) // BLOCK + 2)
    indices = (first[:, None] + torch.arange(around, device=device)).clamp(max=count - 1)
    return (last - first + 1).int()[None, None], indices.int()[None, None]


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """As it stands it would make all scores at once. Whole, so that it never falls back to that unseen."""
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(attend_in_order, fullgraph=True)
    return compiled


def _each(rounds: Rounds) -> Iterator[_Round]:
    """The rounds in turn."""
    codes = rounds.codes()
    count, *_, seq = codes.shape
    indices = torch.arange(count, device=codes.device)
    slots = torch.arange(seq, device=codes.device)
    for index in range(count):
        positions, _ = read_order(rounds.order[:, :, index])
        yield _Round(
            index=indices[index].clone(),
            positions=positions,
            slots=torch.empty_like(positions).scatter_(-1, positions, slots.expand_as(positions)),
            codes=codes.gather(-1, positions.expand_as(codes)),
            pattern=rounds.pattern,
        )


def _pick(x: Tensor, index: Int[Tensor, "batch heads seq"]) -> Tensor:
    if x.ndim == index.ndim:
        return x.gather(2, index)
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _alone(logsumexp: Float[Tensor, "batch heads seq"]) -> Bool[Tensor, "batch heads seq 1"]:
    """Rows that nothing was shown to, which attend to themselves."""
    return (logsumexp == -math.inf).unsqueeze(-1)


def _keys(qk: Float[Tensor, "batch heads seq dim"], rounds: Rounds) -> Float[Tensor, "batch heads seq dim"]:
    """Queries at the length that keys have."""
    wide = torch.promote_types(qk.dtype, torch.float32)
    norms = key_norms(qk, pattern=rounds.pattern, dtype=wide)
    return (qk * (norms * rounds.pattern.scale).unsqueeze(-1)).to(qk.dtype)


def _through_norms(qk: Tensor, dqueries: Tensor, dkeys: Tensor, rounds: Rounds) -> Tensor:
    """The gradient of what is query and key: keys are x·n·scale, n = (mean x² + ε)^(−½)."""
    norms = key_norms(qk, pattern=rounds.pattern, dtype=dkeys.dtype).unsqueeze(-1)
    along = (dkeys * qk).sum(-1, keepdim=True) * norms.pow(3) / qk.shape[-1]
    return dqueries.add_((dkeys * norms - qk * along).mul_(rounds.pattern.scale))
