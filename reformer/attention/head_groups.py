"""An attention branch some heads at a time: norm, projections, attention, output projection, and backward.

Queries, keys, values and outputs of all heads together are several times as large as a residual stream. Here
those of a group of heads exist at once, what is normalised exists for a block of rows, and each group adds to
the output by itself. Backward does the same again, and takes the gradients of a group before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.attention.modules import (
    Attended,
    AttentionCall,
    SharedQueryKeyAttention,
    StandardAttention,
    merge_heads,
    split_heads,
)
from reformer.autocasting import Autocast
from reformer.randomness import dropout, generator

#: Rows that are normalised and multiplied at a time: few enough to stay in cache, enough to pay for the call.
ROWS = 4096


class Gradients(NamedTuple):
    """The output of a branch, and the gradients of its input and its parameters."""

    out: Float[Tensor, "batch seq d_model"]
    x: Float[Tensor, "batch seq d_model"]
    parameters: dict[nn.Parameter, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadGroups:
    """The branch dropout(attention(norm(x))).

    Sums over heads are taken group after group, so that results differ from those of all heads together by
    rounding. A dropped share of the output is drawn from a stream of its own, seeded by the global one.

    Args:
        norm: of what enters.
        attention: the layer.
        heads_at_once: heads of a group; the last group may have fewer.
        dropout_p: share of the output that is dropped.
    """

    norm: nn.Module
    attention: SharedQueryKeyAttention | StandardAttention
    heads_at_once: int
    dropout_p: float

    @staticmethod
    def serve(call: AttentionCall) -> bool:
        """Whether that pass can be computed so: not in a decode, which keeps all heads in its caches."""
        return call.caches is None and call.attending.kind != "knock_out"

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    ) -> Attended:
        """The branch, and the buckets it used if it hashed; nothing is kept for a gradient."""
        kept = self._kept(x)
        buckets = buckets if buckets is not None else self._hash(x, call=call)
        out = torch.zeros_like(x)
        for heads in self._groups():
            attended = self._attend(self._project(x, heads), heads, call=call, buckets=buckets)
            self._add_output(out, attended, heads)
        return Attended(kept(out), buckets)

    @torch.no_grad()
    def vjp(
        self,
        x: Float[Tensor, "batch seq d_model"],
        gradient: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
        autocast: Autocast,
    ) -> Gradients:
        """The branch again, on the buckets it used, and what a gradient of its output makes of its inputs.

        The gradients of attention and norm are taken under the given autocast.
        """
        kept = self._kept(x)
        gradient = kept(gradient)
        out, dnormed = torch.zeros_like(x), torch.zeros_like(x)
        *weights, output = self._matrices()
        found: dict[nn.Parameter, Tensor] = {each: torch.zeros_like(each) for each in (*weights, output)}
        for heads in self._groups():
            leaves = [part.requires_grad_() for part in self._project(x, heads)]
            with torch.enable_grad():
                attended = self._attend(leaves, heads, call=call, buckets=buckets)
            columns = self._columns(heads)
            merged = merge_heads(attended.detach())
            self._add_output(out, merged, heads)
            for rows in _row_blocks(x):
                found[output][:, columns] += _outer(gradient[:, rows], merged[:, rows])
            dmerged = _multiplied(gradient, output[:, columns])
            dparts = _gradients(
                attended, leaves, split_heads(dmerged, heads=heads.stop - heads.start), autocast=autocast
            )
            del attended, merged, dmerged, leaves
            self._through_projections(
                x, dparts, dnormed=dnormed, weights=weights, found=found, columns=columns
            )
            del dparts
        self._through_norm(x, dnormed, found=found, autocast=autocast)
        return Gradients(kept(out), dnormed, found)

    def _matrices(self) -> list[nn.Parameter]:
        """Of the projections, and of the output."""
        linear = [*self.attention.projections, self.attention.output]
        return [parameter for each in linear for parameter in each.parameters()]

    def _groups(self) -> Iterator[slice]:
        heads = self.attention.config.n_heads
        return (
            slice(first, min(first + self.heads_at_once, heads))
            for first in range(0, heads, self.heads_at_once)
        )

    def _columns(self, heads: slice) -> slice:
        """What the heads own of the width of all of them."""
        dim = self.attention.config.head_width
        return slice(heads.start * dim, heads.stop * dim)

    def _kept(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Drop a share, the same one at every call."""
        if not self.dropout_p:
            return lambda each: each
        seed = int(torch.randint(2**62, ()))
        return lambda each: dropout(
            each.contiguous(), self.dropout_p, generator=generator(seed, device=each.device)
        )

    def _hash(
        self, x: Float[Tensor, "batch seq d_model"], *, call: AttentionCall
    ) -> Int[Tensor, "batch heads n_hashes seq"] | None:
        """The buckets of all heads, of which queries alone exist for that."""
        attention = self.attention
        if not isinstance(attention, SharedQueryKeyAttention) or not attention.hashes(x, call=call):
            return None
        queries = self._linear(x, [attention.query_key.weight])[0]
        qk = attention.turn(split_heads(queries, heads=attention.config.n_heads), positions=call.positions)
        return attention.hash_into_buckets(qk, call=call).int()

    def _project(
        self, x: Float[Tensor, "batch seq d_model"], heads: slice
    ) -> list[Float[Tensor, "batch group seq dim"]]:
        columns, group = self._columns(heads), heads.stop - heads.start
        weights = [linear.weight[columns] for linear in self.attention.projections]
        return [split_heads(part, heads=group) for part in self._linear(x, weights)]

    def _linear(
        self, x: Float[Tensor, "batch seq d_model"], weights: Sequence[Float[Tensor, "_ d_model"]]
    ) -> list[Float[Tensor, "batch seq _"]]:
        """Products of what is normalised with each of the matrices."""

        def multiply(rows: Tensor) -> list[Tensor]:
            normed = self.norm(rows)
            return [F.linear(normed, weight) for weight in weights]

        return _by_rows(multiply, x)

    def _attend(
        self,
        projected: Sequence[Float[Tensor, "batch group seq dim"]],
        heads: slice,
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
    ) -> Float[Tensor, "batch group seq dim"]:
        *turned, v = projected
        turned = [self.attention.turn(each, positions=call.positions) for each in turned]
        own = None if buckets is None else buckets[:, heads]
        attend: Callable[..., tuple[Tensor, Tensor | None]] = self.attention.attend
        return attend(*turned, v, call=call, buckets=own)[0]

    def _add_output(self, out: Tensor, attended: Tensor, heads: slice) -> None:
        merged = attended if attended.ndim == 3 else merge_heads(attended)
        weight = self.attention.output.weight[:, self._columns(heads)]
        for rows in _row_blocks(out):
            out[:, rows] += F.linear(merged[:, rows], weight)

    def _through_projections(
        self,
        x: Float[Tensor, "batch seq d_model"],
        dparts: Sequence[Float[Tensor, "batch group seq dim"]],
        *,
        dnormed: Float[Tensor, "batch seq d_model"],
        weights: Sequence[nn.Parameter],
        found: dict[nn.Parameter, Tensor],
        columns: slice,
    ) -> None:
        """Add to the gradients of what is normalised and of the matrices."""
        merged = [merge_heads(part) for part in dparts]
        for rows in _row_blocks(x):
            normed = self.norm(x[:, rows])
            for weight, part in zip(weights, merged, strict=True):
                found[weight][columns] += _outer(part[:, rows], normed)
                dnormed[:, rows] += part[:, rows] @ weight[columns]

    def _through_norm(
        self,
        x: Float[Tensor, "batch seq d_model"],
        dnormed: Float[Tensor, "batch seq d_model"],
        *,
        found: dict[nn.Parameter, Tensor],
        autocast: Autocast,
    ) -> None:
        """Turn the gradient of what is normalised into that of `x`, in place."""
        parameters = [each for each in self.norm.parameters() if each.requires_grad]
        for rows in _row_blocks(x):
            leaf = x[:, rows].detach().requires_grad_()
            with torch.enable_grad():
                normed = self.norm(leaf)
            dnormed[:, rows], *more = _gradients(
                normed, [leaf, *parameters], dnormed[:, rows], autocast=autocast
            )
            for parameter, each in zip(parameters, more, strict=True):
                found[parameter] = found[parameter] + each if parameter in found else each


def _row_blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, ROWS // max(1, x.shape[0]))
    return (slice(start, min(start + step, x.shape[1])) for start in range(0, x.shape[1], step))


def _by_rows(
    function: Callable[[Tensor], list[Tensor]], x: Float[Tensor, "batch seq width"]
) -> list[Float[Tensor, "batch seq _"]]:
    """The outputs of a row-wise function, which is given some rows at a time."""
    outs: list[Tensor] = []
    for rows in _row_blocks(x):
        found = function(x[:, rows])
        outs = outs or [part.new_empty(*x.shape[:2], part.shape[2]) for part in found]
        for out, part in zip(outs, found, strict=True):
            out[:, rows] = part
    return outs


def _multiplied(
    x: Float[Tensor, "batch seq width"], matrix: Float[Tensor, "width other"]
) -> Float[Tensor, "batch seq other"]:
    return _by_rows(lambda rows: [rows @ matrix], x)[0]


def _outer(
    left: Float[Tensor, "batch rows left"], right: Float[Tensor, "batch rows right"]
) -> Float[Tensor, "left right"]:
    """The sum over rows of left times right."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def _gradients(
    out: Tensor, inputs: Sequence[Tensor], gradient: Tensor, *, autocast: Autocast
) -> list[Tensor]:
    with autocast.entered():
        return list(torch.autograd.grad(out, inputs, gradient.to(out.dtype), materialize_grads=True))
