import math

import numpy as np
import pytest

from harness.statistics import (
    bootstrap_interval,
    from_first,
    paired_interval,
    t_interval,
    t_quantile,
)


def test_t_quantile_is_the_tabulated_one():
    assert t_quantile(0.95, degrees=1) == pytest.approx(12.706, abs=1e-3)
    assert t_quantile(0.95, degrees=10) == pytest.approx(2.228, abs=1e-3)


def test_t_interval_of_a_known_sample():
    interval = t_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.n) == (2.0, 3)
    assert interval.high - interval.mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert interval.mean - interval.low == pytest.approx(interval.high - interval.mean)


@pytest.mark.parametrize("function", [t_interval, bootstrap_interval])
def test_one_value_has_a_mean_and_no_interval(function):
    interval = function([4.0])
    assert (interval.mean, interval.n) == (4.0, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("function", [t_interval, bootstrap_interval])
def test_no_value_has_neither(function):
    interval = function([])
    assert interval.n == 0
    assert math.isnan(interval.mean)


def test_bootstrap_is_seeded():
    values = np.random.default_rng(3).normal(size=12)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_bootstrap_of_equal_values_is_a_point():
    interval = bootstrap_interval([0.3] * 5)
    assert interval.low == interval.high == pytest.approx(0.3)


@pytest.mark.parametrize("n", [2, 5, 8, 12])
def test_bootstrap_holds_what_it_promises_on_few_pairs(n):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = bootstrap_interval(rng.normal(loc=2.0, size=n), resamples=1000)
        covered += interval.low <= 2.0 <= interval.high
    # Without the widening of the tails it is about 89 % at eight, 50 % at two.
    assert 0.92 <= covered / 400 <= 0.985


def test_bootstrap_of_many_values_agrees_with_t():
    values = np.random.default_rng(1).normal(size=20_000)
    boot, student = bootstrap_interval(values), t_interval(values)
    assert boot.low == pytest.approx(student.low, abs=0.002)
    assert boot.high == pytest.approx(student.high, abs=0.002)


def test_pairing_takes_out_what_both_sides_share():
    shared = np.array([0.0, 100.0, -50.0, 7.0])
    interval = paired_interval(shared + np.array([1.0, 1.1, 0.9, 1.0]), shared)
    assert interval.mean == pytest.approx(1.0)
    assert interval.high - interval.low < 0.3


def test_sides_of_unequal_length_are_no_pairs():
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        paired_interval([1.0, 2.0, 3.0], [1.0, 2.0])


def test_differences_from_the_first_column_ignore_differences_between_rows():
    table = np.array([[10.0, 12.0], [110.0, 112.0], [60.0, 62.0]])
    means, low, high = from_first(table)
    assert means == pytest.approx([60.0, 62.0])
    assert (low[1], high[1]) == pytest.approx((62.0, 62.0))


def test_a_column_that_stays_put_has_a_narrow_interval_beside_one_that_does_not():
    table = np.array([[0.0, 0.1, 1.0], [0.0, -0.1, 9.0], [0.0, 0.0, 5.0]])
    _, low, high = from_first(table)
    assert high[1] - low[1] < 0.6
    assert high[2] - low[2] > 10


def test_the_first_column_and_a_single_row_have_no_interval():
    _, low, high = from_first(np.array([[1.0, 2.0], [2.0, 3.0]]))
    assert np.isnan([low[0], high[0]]).all()
    means, low, high = from_first(np.array([[1.0, 2.0]]))
    assert list(means) == [1.0, 2.0]
    assert np.isnan([low, high]).all()
