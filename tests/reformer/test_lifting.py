import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reformer.lifting import FloatLifting, IntegerLifting, build_lifting
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal

DTYPES = [torch.float32, torch.float64]


def stream(*, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(BATCH, SEQ, 7, seed=seed, dtype=dtype) * scale


def test_only_the_exact_kind_rounds() -> None:
    for residual in ("plain", "checkpoint", "reversible"):
        assert isinstance(build_lifting(residual, grid_bits=16), FloatLifting)
    lifting = build_lifting("reversible_exact", grid_bits=9)
    assert isinstance(lifting, IntegerLifting)
    assert lifting.bits == 9


def test_addition_in_floating_point_is_plain_addition() -> None:
    lifting, x, branch = FloatLifting(), stream(), stream(seed=1)
    assert lifting.start(x) is x
    assert torch.equal(lifting.add(x, branch), x + branch)
    expected = x - branch
    assert torch.equal(lifting.subtract(x, branch), expected)
    lifting.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_rounded_to_the_nearest_multiple_and_ties_to_the_even_one(dtype: torch.dtype) -> None:
    lifting = IntegerLifting(bits=8)
    x = torch.tensor([0.3, 0.5, 1.5, 2.5, -0.5, -1.5, 7.0], dtype=dtype) / 2**8
    expected = torch.tensor([0.0, 0.0, 2.0, 2.0, 0.0, -2.0, 7.0], dtype=dtype) / 2**8
    rounded = lifting.start(x[None, None])
    assert rounded.dtype == dtype
    assert torch.equal(rounded[0, 0], expected)
    assert torch.equal(lifting.add(rounded, x[None, None]), 2 * rounded)


@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_streams_stay_float32_on_the_grid_whatever_the_branches_are(branch_dtype: torch.dtype) -> None:
    lifting = IntegerLifting(bits=12)
    x = lifting.start(stream())
    branch = stream(seed=1).to(branch_dtype)
    y = lifting.add(x, branch)
    back = lifting.subtract(y, branch)
    assert (y.dtype, back.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y * 2**12, (y * 2**12).round())
    assert (y - (x + branch)).abs().max() <= 2.0**-13 + 2.0**-20
    assert torch.equal(back, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(bits=st.integers(8, 20), depth=st.integers(1, 97), seed=st.integers(0, 99))
def test_any_number_of_branches_comes_off_to_the_bit(
    dtype: torch.dtype, bits: int, depth: int, seed: int
) -> None:
    lifting = IntegerLifting(bits=bits)
    scale = lifting.limit / 100
    branches = [stream(scale=scale, seed=seed + index, dtype=dtype) for index in range(depth)]
    x = lifting.start(stream(scale=scale, seed=seed + 98, dtype=dtype))
    y = x
    for branch in branches:
        y = lifting.add(y, branch)
    lifting.check()
    for branch in reversed(branches):
        y = lifting.subtract(y, branch)
    assert torch.equal(y, x)


def test_addition_in_floating_point_does_not_come_off_to_the_bit() -> None:
    lifting, x = FloatLifting(), stream()
    branches = [stream(seed=1 + index) for index in range(31)]
    y = x
    for branch in branches:
        y = lifting.add(y, branch)
    for branch in reversed(branches):
        y = lifting.subtract(y, branch.clone())
    assert 0 < (y - x).abs().max() < 1e-4


def test_gradients_go_straight_through_the_rounding() -> None:
    lifting = IntegerLifting(bits=8)
    x, branch = stream().requires_grad_(), stream(seed=1).bfloat16().requires_grad_()
    weights = stream(seed=2)
    (lifting.add(lifting.start(x), branch) * weights).sum().backward()
    assert x.grad is not None
    assert branch.grad is not None
    assert torch.equal(x.grad, weights)
    assert branch.grad.dtype == torch.bfloat16
    assert_all_close([branch.grad], [weights], tolerance=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 16, 20])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_stream_at_the_limit_is_an_overflow_error_and_one_below_it_is_not(
    bits: int, sign: int, dtype: torch.dtype
) -> None:
    limit = 2.0 ** (23 - bits)
    x = torch.zeros(1, 2, 3, dtype=dtype)
    below = x.clone()
    below[0, 1, 2] = sign * (limit - 2.0**-bits)
    lifting = IntegerLifting(bits=bits)
    lifting.add(lifting.start(x), below)
    lifting.check()
    below[0, 1, 2] = sign * limit
    lifting.add(x, below)
    with pytest.raises(OverflowError, match=f"a stream reached {limit:g}; with grid_bits={bits} sums"):
        lifting.check()


def test_the_error_names_the_value_the_rule_and_the_mend() -> None:
    lifting = IntegerLifting(bits=16)
    lifting.start(torch.full((1, 1, 1), -131.5))
    with pytest.raises(OverflowError) as caught:
        lifting.check()
    assert str(caught.value) == (
        "residual='reversible_exact': a stream reached 131.5; with grid_bits=16 sums are exact below 128; "
        "lower grid_bits or use residual='reversible'"
    )


def test_a_stream_that_comes_back_into_the_range_has_left_it_all_the_same() -> None:
    lifting = IntegerLifting(bits=16)
    x = lifting.start(torch.zeros(1, 1, 1))
    x = lifting.add(x, torch.full((1, 1, 1), 200.0))
    lifting.add(x, torch.full((1, 1, 1), -200.0))
    with pytest.raises(OverflowError):
        lifting.check()


def test_infinity_is_an_overflow_also_next_to_a_nan_and_a_nan_alone_passes() -> None:
    lifting = IntegerLifting(bits=16)
    nan = torch.full((1, 1, 1), torch.nan)
    assert lifting.start(nan).isnan().all()
    lifting.add(nan, nan)
    lifting.check()
    lifting.start(torch.full((1, 1, 1), torch.inf))
    lifting.add(nan, nan)
    with pytest.raises(OverflowError, match="a stream reached inf"):
        lifting.check()


def test_empty_streams_are_in_any_range() -> None:
    lifting = IntegerLifting(bits=16)
    assert lifting.start(torch.zeros(0, 3, 5)).shape == (0, 3, 5)
    lifting.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_streams_are_a_value_error(dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=f"'reversible_exact' in {dtype}: sums are exact from float32 on; keep"
    ):
        IntegerLifting(bits=16).start(stream(dtype=dtype))
