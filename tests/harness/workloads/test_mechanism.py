"""Why attention by hashing is as good as it is, against loops over single queries and planted faults."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from harness.workloads.mechanism import (
    UNITS,
    balance,
    causality_leak,
    hashing_samples,
    layer_series,
    model_samples,
    output_error,
    projections,
    recall,
)
from harness.workloads.session import Session, open_session
from reformer import ReformerLM
from reformer.attention.options import LSHOptions
from reformer.attention.rotary import rotate
from tests.harness.specs import trial_spec


def some_tokens(session: Session, *, rows: int = 2) -> Tensor:
    batch = session.spec.task.training_batch(seed=0, step=0, batch_size=rows)
    return torch.from_numpy(batch.tokens)


def opened(**settings: object) -> tuple[ReformerLM, Tensor, Tensor]:
    """A fresh model in eval mode, tokens, and targets."""
    session = open_session(trial_spec(**settings))
    batch = session.spec.task.training_batch(seed=0, step=0, batch_size=2)
    session.model.eval()
    return session.ours, torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)


# What layers are looked at


def test_queries_are_those_of_every_layer_that_shares_them() -> None:
    session = open_session(trial_spec(model__layers=["local", "lsh"], model__n_layers=4))
    found = projections(session.ours, some_tokens(session))
    shapes = {layer: (qk.shape, v.shape) for layer, (qk, v) in found.items()}
    assert shapes == dict.fromkeys((1, 3), ((2, 2, 32, 8), (2, 2, 32, 8)))
    assert not any(module._forward_hooks for module in session.model.modules())
    assert not any(module._forward_pre_hooks for module in session.model.modules())
    assert session.model.training


def test_queries_are_the_projections_of_the_normed_embedding() -> None:
    session = open_session(trial_spec())
    model, (block,), tokens = session.ours, session.ours.blocks, some_tokens(session)
    x = model.embedding(tokens) + model.positions(32)
    expected = block.attention.query_key(block.attention_norm(x)).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(projections(model, tokens)[0][0], expected)


def test_queries_are_turned_by_their_position_where_the_model_turns_them() -> None:
    session = open_session(trial_spec(model__positions="rotary"))
    model, (block,), tokens = session.ours, session.ours.blocks, some_tokens(session)
    flat = block.attention.query_key(block.attention_norm(model.embedding(tokens)))
    expected = rotate(flat.unflatten(-1, (2, 8)).transpose(1, 2))
    torch.testing.assert_close(projections(model, tokens)[0][0], expected)


def test_each_quantity_has_a_value_a_hash_seed_and_a_model_that_cannot_hash_has_none() -> None:
    model, tokens, _ = opened()
    samples = hashing_samples(model, tokens, hash_seeds=(0, 1, 2))
    assert {sample.metric: sample.unit for sample in samples} == dict(UNITS)
    assert {len(sample.values) for sample in samples} == {3}
    local, tokens, _ = opened(model__layers=["local"], attention__kind="local")
    assert hashing_samples(local, tokens, hash_seeds=(0,)) == ()


# Recall


def some_queries(*, seq: int = 37) -> Tensor:
    return 3 * torch.randn(2, 3, seq, 5, generator=torch.Generator().manual_seed(1))


def some_ids(rounds: int, *, seq: int = 37, count: int = 3) -> Tensor:
    return torch.randint(count, (2, 3, rounds, seq), generator=torch.Generator().manual_seed(2))


def strict_recall(qk: Tensor, ids: Tensor, *, band: int) -> float:
    """The slow twin: of each query the keys before it, and of each round the last few of its own bucket."""
    shares = []
    batch, heads, rounds, seq = ids.shape
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(1, seq)):
        keys = qk[b, h, :i] / qk[b, h, :i].norm(dim=-1, keepdim=True)
        weights = (keys @ qk[b, h, i]).softmax(dim=0)
        shown: set[int] = set()
        for r in range(rounds):
            shown |= {*[j for j in range(i) if ids[b, h, r, j] == ids[b, h, r, i]][-band:]}
        shares.append(float(weights[sorted(shown)].sum()))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("rounds", [1, 2])
def test_recall_is_the_weight_of_full_attention_on_visible_keys(rounds: int) -> None:
    qk, ids = some_queries(), some_ids(rounds)
    options = LSHOptions(n_hashes=rounds, chunk_length=4)
    assert recall(qk, ids, options=options).shown == pytest.approx(strict_recall(qk, ids, band=4), abs=1e-5)


def test_all_is_found_in_one_large_bucket_and_nothing_in_buckets_of_one() -> None:
    qk, options = some_queries(), LSHOptions(n_hashes=1, chunk_length=64)
    assert recall(qk, torch.zeros(2, 3, 1, 37, dtype=torch.int64), options=options).shown == pytest.approx(1)
    assert recall(qk, torch.arange(37).expand(2, 3, 1, 37), options=options).shown == pytest.approx(0)


WINDOWS = [
    pytest.param(
        {"causality": causality, "seams": seams, "n_hashes": rounds}, id=f"{causality}-{seams}-{rounds}"
    )
    for causality, seams, rounds in (
        ("strict", "masked", 2),
        ("bucket", "masked", 2),
        ("published", "masked", 1),
        ("published", "reference", 3),
    )
]


def where_weights_go(qk: Tensor, ids: Tensor, *, options: LSHOptions) -> list[float]:
    """The slow twin: of each pair, whether and why it is not shown, from the definitions."""
    batch, heads, rounds, seq = ids.shape
    length = options.chunk_length
    # Strict: a band of equal length for all. Windows of chunks: as far as the last query of a chunk sees.
    reach = options.n_chunks_before * length + (0 if options.strict else length - 1)
    chunks = -(-seq // length)
    parts, queries = [0.0] * 5, 0
    for b, h in product(range(batch), range(heads)):
        order = [sorted(range(seq), key=lambda j: (int(ids[b, h, r, j]), j)) for r in range(rounds)]
        slot = [{j: n for n, j in enumerate(order[r])} for r in range(rounds)]
        chunk = [{j: slot[r][j] // length + r * chunks for j in range(seq)} for r in range(rounds)]
        for i in range(1, seq):
            keys = qk[b, h, : i + 1] / qk[b, h, : i + 1].norm(dim=-1, keepdim=True)
            scores = keys @ qk[b, h, i]
            scores[i] = -1e5
            weights = scores.softmax(dim=0)
            queries += 1
            for j in range(i + 1):
                same = [r for r in range(rounds) if ids[b, h, r, i] == ids[b, h, r, j]]
                near = [r for r in same if slot[r][i] - slot[r][j] <= reach]
                windows = {
                    (r, s): (chunk[r][i] - chunk[s][j]) % (chunks * rounds) <= options.n_chunks_before
                    for r, s in product(range(rounds), repeat=2)
                }
                inside = any(windows[r, r] and _no_wrap(chunk[r], i, j) for r in range(rounds))
                if options.strict:
                    shown = bool(near)
                elif options.causality == "bucket":
                    shown = any(windows[r, r] and _no_wrap(chunk[r], i, j) for r in same)
                else:
                    shown = any(windows.values()) if options.seams == "reference" else inside
                reasons = (
                    shown,
                    not shown and not same,
                    not shown and bool(same) and not near,
                    not shown and bool(near),
                    shown and options.seams == "reference" and not inside,
                )
                for part, reason in enumerate(reasons):
                    parts[part] += float(weights[j]) * reason
    return [part / queries for part in parts]


def _no_wrap(chunk: dict[int, int], i: int, j: int) -> bool:
    return chunk[i] >= chunk[j]


@pytest.mark.parametrize("settings", WINDOWS)
def test_what_is_not_shown_is_told_by_its_reason(settings: dict[str, object]) -> None:
    qk, ids = some_queries(seq=21), some_ids(int(str(settings["n_hashes"])), seq=21, count=4)
    options = LSHOptions(chunk_length=3, **settings)
    found = recall(qk, ids, options=options)
    assert list(found) == pytest.approx(where_weights_go(qk, ids, options=options), abs=1e-5)
    assert sum(found[:4]) == pytest.approx(1, abs=1e-5)


def test_each_loss_alone() -> None:
    qk = some_queries(seq=24)
    strict = LSHOptions(n_hashes=1, chunk_length=2)
    alone = recall(qk, torch.arange(24).expand(2, 3, 1, 24), options=strict)
    assert alone.hash_miss == pytest.approx(1)
    together = recall(qk, torch.zeros(2, 3, 1, 24, dtype=torch.int64), options=strict)
    assert together.overflow > 0.3
    assert (together.hash_miss, together.cut) == (0, 0)
    # In a window of chunks, the first token of a chunk sees fewer before it than the last one.
    bucket = LSHOptions(n_hashes=1, chunk_length=2, n_chunks_before=1, causality="bucket")
    cut = recall(qk, torch.zeros(2, 3, 1, 24, dtype=torch.int64), options=bucket)
    assert cut.cut > 0
    assert cut.hash_miss == 0


def test_only_windows_that_reach_into_other_rounds_gain_at_seams() -> None:
    qk, ids = some_queries(seq=24), some_ids(3, seq=24)
    common = {"n_hashes": 3, "chunk_length": 4, "causality": "published"}
    masked = recall(qk, ids, options=LSHOptions(**common, seams="masked"))
    reaching = recall(qk, ids, options=LSHOptions(**common, seams="reference"))
    assert masked.seam_gain == 0 < reaching.seam_gain
    assert reaching.shown - masked.shown == pytest.approx(reaching.seam_gain, abs=1e-5)


def test_the_output_is_exact_where_all_is_shown() -> None:
    qk, v = some_queries(), torch.randn(2, 3, 37, 5, generator=torch.Generator().manual_seed(5))
    whole, none = torch.zeros(2, 3, 1, 37, dtype=torch.int64), torch.arange(37).expand(2, 3, 1, 37)
    options = LSHOptions(n_hashes=1, chunk_length=64)
    assert output_error(qk, v, whole, options=options) < 1e-5
    assert output_error(qk, v, none, options=options) > 0.5


# The model


@pytest.mark.parametrize(("causality", "leaks"), [("strict", False), ("published", True)])
def test_only_published_windows_let_the_future_move_the_past(causality: str, leaks: bool) -> None:
    model, tokens, _ = opened(attention__causality=causality, attention__n_hashes=4)
    assert (causality_leak(model, tokens) > 0.2) == leaks
    if not leaks:
        assert causality_leak(model, tokens) == 0


@pytest.mark.parametrize(
    ("residual", "error", "cosine"),
    [("reversible", (1e-9, 1e-5), 0.999999), ("reversible_exact", (0.0, 0.0), 0.999999)],
)
def test_reversing_costs_rounding_and_exactly_nothing_on_a_grid(
    residual: str, error: tuple[float, float], cosine: float
) -> None:
    model, tokens, targets = opened(model__residual=residual, model__n_layers=3)
    found = {sample.metric: sample.values for sample in model_samples(model, tokens, targets)}
    assert error[0] <= found["reconstruction_error"][0] <= error[1]
    assert found["gradient_cosine"][0] > cosine
    by_layer = layer_series(model, tokens)["reconstruction"]
    assert by_layer["layer"] == [0, 1, 2]
    assert max(by_layer["error"]) == found["reconstruction_error"][0]


def test_what_is_kept_is_not_reconstructed() -> None:
    model, tokens, targets = opened()
    assert [sample.metric for sample in model_samples(model, tokens, targets)] == ["causality_leak"]
    assert layer_series(model, tokens) == {}


def test_a_trained_trial_tells_its_mechanism() -> None:
    spec = trial_spec(model__residual="reversible")
    measurement = spec.workload(spec, progress=lambda message: None)
    metrics = {sample.metric for sample in measurement.samples}
    assert {*UNITS, "causality_leak", "reconstruction_error", "gradient_cosine"} <= metrics
    assert measurement.series["reconstruction"]["layer"] == [0]


# Balance


@pytest.mark.parametrize(
    ("ids", "crowding", "entropy"),
    [([0, 1, 2, 3, 0, 1, 2, 3], 1.0, 2.0), ([2] * 8, 4.0, 0.0), ([0] * 4 + [1] * 4, 2.0, 1.0)],
)
def test_balance_of_a_round(ids: list[int], crowding: float, entropy: float) -> None:
    found = balance(torch.tensor(ids).expand(2, 3, 1, 8), n_buckets=(2, 2))
    assert found == (pytest.approx(crowding), pytest.approx(entropy))


def test_balance_is_a_mean_over_rounds() -> None:
    rounds = torch.tensor([[0] * 8, [0, 1] * 4]).expand(1, 1, 2, 8)
    assert balance(rounds, n_buckets=2) == (pytest.approx(1.5), pytest.approx(0.5))
