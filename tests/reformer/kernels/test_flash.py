"""The tiled path: types, and how it is cut."""

from __future__ import annotations

import pytest
import torch

from reformer import lsh_attention
from reformer.attention import reference
from reformer.kernels import flash
from tests.reformer.helpers import assert_all_close, value_and_gradients
from tests.reformer.kernels.test_union import FACTORS, ROW, TOLERANCE, inputs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", FACTORS["mode"])
@pytest.mark.parametrize("duplicates", FACTORS["duplicates"])
def test_narrow_types_stay_near_the_twin_in_float64(mode: str, duplicates: str, dtype: torch.dtype) -> None:
    qk, v, settings = inputs({**ROW, "mode": mode, "duplicates": duplicates}, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (qk, v)]
    expected = value_and_gradients(reference.lsh_attention, *wide, **settings)
    found = value_and_gradients(lsh_attention, qk, v, backend="flash", **settings)
    assert {x.dtype for x in found} == {dtype}
    assert_all_close(found, expected, tolerance=TOLERANCE[dtype])


def test_how_it_is_cut_changes_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    qk, v, settings = inputs(ROW)
    whole = value_and_gradients(lsh_attention, qk, v, backend="flash", **settings)
    monkeypatch.setattr(flash, "ROWS", 1)
    assert_all_close(
        value_and_gradients(lsh_attention, qk, v, backend="flash", **settings), whole, tolerance=1e-14
    )


def test_codes_beyond_what_floats_hold_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are float64: with float32 they would merge."""
    row = {**ROW, "mode": "strict", "padding": "none"}
    qk, v, settings = inputs(row, dtype=torch.float32)
    expected = value_and_gradients(lsh_attention, qk, v, backend="flash", **settings)
    monkeypatch.setattr(flash, "_EXACT", {torch.float32: 1, torch.float64: 2**53})
    assert_all_close(
        value_and_gradients(lsh_attention, qk, v, backend="flash", **settings), expected, tolerance=1e-6
    )
