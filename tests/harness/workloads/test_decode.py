"""Cached decoding as a trial."""

from __future__ import annotations

import pytest

from harness.record import Measurement
from tests.harness.specs import trial_spec

WORKLOAD = {"_target_": "harness.workloads.decode.Decode", "new_tokens": 4, "warmup_tokens": 1}


def measured(**settings: object) -> Measurement:
    spec = trial_spec(workload=WORKLOAD, **settings)
    return spec.workload(spec, progress=lambda message: None)


def values(measurement: Measurement, metric: str) -> tuple[float, ...]:
    return next(sample.values for sample in measurement.samples if sample.metric == metric)


def test_a_step_is_a_token_of_every_row() -> None:
    measurement = measured()
    assert measurement.outcome.status == "ok"
    assert len(values(measurement, "step_s")) == 4
    assert values(measurement, "tokens_per_step") == (3.0,)
    # 32 tokens: what is read, 1 + 4 written, 3 under a probe.
    assert values(measurement, "prompt_tokens") == (24.0,)
    assert values(measurement, "prefill_s")[0] > 0
    peak = next(s.values for s in measurement.samples if s.metric == "peak_alloc_bytes")
    assert peak[0] > values(measurement, "cache_bytes")[0] > 0


def test_the_caches_of_full_attention_hold_every_key_and_value() -> None:
    measurement = measured(model__layers=["full_standard"], attention__kind="full_standard")
    # 3 rows, 2 heads of 8, keys and values of all 32 tokens in float32.
    assert values(measurement, "cache_bytes")[0] >= 3 * 2 * 8 * 2 * 32 * 4


def test_a_task_without_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.length=32: a prompt and the 72 tokens behind it do not fit"):
        trial_spec(workload={**WORKLOAD, "new_tokens": 68})


@pytest.mark.parametrize("wrong", [{"warmup_tokens": -1}, {"new_tokens": 0}])
def test_a_wrong_setting_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"workload\.warmup_tokens=.*: give at least 0 and 1"):
        trial_spec(workload={**WORKLOAD, **wrong})
