import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.metrics import columns, floor, memory, quality, time
from harness.record import Outcome, Sample, TrialRecord
from tests.harness import factory


def bare(*samples, **fields):
    return TrialRecord(
        **{
            "trial_id": "0" * 12,
            "experiment": "default",
            "cell": {},
            "code": "c",
            "spec": {},
            "outcome": Outcome(status="ok"),
            "samples": samples,
            **fields,
        }
    )


def sums(correct, scored, nll, **at):
    return (
        Sample(metric="correct", unit="tokens", values=(correct,), at=at),
        Sample(metric="scored", unit="tokens", values=(scored,), at=at),
        Sample(metric="nll_nats", unit="nats", values=(nll,), at=at),
    )


class TestFloor:
    def layer(self, *, rates=(1e9, 2e9), flops=(2e9, 6e9), times=(2.0, 4.0)):
        forward, backward = times
        return bare(
            Sample(metric="gemm_flop_per_s", unit="flop/s", values=rates),
            Sample(metric="floor_flops", unit="flop", values=(flops[0],), phase="forward"),
            Sample(metric="floor_flops", unit="flop", values=(flops[1],), phase="backward"),
            Sample(metric="forward_s", unit="s", values=(forward,)),
            Sample(metric="backward_s", unit="s", values=(backward,)),
            Sample(metric="step_s", unit="s", values=(forward + backward,)),
        )

    def test_products_at_the_best_rate_and_their_share_of_the_time(self):
        assert floor.columns(self.layer()) == {
            "gemm_flop_per_s": 2e9,
            "floor_s": 4.0,
            "floor_s.forward": 1.0,
            "floor_s.backward": 3.0,
            "share_of_floor.forward": 0.5,
            "share_of_floor.backward": 0.75,
            "share_of_floor": 4 / 6,
        }

    def test_the_warm_up_is_no_part_of_the_time(self):
        record = self.layer()
        times = Sample(metric="step_s", unit="s", values=(90.0, 40.0, 8.0, 8.0, 8.0, 8.0))
        record = replace(record, samples=(*record.samples[:-1], times))
        assert floor.columns(record)["share_of_floor"] == 0.5

    def test_without_a_rate_or_products_there_is_no_floor(self):
        assert floor.columns(self.layer(rates=())) == {}
        assert floor.columns(replace(self.layer(), samples=self.layer().samples[:2])) == {}
        untimed = replace(self.layer(), samples=self.layer().samples[:3])
        assert set(floor.columns(untimed)) == {
            "gemm_flop_per_s", "floor_s", "floor_s.forward", "floor_s.backward"
        }  # fmt: skip

    def test_its_samples_are_no_columns_of_their_own(self):
        assert "floor_flops.forward" not in columns(self.layer())
        assert columns(self.layer())["share_of_floor"] == 4 / 6


class TestQuality:
    def test_ratios_of_the_sums(self):
        found = quality.columns(bare(*sums(30.0, 40.0, 20.0)))
        assert found == {"accuracy": 0.75, "loss": 0.5}

    def test_bits_per_byte_only_where_the_task_says_so(self):
        record = bare(*sums(30.0, 40.0, 20.0), theory={"quality": "bits_per_byte"})
        assert quality.columns(record)["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
        assert quality.quality_of(record) == "bits_per_byte"
        assert quality.quality_of(bare()) == "accuracy"
        assert quality.quality_of(bare(theory={"quality": "vibes"})) == "accuracy"

    @pytest.mark.parametrize(
        ("losses", "steps"),
        [
            ([3.0] * 7 + [0.2] * 5, 8),
            ([3.0, 0.2, 0.2, 0.2, 0.2, 3.0] + [0.2] * 6, 7),  # once is no row
            ([0.24] * 4, None),
            ([0.25] * 20, None),  # a tenth of ln 11 is 0.2398
            ([], None),
        ],
    )
    def test_a_task_is_solved_and_after_so_many_steps(self, losses, steps):
        record = bare(
            *sums(90.0, 100.0, 20.0), series={"train": {"loss": losses}}, theory={"chance_accuracy": 1 / 11}
        )
        found = quality.columns(record)
        assert found["solved"] == 1
        assert found.get("steps_to_solved") == steps
        poor = replace(record, samples=sums(89.9, 100.0, 20.0))
        assert quality.columns(poor)["solved"] == 0

    def test_hash_seeds_are_pooled_by_their_sums(self):
        record = bare(
            *sums(10.0, 10.0, 1.0, n_hashes=4, hash_seed=0), *sums(0.0, 30.0, 1.0, n_hashes=4, hash_seed=1)
        )
        assert quality.columns(record)["accuracy@n_hashes=4"] == 0.25
        assert quality.by_hash_seed(record) == {"accuracy@n_hashes=4": (1.0, 0.0)}

    def test_one_hash_seed_has_no_spread(self):
        assert quality.by_hash_seed(bare(*sums(1.0, 2.0, 1.0, attention="random", hash_seed=0))) == {}

    def test_nothing_scored_is_no_accuracy(self):
        assert quality.columns(bare(*sums(0.0, 0.0, 0.0))) == {}

    def test_final_loss_from_the_curve_else_from_the_checksum(self):
        curve = {"train": {"step": [1.0, 2.0], "loss": [3.0, 2.5]}}
        assert quality.columns(bare(series=curve))["final_loss"] == 2.5
        assert (
            quality.columns(bare(outcome=Outcome(status="ok", checksum=(1.25).hex())))["final_loss"] == 1.25
        )
        assert "final_loss" not in quality.columns(bare())

    def test_floors_are_columns_unless_null(self):
        found = quality.columns(bare(theory={"chance_accuracy": 0.1, "majority_accuracy": None}))
        assert found == {"chance_accuracy": 0.1}


class TestTime:
    @given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.99]))
    def test_quantiles_are_those_of_numpy(self, values, q):
        assert time.quantile(sorted(values), q) == float(np.quantile(values, q))
        assert time.median(values) == float(np.median(values))

    def test_a_quantile_of_what_is_no_number_is_none(self):
        assert math.isnan(time.quantile([1.0, math.nan], 0.9))
        assert math.isnan(time.median([math.nan, 1.0, 2.0]))

    def test_warm_up_is_left_out(self):
        values = (9.0, 5.0, *[1.0, 1.1, 0.9, 1.0] * 5)
        assert list(time.after_warm_up(values)) == list(values[2:])

    def test_a_steady_series_is_kept_but_for_chance(self):
        values = np.random.default_rng(0).normal(loc=1.0, scale=0.01, size=100)
        assert len(time.after_warm_up(values)) >= 98

    def test_at_most_half_is_warm_up(self):
        falling = tuple(float(value) for value in range(20, 0, -1))
        assert len(time.after_warm_up(falling)) == 10

    def test_few_values_are_all_kept(self):
        assert time.after_warm_up((9.0, 1.0, 1.0)) == (9.0, 1.0, 1.0)

    def test_throughput_is_tokens_by_the_median_step(self):
        record = bare(
            Sample(metric="step_s", unit="s", values=(0.5,) * 9),
            Sample(metric="tokens_per_step", unit="tokens", values=(100.0,)),
        )
        assert time.columns(record) == {
            "tokens_per_s": 200.0,
            "step_s": 0.5,
            "step_s.p90": 0.5,
            "step_s.p99": 0.5,
        }


class TestMemory:
    def test_the_peak_is_the_highest_phase(self):
        phases = (("forward", 5.0), ("backward", 9.0), ("optimizer", 2.0))
        record = bare(
            *(Sample(metric="peak_alloc_bytes", unit="bytes", values=(v,), phase=p) for p, v in phases),
            Sample(metric="saved_bytes", unit="bytes", values=(3.0,)),
        )
        assert memory.columns(record) == {
            "peak_alloc_bytes": 9.0,
            "saved_bytes": 3.0,
            "peak_alloc_bytes.forward": 5.0,
            "peak_alloc_bytes.backward": 9.0,
            "peak_alloc_bytes.optimizer": 2.0,
        }


def test_unknown_quantities_become_columns_by_their_median():
    record = bare(
        Sample(metric="recall", unit="ratio", values=(0.1, 0.9, 0.3), at={"n_hashes": 2, "hash_seed": 0}),
        Sample(metric="recall", unit="ratio", values=(0.2, 0.4), at={"n_hashes": 2, "hash_seed": 1}),
        Sample(metric="sort_s", unit="s", values=(1.0, 3.0), phase="forward"),
        Sample(metric="empty", unit="s", values=()),
    )
    assert columns(record) == {"sort_s.forward": 2.0, "recall@n_hashes=2": 0.3}


def test_a_whole_record_has_every_column_of_the_contract():
    found = columns(factory.record({"seed": 0}))
    wanted = """
        accuracy loss final_loss chance_accuracy majority_accuracy parameters flops operators
        accuracy@n_hashes=1 accuracy@n_hashes=8
        accuracy@attention=full accuracy@attention=random accuracy@attention=knock_out
        peak_alloc_bytes peak_alloc_bytes.backward peak_rss_bytes saved_bytes
        tokens_per_s step_s forward_s backward_s optimizer_s step_s.p90 step_s.p99
    """
    assert set(wanted.split()) <= found.keys()
    assert not {"correct", "scored", "nll_nats"} & found.keys()
    names = list(found)
    assert names.index("accuracy@n_hashes=1") > max(names.index(name) for name in names if "@" not in name)


def test_a_failed_record_has_no_columns():
    assert columns(factory.failed(factory.record({"seed": 0}))) == {}


def test_values_that_are_not_numbers_stay_visible():
    record = replace(factory.record({"seed": 0}), samples=sums(math.nan, 10.0, math.inf))
    found = columns(record)
    assert math.isnan(found["accuracy"])
    assert found["loss"] == math.inf
