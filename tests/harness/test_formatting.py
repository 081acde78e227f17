import math

import pytest

from harness import formatting
from harness.metrics.catalogue import describe


@pytest.mark.parametrize(
    ("column", "number", "text"),
    [
        ("accuracy", 0.9344, "93.4 %"),
        ("peak_alloc_bytes.forward", 12.5 * 2**20, "12.5 MiB"),
        ("peak_alloc_bytes", 3 * 2**30, "3,072 MiB"),
        ("step_s", 0.01234, "12.3 ms"),
        ("step_s", 2.5, "2.50 s"),
        ("tokens_per_s", 12345.6, "12,346 /s"),
        ("flops", 3.2e9, "3.20 GFLOP"),
        ("operators", 1234.0, "1,234"),
        ("bits_per_byte", 2.71828, "2.718"),
        ("agreement", 0.5, "0.500"),
        ("accuracy", math.nan, "–"),
        ("step_s", math.inf, "∞"),
        ("step_s", 0.0, "0 ms"),
    ],
)
def test_values_carry_their_unit(column, number, text):
    assert formatting.value(number, metric=describe(column)) == text


@pytest.mark.parametrize(
    ("number", "scale", "text"),
    [
        (8.31, "points", "+8.3 points"),
        (-0.04, "points", "0.0 points"),
        (-2.0, "points", "−2.0 points"),
        (math.log(2.6), "log_ratio", "2.6×"),
        (math.log(1.29), "log_ratio", "1.29×"),
        (math.log(25), "log_ratio", "25.0×"),
        (math.log(250), "log_ratio", "250×"),
        (-0.116, "absolute", "−0.116"),
        (math.nan, "points", "–"),
    ],
)
def test_effects_in_the_words_of_their_scale(number, scale, text):
    assert formatting.effect(number, scale=scale) == text


def test_intervals_stand_in_brackets_or_not_at_all():
    assert formatting.interval(7.1, 9.4, scale="points") == "[+7.1, +9.4]"
    assert formatting.interval(math.log(2.5), math.log(2.7), scale="log_ratio") == "[2.5, 2.7]"
    assert formatting.interval(math.nan, math.nan, scale="points") == ""


@pytest.mark.parametrize(
    ("number", "text"), [(42.0, "42 s"), (600.0, "10 min"), (7300.0, "2 h 02 min"), (math.nan, "–")]
)
def test_durations(number, text):
    assert formatting.duration(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.00001, "1.00e−05"), (0.0123, "0.0123"), (123456.7, "123,457"), (-5.0, "−5.00")]
)
def test_three_digits_that_count(number, text):
    assert formatting.significant(number) == text


def test_any_text_becomes_one_printable_line():
    assert formatting.plain("a\nb\x1b[31m\x00") == "a\\nb\\x1b[31m\\x00"
    assert formatting.plain("é × 中 😀") == "é × 中 😀"
    assert formatting.plain("\ud800") == "\\ud800"
    assert formatting.plain("\u202e") == "\\u202e"
    assert formatting.plain("x" * 50, limit=10) == "x" * 9 + "…"


def test_a_setting_on_one_line():
    levels = {"attention.n_hashes": "4", "model.residual": "plain"}
    assert formatting.cell_label(levels) == "n_hashes\xa04 · residual\xa0plain"
