"""Telling where in a long step a model is."""

from __future__ import annotations

import pytest
from torch import nn

from harness.probes import Blind, Stopwatch
from harness.workloads import whereabouts
from harness.workloads.session import Session, open_session
from harness.workloads.whereabouts import Whereabouts
from tests.harness.specs import trial_spec


def steps(session: Session, *, told: list[str]) -> Stopwatch:
    watch = Stopwatch(session.device)
    probe = Whereabouts(watch, session.model, step="step 1/1", tell=told.append)
    session.train_step(session.batch(0), step=0, probe=probe)
    assert probe.samples() == watch.samples()
    return watch


@pytest.fixture
def deep() -> Session:
    return open_session(trial_spec(model__n_layers=3, model__residual="reversible"))


def test_layers_rise_in_forward_and_fall_in_the_backward_of_a_reversible_stack(
    deep: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whereabouts, "EVERY_S", -1.0)
    told: list[str] = []
    watch = steps(deep, told=told)
    forward = [f"step 1/1, forward, layer {layer} of 3" for layer in (1, 2, 3)]
    backward = [f"step 1/1, backward, layer {layer} of 3" for layer in (3, 2, 1)]
    assert list(dict.fromkeys(told)) == [*forward, *backward]
    assert {sample.metric for sample in watch.samples()} == {
        "forward_s",
        "backward_s",
        "optimizer_s",
        "step_s",
    }


def test_a_short_step_tells_nothing_and_no_hook_stays(deep: Session) -> None:
    told: list[str] = []
    steps(deep, told=told)
    assert told == []
    assert not any(module._forward_pre_hooks for module in deep.model.modules())


def test_a_model_that_is_not_ours_has_no_layers_to_tell() -> None:
    told: list[str] = []
    probe = Whereabouts(Blind(), nn.Linear(2, 2), step="step 1/1", tell=told.append)
    with probe.phase("forward"):
        pass
    assert told == []
