"""One attention layer alone: what is measured of it, and on what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.codec import SpecError
from harness.probes import Blind
from harness.record import Measurement
from harness.workloads.attention import Attention, open_layer
from tests.harness.specs import trial_spec

TARGET = "harness.workloads.attention.Attention"


def spec_of(workload: dict[str, Any] | None = None, **settings: Any) -> Any:
    return trial_spec(workload={"_target_": TARGET, "timed_steps": 2, **(workload or {})}, **settings)


def measured(
    workload: dict[str, Any] | None = None, *, told: list[str] | None = None, **settings: Any
) -> Measurement:
    spec = spec_of(workload, **settings)
    return spec.workload(spec, progress=(told if told is not None else []).append)


def values(measurement: Measurement, metric: str, *, phase: str | None = None) -> tuple[float, ...]:
    (sample,) = (sample for sample in measurement.samples if (sample.metric, sample.phase) == (metric, phase))
    return sample.values


def test_every_quantity_is_there_with_its_unit() -> None:
    measurement = measured()
    assert measurement.outcome.status == "ok"
    assert {(sample.metric, sample.phase): sample.unit for sample in measurement.samples} == {
        ("tokens_per_step", None): "tokens",
        ("parameters", None): "count",
        ("forward_s", None): "s",
        ("backward_s", None): "s",
        ("step_s", None): "s",
        ("others_cpu", None): "ratio",
        ("peak_rss_bytes", None): "bytes",
        ("peak_rss_delta_bytes", None): "bytes",
        ("flops", None): "flop",
        ("operators", None): "count",
        ("peak_alloc_bytes", "forward"): "bytes",
        ("peak_alloc_bytes", "backward"): "bytes",
        ("saved_bytes", None): "bytes",
        ("floor_flops", "forward"): "flop",
        ("floor_flops", "backward"): "flop",
        ("gemm_flop_per_s", None): "flop/s",
    }
    assert measurement.environment == {"mem_method": "VmHWM"}
    assert values(measurement, "tokens_per_step") == (96.0,)
    assert values(measurement, "parameters") == (3 * 16.0 * 16,)
    assert len(values(measurement, "gemm_flop_per_s")) == 60


def test_steps_end_at_their_number_or_when_their_time_is_spent() -> None:
    told: list[str] = []
    assert len(values(measured({"timed_steps": 3}, told=told), "step_s")) == 3
    assert told[-1] == "step 3/3"
    assert len(values(measured({"timed_steps": 30, "budget_s": 0.0}), "step_s")) == 1


def test_what_is_exact_is_the_same_every_time_although_the_first_step_is_counted() -> None:
    def exact(measurement: Measurement) -> list[Any]:
        names = ("flops", "operators", "peak_alloc_bytes", "saved_bytes")
        return [sample for sample in measurement.samples if sample.metric in names]

    assert exact(measured()) == exact(measured())


def test_the_layer_and_its_input_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = open_layer(spec_of(), implementation="ours")
    torch.manual_seed(2)
    same = open_layer(spec_of(), implementation="ours")
    other = open_layer(spec_of(seed=1), implementation="ours")
    assert torch.equal(one.forward(one.inputs), same.forward(same.inputs))
    assert torch.equal(one.gradient, same.gradient)
    assert not torch.equal(one.inputs, other.inputs)
    assert not torch.equal(one.forward(one.inputs), other.forward(one.inputs))
    assert not torch.equal(one.inputs, one.gradient)


def test_a_step_leaves_no_gradient_behind() -> None:
    session = open_layer(spec_of(), implementation="ours")
    session.step(session.batch(0), Blind())
    assert session.inputs.grad is None
    assert all(parameter.grad is None for parameter in session.layer.parameters())


def test_parameters_and_inputs_count_as_memory() -> None:
    session = open_layer(spec_of(model__layers=["full"], attention__kind="full"), implementation="ours")
    held = sum(tensor.nbytes for tensor in (*session.live_tensors(), *session.batch(0)))
    assert held == 4 * (3 * 16 * 16 + 2 * 3 * 32 * 16)
    peak = values(
        measured(model__layers=["full"], attention__kind="full"), "peak_alloc_bytes", phase="forward"
    )
    assert peak[0] > held


@pytest.mark.parametrize("kind", ["lsh", "local", "full", "full_standard", "oracle"])
def test_every_kind_of_ours_can_be_measured(kind: str) -> None:
    assert measured(model__layers=[kind, "lsh"], attention__kind=kind).outcome.status == "ok"


def test_half_precision_is_autocast() -> None:
    session = open_layer(spec_of(dtype="bfloat16"), implementation="ours")
    assert session.forward(session.inputs).dtype == torch.bfloat16
    assert measured(dtype="bfloat16").outcome.status == "ok"


def test_a_peer_is_told_with_its_version() -> None:
    settings: dict[str, Any] = {
        "attention__causality": "published",
        "attention__duplicates": "sum",
        "attention__seams": "reference",
    }
    measurement = measured({"implementation": "transformers"}, **settings)
    assert measurement.outcome.status == "ok"
    assert measurement.environment["peer_version"].startswith("transformers 5.")
    assert spec_of({"implementation": "transformers"}, **settings).backend == "transformers"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"implementation": "trax"}, "'trax': use one of ours, transformers, reformer_pytorch"),
        ({"timed_steps": 0}, "workload.timed_steps=0: must be at least 1"),
        ({"budget_s": -1.0}, "workload.budget_s=-1.0: must not be negative"),
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(wrong)
    assert message in str(caught.value)


def test_ours_is_the_default() -> None:
    assert Attention().implementation == "ours"
