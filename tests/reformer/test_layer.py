from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reformer.attention.modules import AttentionCall
from reformer.layer import Block
from reformer.stacks import run_plain
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal, small_config

SOURCE_WIDTH = 11


def some_block(*, source_width: int | None = None, **settings: Any) -> Block:
    return Block(small_config(**settings), layer=0, source_width=source_width).double()


def with_source() -> AttentionCall:
    return AttentionCall(source=normal(BATCH, 19, SOURCE_WIDTH, seed=3))


def streams() -> tuple[Tensor, Tensor]:
    return normal(BATCH, SEQ, 14), normal(BATCH, SEQ, 14, seed=1)


def test_a_third_branch_lies_between_the_two_and_each_is_added_to_the_stream_it_is_not_computed_from() -> (
    None
):
    block, (x1, x2), call = some_block(source_width=SOURCE_WIDTH), streams(), with_source()
    y1 = x1 + block.attention(block.attention_norm(x2), call=call).out
    z2 = x2 + block.cross_attention(block.cross_attention_norm(y1), call=call)
    z1 = y1 + block.feed_forward(block.feed_forward_norm(z2))
    assert_all_close(run_plain([block], x1, x2, call=call), [z2, z1], tolerance=1e-14)


def test_branches_hand_on_the_buckets_of_attention_alone() -> None:
    block, x = some_block(source_width=SOURCE_WIDTH), normal(BATCH, SEQ, 14)
    attention, cross_attention, feed_forward = block.branches()
    buckets = attention(x, call=with_source()).buckets
    assert buckets is not None
    again = attention(x, call=AttentionCall(draw=99), buckets=buckets)
    assert torch.equal(again.out, attention(x, call=with_source()).out)
    for branch in (cross_attention, feed_forward):
        assert branch(x, call=with_source()).buckets is None


def test_the_third_branch_has_the_dropout_of_the_others() -> None:
    block, x = some_block(source_width=SOURCE_WIDTH, dropout=0.25), normal(BATCH, SEQ, 14)
    dropped = block.look_up(x, call=with_source())
    block.eval()
    whole = block.look_up(x, call=with_source())
    kept = dropped != 0
    assert 0.65 < float(kept.double().mean()) < 0.85
    assert_all_close([dropped[kept]], [whole[kept] / 0.75], tolerance=1e-12)


@pytest.mark.parametrize("source_width", [None, SOURCE_WIDTH])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_branches_have_the_trainable_parameters_of_the_block_between_them(
    source_width: int | None, frozen: bool
) -> None:
    block = some_block(source_width=source_width)
    block.attention.value.weight.requires_grad_(not frozen)
    listed = block.trainable_parameters()
    expected: list[nn.Parameter] = [p for p in block.parameters() if p.requires_grad]
    assert {id(p) for p in listed} == {id(p) for p in expected}
    assert len(listed) == len(expected)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_the_norms_are_those_of_the_config(norm: str) -> None:
    block = some_block(source_width=SOURCE_WIDTH, norm=norm, norm_eps=0.25)
    kind = nn.RMSNorm if norm == "rms_norm" else nn.LayerNorm
    for each in (block.attention_norm, block.cross_attention_norm, block.feed_forward_norm):
        assert isinstance(each, kind)
        assert each.eps == 0.25
