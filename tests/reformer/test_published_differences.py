"""The README's comparison with the published code, held to what it says."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reformer_pytorch")

from tests.benchmarks import published_differences as table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def numbers(cell: str) -> list[float]:
    return [float(text) for text in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", cell)]


def test_no_earlier_output_of_ours_moves_and_most_of_theirs_do() -> None:
    row = table.leak()
    assert numbers(row["ours"]) == [0, 0]
    for peer in ("transformers", "reformer-pytorch"):
        assert min(numbers(row[peer])) >= 50


def test_only_our_cache_decodes_what_the_parallel_pass_gives() -> None:
    row = table.decode()
    assert max(numbers(row["ours"])) < 1e-5
    assert max(numbers(row["transformers"])) > 0.01


def test_only_ours_comes_to_full_attention_with_many_rounds() -> None:
    row = table.rounds()
    assert numbers(row["ours"])[-1] < 0.02
    for peer in ("transformers", "reformer-pytorch"):
        assert numbers(row[peer])[-1] > 0.1


def test_only_ours_is_right_at_the_first_chunk_of_a_round() -> None:
    row = table.seams()
    assert max(numbers(row["ours"])) < 1e-3
    for peer in ("transformers", "reformer-pytorch"):
        first, elsewhere = numbers(row[peer])
        assert first > 0.5
        assert elsewhere < 1e-3


def test_only_our_chunked_feed_forward_keeps_less() -> None:
    row = table.feed_forward()
    whole, chunked = numbers(row["ours"])
    assert chunked < 0.01 * whole
    for peer in ("transformers", "reformer-pytorch"):
        whole, chunked = numbers(row[peer])
        assert chunked == whole


def test_only_ours_is_reproducible_and_leaves_the_stream_alone() -> None:
    assert table.reproducible()["ours"] == table.stream()["ours"] == "yes"
    assert table.reproducible()["transformers"].startswith("no")
    assert table.stream()["transformers"] == table.stream()["reformer-pytorch"] == "no"
