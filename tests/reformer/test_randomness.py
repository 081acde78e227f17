import itertools

import pytest
import torch

from reformer.randomness import RandomState, dropout, generator


def draws(*keys: int) -> tuple[int, ...]:
    return tuple(torch.randint(2**31, (4,), generator=generator(*keys)).tolist())


def test_equal_keys_give_the_same_stream() -> None:
    assert draws(3, 1, 4) == draws(3, 1, 4)


def test_different_keys_give_different_streams() -> None:
    keys = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (2**63,), (2**64 - 2,)]
    keys += list(itertools.product(range(5), repeat=3))
    assert len({draws(*key) for key in keys}) == len(keys)


def test_streams_of_neighbouring_keys_are_unrelated() -> None:
    streams = torch.stack([torch.randn(4000, generator=generator(0, layer, 7)) for layer in range(7)])
    correlations = torch.corrcoef(streams) - torch.eye(7)
    assert correlations.abs().max() < 5 / 4000**0.5


def test_a_generator_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    draws(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_from_a_generator_keeps_the_mean_and_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    x = torch.full((300, 300), 3.0)
    dropped = dropout(x, 0.25, generator=generator(7))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert abs(float((dropped == 0).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert torch.equal(dropout(x, 0.25, generator=generator(7)), dropped)
    assert not torch.equal(dropout(x, 0.25, generator=generator(8)), dropped)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_replay_draws_the_same_numbers_and_leaves_the_stream_where_it_was() -> None:
    state = RandomState.capture(torch.device("cpu"))
    first = torch.rand(5)
    where = torch.get_rng_state()
    with state.replayed():
        assert torch.equal(torch.rand(5), first)
        torch.rand(7)
    assert torch.equal(torch.get_rng_state(), where)
    with state.replayed():
        assert torch.equal(torch.rand(5), first)


def test_a_failing_replay_puts_the_stream_back() -> None:
    state = RandomState.capture(torch.device("cpu"))
    torch.rand(5)
    where = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), state.replayed():
        torch.rand(3 // 0)
    assert torch.equal(torch.get_rng_state(), where)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_covers_the_device_too() -> None:
    device = torch.device("cuda")
    state = RandomState.capture(device)
    first = torch.rand(5, device=device)
    where = torch.cuda.get_rng_state(device)
    with state.replayed():
        assert torch.equal(torch.rand(5, device=device), first)
    assert torch.equal(torch.cuda.get_rng_state(device), where)
