"""Writing on from a prompt, one token a row at a time."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reformer.attention.decode_cache import Caches, row_ends
from reformer.attention.modules import AttentionCall, SharedQueryKeyAttention
from reformer.attention.options import at_least, check_padding_mask
from reformer.config import ReformerConfig
from reformer.heads import LanguageModelHead
from reformer.sampling import Sampling
from reformer.streams import Streams
from reformer.trunk import Trunk


class RecomputeWarning(UserWarning):
    """No cache can follow the model, so each new token costs a pass over all tokens before it."""


class DecodeState(ABC):
    """A batch that is being written on: the logits of each row's next token, and a way to append it.

    A row goes on right behind its last real token, at the next position. So rows may hold prompts of
    different lengths, with padding behind them, and each is continued as if it were alone. Padding in front
    or in between keeps its positions, as in a forward pass with the same mask.

    Args:
        trunk: of a causal model, in eval mode.
        head: of the model.
        ends: position of each row's next token.
        room: tokens that a row can be continued by.
    """

    logits: Float[Tensor, "batch vocab"]

    def __init__(
        self, trunk: Trunk, head: LanguageModelHead, *, ends: Int[Tensor, " batch"], room: int
    ) -> None:
        self._trunk = trunk
        self._head = head
        self._ends = ends
        self._room = room

    @property
    def cache_bytes(self) -> int:
        """Bytes that are kept of the tokens so far."""
        return 0

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append a token to each row; the logits of those that come next.

        Raises:
            ValueError: more tokens than there is room for.
        """
        if self._room == 0:
            raise ValueError("max_new_tokens: all are written; start with more to go on")
        self._room -= 1
        self.logits = self._append(tokens)
        return self.logits

    @abstractmethod
    def _append(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """The logits behind these tokens, which are at `_ends`; afterwards `_ends` is one further."""


class CachedDecode(DecodeState):
    """Reads the prompt once; then every layer sees through its cache what came before."""

    def __init__(
        self,
        trunk: Trunk,
        head: LanguageModelHead,
        tokens: Int[Tensor, "batch seq"],
        *,
        ends: Int[Tensor, " batch"],
        padding_mask: Bool[Tensor, "batch seq"] | None,
        room: int,
        call: AttentionCall,
    ) -> None:
        super().__init__(trunk, head, ends=ends, room=room)
        caches = Caches(capacity=tokens.shape[1] + room)
        self._call = replace(call, caches=caches)
        streams = trunk.advance(tokens, call=replace(self._call, padding_mask=padding_mask))
        self.logits = _logits_before(streams, ends, head=head)

    @property
    def cache_bytes(self) -> int:
        """Of keys, values and queues of all layers."""
        assert self._call.caches is not None
        return self._call.caches.nbytes

    def _append(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        call = replace(self._call, positions=self._ends[:, None])
        logits: Tensor = self._head(self._trunk.advance(tokens[:, None], call=call))
        self._ends = self._ends + 1
        return logits.squeeze(1)


class RecomputedDecode(DecodeState):
    """Reads everything again for every token, and says so: right for any attention, and slow."""

    def __init__(
        self,
        trunk: Trunk,
        head: LanguageModelHead,
        tokens: Int[Tensor, "batch seq"],
        *,
        ends: Int[Tensor, " batch"],
        padding_mask: Bool[Tensor, "batch seq"] | None,
        room: int,
        call: AttentionCall,
    ) -> None:
        super().__init__(trunk, head, ends=ends, room=room)
        warnings.warn(
            f"causality={trunk.config.causality!r}, conventions={trunk.config.conventions!r}: what a token "
            "sees depends on later tokens or their number, so "
            "each new token costs a pass over all before it; use causality='strict' and conventions='own' "
            "to keep them in a cache",
            RecomputeWarning,
            stacklevel=2,
        )
        self._call = call
        self._tokens = F.pad(tokens, (0, room))
        self._real = None if padding_mask is None else F.pad(padding_mask, (0, room))
        self._length = tokens.shape[1]
        self.logits = self._read()

    @property
    def cache_bytes(self) -> int:
        """Of the tokens themselves: nothing else is kept."""
        return self._tokens.nbytes

    def _append(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        self._tokens.scatter_(1, self._ends[:, None], tokens[:, None])
        if self._real is not None:
            self._real.scatter_(1, self._ends[:, None], True)
        self._ends = self._ends + 1
        self._length += 1
        return self._read()

    def _read(self) -> Float[Tensor, "batch vocab"]:
        padding_mask = None if self._real is None else self._real[:, : self._length]
        streams = self._trunk.advance(
            self._tokens[:, : self._length], call=replace(self._call, padding_mask=padding_mask)
        )
        return _logits_before(streams, self._ends, head=self._head)


@torch.no_grad()
def start_decode(
    trunk: Trunk,
    head: LanguageModelHead,
    tokens: Int[Tensor, "batch seq"],
    *,
    max_new_tokens: int,
    padding_mask: Bool[Tensor, "batch seq"] | None,
    source: Float[Tensor, "batch source width"] | None = None,
    source_padding_mask: Bool[Tensor, "batch source"] | None = None,
) -> DecodeState:
    """Read a prompt, into caches wherever they can follow the model.

    Args:
        trunk: of a causal model, in eval mode.
        head: of the model.
        tokens: prompts.
        max_new_tokens: most tokens that each row is continued by.
        padding_mask: True at real tokens.
        source: the sequence that cross-attention looks at, if there is one.
        source_padding_mask: True at its real tokens.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    if not trunk.config.causal:
        raise ValueError("causal=False: a token may see later ones, so none can be appended; use causal=True")
    if trunk.training:
        raise ValueError("training mode: dropout would change what is written; call model.eval() before")
    at_least("max_new_tokens", max_new_tokens, 1)
    ends = _check_prompt(tokens, padding_mask=padding_mask)
    longest = int(ends.max()) if len(ends) else tokens.shape[1]
    _check_length(longest, max_new_tokens=max_new_tokens, config=trunk.config)
    tokens = tokens[:, :longest]
    if padding_mask is not None:
        padding_mask = padding_mask[:, :longest]
        padding_mask = None if bool(padding_mask.all()) else padding_mask
    kind = CachedDecode if _can_be_cached(trunk) else RecomputedDecode
    call = replace(trunk.attention_call(), source=source, source_padding_mask=source_padding_mask)
    return kind(trunk, head, tokens, ends=ends, padding_mask=padding_mask, room=max_new_tokens, call=call)


def write_on(
    state: DecodeState, *, max_new_tokens: int, sampling: Sampling
) -> Int[Tensor, "batch max_new_tokens"]:
    """Choose and append tokens; those chosen."""
    rows, device = len(state.logits), state.logits.device
    uniforms = sampling.uniforms(rows=rows, tokens=max_new_tokens).to(device)
    written = [sampling.choose(state.logits, uniform=uniforms[:, 0])]
    for uniform in uniforms[:, 1:].unbind(dim=1):
        written.append(sampling.choose(state.step(written[-1]), uniform=uniform))
    return torch.stack(written, dim=1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode inside the block; afterwards each part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _logits_before(
    streams: Streams, ends: Int[Tensor, " batch"], *, head: LanguageModelHead
) -> Float[Tensor, "batch vocab"]:
    """Logits at the last token of each row."""
    last = (ends - 1)[:, None, None]
    logits: Tensor = head(streams.each(lambda stream: stream.take_along_dim(last, dim=1)))
    return logits.squeeze(1)


def _can_be_cached(trunk: Trunk) -> bool:
    """Whether what a token sees, in every layer, depends on the tokens before it alone."""
    if trunk.config.conventions != "own":
        return False
    attending = trunk.attention_call().attending
    layers = [module for module in trunk.modules() if isinstance(module, SharedQueryKeyAttention)]
    families = [layer.hash_family(attending) for layer in layers]
    for family in families:
        if family is not None and not family.token_wise:
            raise ValueError(
                f"hashing={family}: a bucket depends on the other tokens, so each new one moves others; "
                "use data_rotation=False to generate"
            )
    return all(family is None for family in families) or trunk.config.lsh_options().strict


def _check_prompt(
    tokens: Int[Tensor, "batch seq"], *, padding_mask: Bool[Tensor, "batch seq"] | None
) -> Int[Tensor, " batch"]:
    """Position of each row's next token, if every row has one to go on from."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: give [batch, seq]")
    batch, seq = tokens.shape
    check_padding_mask(padding_mask, expected=(batch, seq))
    if padding_mask is None:
        padding_mask = torch.ones_like(tokens, dtype=torch.bool)
    if seq == 0 or not bool(padding_mask.any(dim=1).all()):
        raise ValueError(
            f"tokens of shape {(batch, seq)}: a row without a real token has nothing to go on from; "
            "give each row one at least"
        )
    return row_ends(padding_mask)


def _check_length(prompt: int, *, max_new_tokens: int, config: ReformerConfig) -> None:
    if prompt + max_new_tokens > config.longest_input:
        padded = config.padded_length(prompt + max_new_tokens)
        how = f" padded to {padded} as in transformers," if padded > prompt + max_new_tokens else ""
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: with a prompt of {prompt}{how} more than "
            f"max_length={config.max_length}; ask for fewer, or build the model with max_length={padded}"
        )
