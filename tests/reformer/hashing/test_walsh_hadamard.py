import pytest
import torch
from torch import Tensor

from reformer.hashing.walsh_hadamard import walsh_hadamard
from tests.reformer.helpers import normal


def hadamard_matrix(size: int) -> Tensor:
    """The slow twin: H[i, j] = (−1)^popcount(i & j), entry by entry."""
    return torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)], dtype=torch.float64
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64])
def test_the_fast_transform_is_the_product_with_the_matrix(size: int) -> None:
    x = normal(3, 5, size)
    torch.testing.assert_close(walsh_hadamard(x), x @ hadamard_matrix(size), rtol=0, atol=1e-12)


def test_it_is_its_own_inverse_but_for_the_length() -> None:
    x = normal(3, 32)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)) / 32, x, rtol=0, atol=1e-12)


def test_whole_numbers_stay_exact_and_the_input_as_it_was() -> None:
    x = torch.ones(2, 16)
    assert walsh_hadamard(x).tolist() == [[16.0] + [0.0] * 15] * 2
    assert torch.equal(x, torch.ones(2, 16))
