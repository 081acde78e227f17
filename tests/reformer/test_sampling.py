from typing import Any

import pytest
import torch
from torch import Tensor

from reformer.sampling import Sampling, most_likely, nucleus
from tests.reformer.helpers import normal

CHANCES = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)


def drawn(sampling: Sampling, logits: Tensor, *, count: int) -> Tensor:
    """So many draws from the same logits, one a row."""
    uniform = sampling.uniforms(rows=1, tokens=count)[0]
    return sampling.choose(logits.expand(count, -1), uniform=uniform)


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = normal(5, 11)
    greedy = Sampling()
    chosen = greedy.choose(logits, uniform=greedy.uniforms(rows=5, tokens=1)[:, 0])
    assert torch.equal(chosen, logits.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_their_chance(temperature: float) -> None:
    logits = normal(1, 7)
    expected = (logits[0] / temperature).softmax(dim=-1)
    count = 100_000
    found = torch.bincount(drawn(Sampling(temperature=temperature), logits, count=count), minlength=7) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 4 * error).all()


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = normal(1, 7) * 1e3
    tokens = drawn(Sampling(temperature=1e-300), logits, count=50)
    assert (tokens == logits.argmax()).all()


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_most_likely(count: int, kept: list[int]) -> None:
    assert most_likely(CHANCES, count=count)[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("share", "kept"),
    [(1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_that_have_the_share(share: float, kept: list[int]) -> None:
    for scale in (1.0, 0.5):
        assert nucleus(scale * CHANCES, share=share)[0].nonzero().flatten().tolist() == kept


def test_what_ties_with_the_last_one_kept_is_kept() -> None:
    chances = torch.tensor([[0.25, 0.5, 0.25]])
    assert (most_likely(chances, count=2) > 0).all()
    assert (nucleus(chances, share=0.6) > 0).all()


def test_kept_tokens_keep_their_odds_and_the_others_never_come() -> None:
    logits = CHANCES.log()
    count = 50_000
    for settings, expected in (
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
        # Of the three most likely, two have 70 % of what those three have.
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ):
        tokens = drawn(Sampling(temperature=1.0, **settings), logits, count=count)
        found = torch.bincount(tokens, minlength=4) / count
        assert torch.equal(found > 0, torch.tensor(expected) > 0)
        assert torch.allclose(found, torch.tensor(expected), atol=0.01)


def test_the_ends_of_the_unit_interval_choose_tokens_that_have_a_chance() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    sampling = Sampling(temperature=1.0)
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sampling.choose(logits, uniform=torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    assert sampling.choose(logits, uniform=largest).tolist() == [2]


def test_a_row_that_is_not_a_number_gives_some_token_and_spoils_no_other() -> None:
    logits = normal(3, 7)
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.9)
    uniform = torch.full((3,), 0.5, dtype=torch.float64)
    expected = sampling.choose(logits, uniform=uniform)
    logits[1] = torch.nan
    chosen = sampling.choose(logits, uniform=uniform)
    assert torch.equal(chosen[[0, 2]], expected[[0, 2]])
    assert 0 <= int(chosen[1]) < 7


def test_random_numbers_of_a_row_depend_on_seed_and_row_alone() -> None:
    numbers = Sampling(temperature=1.0, seed=3).uniforms(rows=5, tokens=40)
    assert numbers.dtype == torch.float64
    assert torch.equal(Sampling(temperature=1.0, seed=3).uniforms(rows=2, tokens=7), numbers[:2, :7])
    other = Sampling(temperature=1.0, seed=4).uniforms(rows=5, tokens=40)
    both = torch.cat([numbers, other])
    assert len(both.unique()) == both.numel()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"temperature": -0.5},
            "temperature=-0.5: logits are divided by it; use 0 for the most likely token",
        ),
        ({"temperature": float("inf")}, "temperature=inf: logits are divided by it"),
        ({"temperature": float("nan")}, "temperature=nan: logits are divided by it"),
        ({"top_k": 0}, "top_k=0: must be at least 1; use top_k=1 or more"),
        ({"top_p": 0.0}, "top_p=0.0: a share of the chance; give 0 < top_p ≤ 1, or None"),
        ({"top_p": 1.5}, "top_p=1.5: a share of the chance"),
        ({"top_p": float("nan")}, "top_p=nan: a share of the chance"),
    ],
)
def test_a_setting_out_of_range_is_a_value_error(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**settings)
