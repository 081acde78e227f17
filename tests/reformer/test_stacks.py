import pytest
import torch
from torch import Tensor, nn

from reformer.attention.modules import AttentionCall
from reformer.config import RESIDUALS
from reformer.layer import Block
from reformer.lifting import build_lifting
from reformer.stacks import run_plain, run_stack
from reformer.streams import Streams
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal, small_config


def some_blocks(n_layers: int = 3) -> list[Block]:
    return [Block(small_config(), layer=layer).double() for layer in range(n_layers)]


def test_a_block_adds_its_branches_to_two_streams() -> None:
    (block,) = some_blocks(1)
    x1, x2 = normal(BATCH, SEQ, 14), normal(BATCH, SEQ, 14, seed=1)
    y1, y2 = run_plain([block], x1, x2, call=AttentionCall())
    attended = block.attention(block.attention_norm(x2), call=AttentionCall()).out
    assert_all_close([y1], [x1 + attended], tolerance=1e-14)
    assert_all_close([y2], [x2 + block.feed_forward(block.feed_forward_norm(y1))], tolerance=1e-14)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("gradients", [True, False])
def test_both_streams_start_as_the_input_and_blocks_follow_in_order(residual: str, gradients: bool) -> None:
    blocks, x = some_blocks(), normal(BATCH, SEQ, 14)
    lifting = build_lifting(residual, grid_bits=11)
    with torch.no_grad():
        y1 = y2 = lifting.start(x)
        for block in blocks:
            y1, y2 = run_plain([block], y1, y2, call=AttentionCall(), lifting=lifting)
    with torch.set_grad_enabled(gradients):
        actual = run_stack(blocks, x, call=AttentionCall(), residual=residual, grid_bits=11)
    assert_all_close(actual, [y1, y2], tolerance=0)
    assert actual[0].requires_grad is gradients


@pytest.mark.parametrize("residual", RESIDUALS)
def test_without_gradients_nothing_is_kept(residual: str) -> None:
    x = normal(BATCH, SEQ, 14)
    with torch.no_grad():
        y1, _ = run_stack(some_blocks(), x, call=AttentionCall(), residual=residual, grid_bits=16)
    assert y1.grad_fn is None


def test_streams_are_merged_side_by_side_or_averaged() -> None:
    y1, y2 = normal(BATCH, SEQ, 14), normal(BATCH, SEQ, 14, seed=1)
    assert torch.equal(Streams(y1, y2).merged("concat"), torch.cat([y1, y2], dim=-1))
    assert_all_close([Streams(y1, y2).merged("mean")], [(y1 + y2) / 2], tolerance=1e-15)


@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
def test_dropout_falls_on_both_branches_in_training_alone(branch: str) -> None:
    block = Block(small_config(dropout=0.25), layer=0).double()
    # Where the last layer gives ones, what was dropped before it leaves no trace.
    nn.init.zeros_(block.feed_forward.narrow.weight)
    nn.init.ones_(block.feed_forward.narrow.bias)
    x = normal(BATCH, SEQ, 14)

    def out() -> Tensor:
        return block.attend(x, call=AttentionCall()).out if branch == "attention" else block.feed(x)

    dropped = out()
    block.eval()
    whole = out()
    kept = dropped != 0
    assert 0.65 < float(kept.double().mean()) < 0.85
    assert_all_close([dropped[kept]], [whole[kept] / 0.75], tolerance=1e-12)
    assert (whole != 0).all()
