"""What FlexAttention is asked for, held to the dense twin: on the CPU it has no backward of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, create_mask

from reformer.attention import reference
from reformer.kernels import flash, flex
from tests.reformer.helpers import assert_all_close, pairwise, value_and_gradients
from tests.reformer.kernels.union_cases import FACTORS, ROW, attend, inputs

attend_by_flex = partial(attend, engine=flex.KERNEL)


def dense(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, return_aux: AuxRequest
) -> tuple[Tensor, AuxOutput]:
    """FlexAttention by its definition, differentiable everywhere."""
    assert return_aux.lse
    batch, heads, seq, _ = query.shape
    visible = create_mask(block_mask.mask_mod, batch, heads, seq, seq, device="cpu")
    assert not bool((visible & ~listed(block_mask, seq=seq)).any())
    scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    sums = scores.logsumexp(dim=-1)
    finite = sums.masked_fill(sums == -torch.inf, 0)
    weights = (scores - finite.unsqueeze(-1)).exp().masked_fill(~visible, 0)
    return weights @ value, AuxOutput(lse=sums)


def listed(mask: BlockMask, *, seq: int) -> Tensor:
    """Pairs in the blocks of a mask, of which both directions must be told the same."""
    kv = blocks(mask.kv_num_blocks, mask.kv_indices)
    assert mask.q_num_blocks is not None
    assert mask.q_indices is not None
    assert torch.equal(kv, blocks(mask.q_num_blocks, mask.q_indices).T)
    rows = kv.repeat_interleave(mask.BLOCK_SIZE[0], dim=0)
    return rows.repeat_interleave(mask.BLOCK_SIZE[1], dim=1)[:seq, :seq]


def blocks(counts: Tensor, indices: Tensor) -> Tensor:
    found = torch.zeros(2 * [counts.shape[-1]], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        found[row, columns[: int(count)]] = True
    return found


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "flex_attention", dense)


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("row", pairwise({**FACTORS, "block": (16, 32, flex.BLOCK)}))
def test_values_and_gradients_are_those_of_the_dense_twin(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "BLOCK", row["block"])
    qk, v, settings = inputs(row)
    expected = value_and_gradients(reference.lsh_attention, qk, v, **settings)
    assert_all_close(value_and_gradients(attend_by_flex, qk, v, **settings), expected, tolerance=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mode", FACTORS["mode"])
@pytest.mark.parametrize("duplicates", FACTORS["duplicates"])
def test_flex_attention_itself_gives_these_values(mode: str, duplicates: str) -> None:
    qk, v, settings = inputs({**ROW, "mode": mode, "duplicates": duplicates})
    with torch.no_grad():
        out = attend_by_flex(qk, v, **settings)
    assert_all_close([out], [reference.lsh_attention(qk, v, **settings)], tolerance=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_another_round_or_input_of_a_shape_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(flex.attend_in_order, fullgraph=True, backend=counting)
    monkeypatch.setattr(flex, "attend_in_order", compiled)
    for _ in range(2):
        qk, v, settings = inputs({**ROW, "n_hashes": 3})
        with torch.no_grad():
            out = attend_by_flex(qk + 1, v, **settings)
        assert_all_close([out], [reference.lsh_attention(qk + 1, v, **settings)], tolerance=1e-12)
    assert len(graphs) == 1


def test_it_can_be_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "flex_attention", dense)
    qk, v, settings = inputs({**ROW, "seq": 5})
    assert torch.autograd.gradgradcheck(partial(attend_by_flex, **settings), (qk, v), fast_mode=True)


def test_the_band_of_a_million_tokens_is_a_list_and_not_a_square() -> None:
    pattern = flash.Pattern(
        chunk_length=64, before=1, after=0, strict=True, causal=True, count=True, scale=1.0, epsilon=1e-6
    )
    mask = flex.band(
        2**20, pattern=pattern, visible=lambda *_: torch.tensor(True), device=torch.device("cpu")
    )
    assert mask.kv_indices.shape[-1] <= 5
    assert int(mask.kv_num_blocks.max()) == 2
