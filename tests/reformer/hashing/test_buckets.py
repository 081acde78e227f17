import re
from functools import partial
from typing import Any

import pytest

from reformer.hashing import buckets


@pytest.mark.parametrize(
    ("max_length", "chunk_length", "expected"),
    [
        (1024, 64, 32),
        (1023, 64, 16),  # 2·15 = 30
        (4096, 64, 128),
        (8191, 64, 128),  # 2·127 = 254
        (8192, 64, (16, 16)),
        (16384, 64, (16, 32)),
        (65536, 64, (32, 64)),
        (2**20, 64, (128, 256)),
        (64, 64, 2),
        (7, 64, 2),
        (128, 8, 32),
    ],
)
def test_the_automatic_count_is_about_two_buckets_a_chunk(
    max_length: int, chunk_length: int, expected: buckets.Buckets
) -> None:
    assert buckets.automatic(max_length=max_length, chunk_length=chunk_length) == expected


@pytest.mark.parametrize("max_length", [1, 31, 32, 33, 1000, 4095, 4096, 10**6])
@pytest.mark.parametrize("chunk_length", [1, 7, 64])
def test_the_automatic_count_is_one_that_every_family_can_make(max_length: int, chunk_length: int) -> None:
    count = buckets.automatic(max_length=max_length, chunk_length=chunk_length)
    buckets.check_power_of_two(count, family="any")
    total, limit = buckets.total(count), 2 * max(1, max_length // chunk_length)
    assert total <= limit < 2 * total


def test_totals_multiply_factors_and_an_explicit_count_is_never_factorised() -> None:
    assert buckets.total((4, 6)) == 24
    assert buckets.factors((4, 6)) == (4, 6)
    assert buckets.factors(256) == (256,)


@pytest.mark.parametrize(
    ("n_buckets", "says"),
    [
        (7, "n_buckets=7: it must be an even number ≥ 2 .*; use 8 or None"),
        (0, "n_buckets=0: it must be .*; use 2 or None"),
        ((4, 5), r"n_buckets=\(4, 5\): each factor must be an even number ≥ 2 .*; use"),
        (2**31, "n_buckets=2147483648: more than 2147483646 buckets; use fewer"),
    ],
)
def test_a_wrong_count_is_a_value_error_that_names_value_rule_and_mend(
    n_buckets: buckets.Buckets, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        buckets.check(n_buckets)


def test_the_mend_of_a_wrong_factor_is_itself_a_right_count() -> None:
    with pytest.raises(ValueError, match=r"use \(4, 6\) or None"):
        buckets.check((4, 5))


@pytest.mark.parametrize(
    "n_buckets",
    [(), (8,), (2, 4, 6), [4, 6], [8], 8.0, float("nan"), True, "8", (4, 6.0), (True, 4), ((2, 2), 4)],
    ids=str,
)
def test_what_is_neither_an_int_nor_two_is_a_value_error_too(n_buckets: Any, unchecked: None) -> None:
    rule = "must be an int or a tuple of two; use one even number .*, or give a tuple of two even factors"
    for check in (buckets.check, partial(buckets.check_power_of_two, family="any")):
        with pytest.raises(ValueError, match=f"{re.escape(f'n_buckets={n_buckets!r}')}: {rule}"):
            check(n_buckets)
