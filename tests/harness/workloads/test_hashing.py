"""The workload that measures hash families alone, against loops over single queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness.record import Measurement
from harness.workloads.hashing import collision_curve
from harness.workloads.mechanism import UNITS
from reformer import CrossPolytope, HadamardCrossPolytope, HashFamily, Hyperplane, Random, Syndrome
from tests.harness.specs import trial_spec

WORKLOAD = {"_target_": "harness.workloads.hashing.Hashing", "points": 5, "draws": 3000, "sequences": 2}


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
    assert [sample.metric for sample in measurement.samples] == list(UNITS)
    for metric in ("recall", "output_error", "bucket_max_over_mean", "bucket_entropy_bits"):
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


def test_a_family_of_neighbours_finds_more_than_chance() -> None:
    families = ("CrossPolytope", "Random")
    found = [
        sum(values(measured(hashing={"_target_": f"reformer.hashing.{name}"}), "recall")) for name in families
    ]
    assert found[0] > 1.1 * found[1]


@pytest.mark.parametrize("wrong", [{"points": 1}, {"draws": 0}, {"sequences": 0}])
def test_a_wrong_setting_is_refused(wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"workload\.{name}={value}: must be at least"):
        measured(wrong)
