"""The workload that measures hash families alone, against loops over single queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.record import Measurement
from harness.workloads.hashing import balance, collision_curve, fresh_queries, recall
from harness.workloads.session import open_session
from reformer import CrossPolytope, HadamardCrossPolytope, HashFamily, Hyperplane, Random, Syndrome
from reformer.attention.options import LSHOptions
from reformer.attention.rotary import rotate
from tests.harness.specs import trial_spec

WORKLOAD = {"_target_": "harness.workloads.hashing.Hashing", "points": 5, "draws": 3000, "sequences": 2}
BALANCE = ("bucket_max_over_mean", "bucket_entropy_bits")


def measured(workload: dict[str, Any] | None = None, **settings: Any) -> Measurement:
    spec = trial_spec(workload={**WORKLOAD, **(workload or {})}, **settings)
    return spec.workload(spec, progress=lambda _: None)


def values(measurement: Measurement, metric: str) -> tuple[float, ...]:
    (sample,) = (sample for sample in measurement.samples if sample.metric == metric)
    assert not sample.at
    return sample.values


def curve_of(family: HashFamily, *, draws: int = 20_000, **settings: Any) -> dict[str, list[float]]:
    defaults: dict[str, Any] = {"n_buckets": 8, "dim": 6, "points": 5}
    return collision_curve(
        family, **(defaults | settings), draws=draws, generator=torch.Generator().manual_seed(3)
    )


def test_a_trial_has_a_curve_and_one_value_a_hash_seed() -> None:
    measurement = measured()
    assert measurement.outcome.status == "ok"
    assert measurement.theory == {"distance": "angle", "n_buckets": "4", "d_head": 8.0}
    assert {len(column) for column in measurement.series["collision"].values()} == {5}
    assert [sample.metric for sample in measurement.samples] == ["recall", *BALANCE]
    for metric in ("recall", *BALANCE):
        one, other = values(measurement, metric)
        assert one != other


def test_the_same_spec_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    one = measured()
    torch.manual_seed(2)
    assert measured() == one
    assert measured(seed=1).series != one.series
    assert values(measured(seed=1), "recall") != values(one, "recall")


def test_a_factorised_count_is_told_by_its_factors() -> None:
    assert measured(attention__n_buckets=[2, 4]).theory["n_buckets"] == "2×4"


@pytest.mark.parametrize("family", [CrossPolytope(), Hyperplane(), Syndrome(), Random()], ids=str)
def test_the_measured_curve_is_the_predicted_one(family: HashFamily) -> None:
    curve = curve_of(family)
    assert curve["distance"][0] == 0
    assert curve["distance"][-1] == (math.pi if family.distance == "angle" else 1.0)
    for rate, expected in zip(curve["rate"], curve["theory"], strict=True):
        assert abs(rate - expected) <= 4 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-9


def test_the_standard_error_is_that_of_a_share() -> None:
    curve = curve_of(Random(), n_buckets=2, draws=2500)
    assert curve["standard_error"] == pytest.approx([math.sqrt(0.25 / 2500)] * 5, rel=0.01)


def test_without_a_closed_form_there_is_no_theory() -> None:
    assert curve_of(HadamardCrossPolytope()).keys() == {"distance", "rate", "standard_error"}


def test_a_family_whose_buckets_depend_on_the_sequence_has_no_curve() -> None:
    measurement = measured(
        hashing={"_target_": "reformer.hashing.CrossPolytope", "data_rotation": True},
        attention__causality="bucket",
    )
    assert measurement.series == {}
    assert len(values(measurement, "recall")) == 2


def test_layers_without_shared_queries_and_keys_have_a_curve_and_no_recall() -> None:
    measurement = measured(model__layers=["local"], attention__kind="local")
    assert measurement.samples == ()
    assert measurement.series.keys() == {"collision"}


def test_queries_are_those_of_every_layer_of_a_fresh_model() -> None:
    session = open_session(trial_spec(model__layers=["local", "lsh"], model__n_layers=4))
    found = fresh_queries(session, sequences=2)
    assert {layer: qk.shape for layer, qk in found.items()} == {1: (2, 2, 32, 8), 3: (2, 2, 32, 8)}
    assert not any(module._forward_hooks for module in session.model.modules())
    assert not any(module._forward_pre_hooks for module in session.model.modules())


def test_queries_are_the_projections_of_the_normed_embedding() -> None:
    session = open_session(trial_spec())
    model, (block,) = session.model, session.model.blocks
    batch = session.spec.task.training_batch(seed=0, step=0, batch_size=2)
    x = model.embedding(torch.from_numpy(batch.tokens)) + model.positions(32)
    expected = block.attention.query_key(block.attention_norm(x)).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(fresh_queries(session, sequences=2)[0], expected)


def test_queries_are_turned_by_their_position_where_the_model_turns_them() -> None:
    session = open_session(trial_spec(model__positions="rotary"))
    model, (block,) = session.model, session.model.blocks
    batch = session.spec.task.training_batch(seed=0, step=0, batch_size=2)
    x = model.embedding(torch.from_numpy(batch.tokens))
    flat = block.attention.query_key(block.attention_norm(x)).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(fresh_queries(session, sequences=2)[0], rotate(flat))


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
    assert recall(qk, ids, options=options) == pytest.approx(strict_recall(qk, ids, band=4), abs=1e-5)


def test_all_is_found_in_one_large_bucket_and_nothing_in_buckets_of_one() -> None:
    qk, options = some_queries(), LSHOptions(n_hashes=1, chunk_length=64)
    assert recall(qk, torch.zeros(2, 3, 1, 37, dtype=torch.int64), options=options) == pytest.approx(1)
    assert recall(qk, torch.arange(37).expand(2, 3, 1, 37), options=options) == pytest.approx(0)


def test_a_family_of_neighbours_finds_more_than_chance() -> None:
    families = ("CrossPolytope", "Random")
    found = [
        sum(values(measured(hashing={"_target_": f"reformer.hashing.{name}"}), "recall")) for name in families
    ]
    assert found[0] > 1.1 * found[1]


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


@pytest.mark.parametrize("wrong", [{"points": 1}, {"draws": 0}, {"sequences": 0}])
def test_a_wrong_setting_is_refused(wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"workload\.{name}={value}: must be at least"):
        measured(wrong)
