"""The Triton kernels, interpreted on the CPU, held to the dense twin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import lsh_attention
from reformer.attention import reference
from reformer.kernels import rounds
from tests.reformer.helpers import assert_all_close, pairwise, value_and_gradients
from tests.reformer.kernels.union_cases import BATCH, FACTORS, HEADS, ROW, inputs

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled here, see test_on_cuda.py", allow_module_level=True)

#: Not bfloat16, whose bits the interpreter multiplies as integers.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3}


@pytest.mark.parametrize("row", pairwise(FACTORS))
def test_values_and_gradients_are_those_of_the_dense_twin(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "TOGETHER", 1 if row["seq"] == 16 else rounds.TOGETHER)
    qk, v, settings = inputs(row)
    expected = value_and_gradients(reference.lsh_attention, qk, v, **settings)
    assert_all_close(
        value_and_gradients(lsh_attention, qk, v, backend="triton", **settings), expected, tolerance=1e-12
    )


@pytest.mark.parametrize(("chunk_length", "seq"), [(33, 80), (64, 150)])
def test_longer_tiles_than_the_shortest(chunk_length: int, seq: int) -> None:
    row = {**ROW, "mode": "published", "duplicates": "count", "chunk_length": chunk_length, "seq": seq}
    qk, v, settings = inputs(row)
    expected = value_and_gradients(reference.lsh_attention, qk, v, **settings)
    assert_all_close(
        value_and_gradients(lsh_attention, qk, v, backend="triton", **settings), expected, tolerance=1e-12
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_narrow_types_stay_near_the_twin_in_float64(dtype: torch.dtype) -> None:
    qk, v, settings = inputs(ROW, dtype=dtype)
    wide = [x.detach().double() for x in (qk, v)]
    expected = value_and_gradients(reference.lsh_attention, *wide, **settings)
    found = value_and_gradients(lsh_attention, qk, v, backend="triton", **settings)
    assert {x.dtype for x in found} == {dtype}
    assert_all_close(found, expected, tolerance=TOLERANCE[dtype])


def test_codes_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_NARROW", 1)
    qk, v, settings = inputs({**ROW, "mode": "strict", "seq": 16, "padding": "none"})
    expected = value_and_gradients(reference.lsh_attention, qk, v, **settings)
    assert_all_close(
        value_and_gradients(lsh_attention, qk, v, backend="triton", **settings), expected, tolerance=1e-12
    )


def test_padding_may_hold_anything() -> None:
    qk, v, settings = inputs({**ROW, "seq": 16})
    upstream = torch.ones(BATCH, HEADS, 16, v.shape[-1], dtype=v.dtype)
    upstream.masked_fill_(~settings["padding_mask"][:, None, :, None], torch.nan)
    out = lsh_attention(qk, v, backend="triton", **settings)
    for gradient in torch.autograd.grad(out, (qk, v), upstream):
        assert bool(gradient.isfinite().all())


def test_given_buckets_are_left_alone_and_may_be_any_integers() -> None:
    qk, v, settings = inputs({**ROW, "seq": 16})
    before = settings["buckets"].clone()
    out = lsh_attention(qk, v, backend="triton", **settings)
    assert torch.equal(settings["buckets"], before)
    settings["buckets"] = before * 2**60 - 2**61
    assert torch.equal(lsh_attention(qk, v, backend="triton", **settings), out)


# Dropout.


def dropped(qk: Tensor, v: Tensor, *, seed: int, **settings: Any) -> Tensor:
    torch.manual_seed(seed)
    out: Tensor = lsh_attention(qk, v, dropout_p=0.4, backend="triton", **settings)
    return out


def test_backward_drops_what_forward_dropped() -> None:
    qk, v, settings = inputs({**ROW, "mode": "strict", "seq": 9})
    assert torch.autograd.gradcheck(lambda qk, v: dropped(qk, v, seed=3, **settings), (qk, v), fast_mode=True)


def test_a_pair_is_dropped_whole_or_kept() -> None:
    qk, _, settings = inputs({**ROW, "mode": "strict", "duplicates": "count", "padding": "none"})
    seq = qk.shape[2]
    one_hot = torch.eye(seq, dtype=qk.dtype).expand(BATCH, HEADS, seq, seq)
    with torch.no_grad():
        kept = dropped(qk, one_hot, seed=2, **settings)
        other = dropped(qk, one_hot, seed=4, **settings)
        full = lsh_attention(qk, one_hot, **settings)
    ratio = (kept / full)[full > 1e-12]
    # The kernel's dropout is a float32.
    assert bool(((ratio < 1e-9) | ((ratio - 1 / 0.6).abs() < 1e-6)).all())
    assert 0.3 < float((ratio < 1e-9).double().mean()) < 0.5
    assert not torch.equal(kept, other)


def test_it_can_be_differentiated_twice() -> None:
    qk, v, settings = inputs({**ROW, "seq": 5})
    function = lambda qk, v: lsh_attention(qk, v, backend="triton", **settings)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (qk, v), fast_mode=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(dropped(qk, v, seed=0, **settings).sum(), qk, create_graph=True)


# Compiled, though not run.


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What Triton makes of the launches for an H100, in a process that does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.reformer.kernels.compiled", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


#: Shared memory that a program of an H100 can have.
LARGEST_SHARED = 227 * 1024


def test_it_compiles_for_an_h100_and_stays_in_registers() -> None:
    programs = compiled("bfloat16", "64", "64")
    assert [program["name"] for program in programs] == ["_forward", "_delta", "_backward"]
    for program in programs:
        assert program["shared_bytes"] <= LARGEST_SHARED
        assert program["stack_bytes"] <= 64
        assert program["uses_matrix_units"] == (program["name"] != "_delta")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "largest_stack"),
    [
        (("bfloat16", "128", "64"), 64),
        (("float16", "32", "32", "--mode", "published", "--n-hashes", "3"), 0),
        (("float32", "64", "64"), 64),
        (("float32", "64", "64", "--tf32"), 64),
        (("bfloat16", "256", "100", "--mode", "both ways"), 64),
        (("bfloat16", "64", "64", "--dropout", "0.1", "--mode", "published"), 128),
    ],
)
def test_other_launches_compile_too(arguments: tuple[str, ...], largest_stack: int) -> None:
    for program in compiled(*arguments):
        assert program["shared_bytes"] <= LARGEST_SHARED
        assert program["stack_bytes"] <= largest_stack
