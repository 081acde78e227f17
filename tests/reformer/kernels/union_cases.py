"""Small inputs in every mode of the softmax over the union of rounds, for whatever kernel computes it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from reformer.attention import lsh
from reformer.attention.options import LSHOptions
from reformer.kernels import union

BATCH, HEADS, DIM, VALUE = 2, 2, 7, 11
FACTORS: dict[str, tuple[Any, ...]] = {
    "mode": ("strict", "published", "both ways"),
    "duplicates": ("count", "sum"),
    "n_hashes": (1, 2, 3),
    "seq": (1, 16, 37),
    "chunk_length": (5, 16, 21),
    "padding": ("none", "scattered", "a whole row"),
    "n_chunks_before": (1, 2),
    "n_chunks_after": (0, 1),
    "logit_scale": ("trax", "sqrt_d"),
    "layout": ("heads first", "heads last"),
}
ROW: dict[str, Any] = {name: levels[-1] for name, levels in FACTORS.items()} | {
    "n_hashes": 2,
    "chunk_length": 5,
    "padding": "scattered",
}


def inputs(
    row: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    dim: int = DIM,
    heads: int = HEADS,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Queries and keys, values, and settings of `lsh_attention`."""
    random = torch.Generator().manual_seed(5)
    seq, rounds = row["seq"], row["n_hashes"]

    def normal(dim: int) -> Tensor:
        if row["layout"] == "heads first":
            x = torch.randn(BATCH, heads, seq, dim, generator=random)
        else:
            x = torch.randn(BATCH, seq, heads, dim, generator=random).transpose(1, 2)
        return x.to(device, dtype).requires_grad_()

    real = torch.ones(BATCH, seq, dtype=torch.bool)
    if row["padding"] == "scattered":
        real = torch.rand(BATCH, seq, generator=random) < 0.7
    elif row["padding"] == "a whole row":
        real[1] = False
    settings: dict[str, Any] = {
        "buckets": torch.randint(4, (BATCH, heads, rounds, seq), generator=random).to(device),
        "padding_mask": None if row["padding"] == "none" else real.to(device),
        "n_hashes": rounds,
        "chunk_length": row["chunk_length"],
        "duplicates": row["duplicates"],
        "n_chunks_before": row["n_chunks_before"],
        "logit_scale": row["logit_scale"],
        "causal": row["mode"] != "both ways",
        "causality": "published" if row["mode"] == "both ways" else row["mode"],
    }
    if row["mode"] != "strict":
        settings["n_chunks_after"] = row["n_chunks_after"]
    return normal(dim), normal(VALUE if dim == DIM else dim), settings


def attend(
    qk: Tensor,
    v: Tensor,
    *,
    engine: union.Engine,
    buckets: Tensor,
    padding_mask: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """LSH attention by a kernel, wherever the inputs are."""
    options = LSHOptions(**settings)
    return union.attend(
        qk,
        v,
        buckets=buckets,
        padding_mask=padding_mask,
        pattern=lsh.pattern_of(options, dim=qk.shape[-1]),
        twin=partial(lsh._attend_at_once, options=options),
        engine=engine,
    )
