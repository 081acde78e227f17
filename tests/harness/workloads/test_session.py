"""A session: its random streams, its steps under any probe, and the evaluation grid against direct sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.probes import Blind, Counter, CpuAllocator, Probe, ResidentPeak, Stopwatch
from harness.record import Sample
from harness.tasks import Batch
from harness.workloads.session import Session, learning_rate, open_session, step_sizes, stream_seed
from reformer import ReformerLM
from tests.harness.specs import trial_spec


def opened(**settings: Any) -> Session:
    return open_session(trial_spec(**settings))


def weights(session: Session) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in session.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(session: Session, count: int = 2, probe: Probe | None = None) -> list[float]:
    """Losses of a few training steps."""
    probe = probe if probe is not None else Blind()
    return [float(session.train_step(session.batch(step), step=step, probe=probe)) for step in range(count)]


# Random streams


def test_equal_specs_train_to_equal_weights() -> None:
    runs = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        session = opened(model__dropout=0.1)
        runs.append((weights(session), steps(session), weights(session)))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert same(runs[0][2], runs[1][2])
    assert not same(runs[0][0], runs[0][2])


def test_another_seed_is_another_stream_of_everything() -> None:
    one, other = opened(seed=0), opened(seed=1)
    assert not torch.equal(one.model.embedding.weight, other.model.embedding.weight)
    assert not torch.equal(one.batch(0)[0], other.batch(0)[0])
    assert one.model.config.hash_seed != other.model.config.hash_seed
    assert one.spec.task.evaluation_set(seed=0).sha256() != one.spec.task.evaluation_set(seed=1).sha256()


def test_another_repeat_is_nothing_new() -> None:
    one, other = opened(repeat=0), opened(repeat=1)
    assert same(weights(one), weights(other))
    assert steps(one) == steps(other)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention__n_hashes": 1, "attention__n_buckets": 8, "attention__chunk_length": 4},
        {"model__residual": "reversible"},
        {"model__dropout": 0.5, "model__attention_dropout": 0.5},
        {"hashing": {"_target_": "reformer.Random"}},
        {"model__layers": ["full"]},
        {"train__lr": 0.5, "train__batch_size": 7, "train__steps": 1},
        {"task__n_symbols": 7, "evaluate__hash_seeds": [9]},
        {"dtype": "bfloat16"},
    ],
)
def test_parameters_depend_on_the_seed_and_the_shape_alone(settings: dict[str, Any]) -> None:
    assert same(weights(opened(**settings)), weights(opened()))


def test_dropout_has_a_stream_that_the_parameters_do_not_move() -> None:
    def first_drawn(**settings: Any) -> list[float]:
        """What dropout draws first."""
        opened(**settings)
        return list(torch.rand(4).tolist())

    assert first_drawn(model__d_model=32, model__n_layers=2) == first_drawn()
    assert first_drawn(seed=1) != first_drawn()


def test_parameters_and_dropout_have_streams_of_their_names() -> None:
    session = opened(seed=3)
    drawn = torch.rand(4)
    torch.manual_seed(stream_seed("parameters", 3))
    assert same(weights(session), dict(ReformerLM(session.spec.reformer_config()).named_parameters()))
    torch.manual_seed(stream_seed("dropout", 3))
    assert torch.equal(torch.rand(4), drawn)


def test_dropout_in_training_does_not_move_data_or_hashes() -> None:
    plain, dropping = opened(), opened(model__dropout=0.5)
    assert steps(plain) != steps(dropping)
    assert torch.equal(plain.batch(2)[0], dropping.batch(2)[0])
    assert int(plain.model.get_extra_state()["draw"]) == int(dropping.model.get_extra_state()["draw"])


def test_stream_seeds_differ_by_name_and_seed_and_fit_torch() -> None:
    seeds = {stream_seed(name, seed) for name in ("parameters", "dropout") for seed in (0, 1, 10, 2**31 - 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_batch_is_that_of_the_task_for_seed_and_step() -> None:
    session = opened(seed=4, train__batch_size=5)
    for step in range(3):
        expected = session.spec.task.training_batch(seed=4, step=step, batch_size=5)
        tokens, targets = session.batch(step)
        assert (tokens.numpy() == expected.tokens).all()
        assert (targets.numpy() == expected.targets).all()


# Steps


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [
        (0, [0.5, 0.5, 0.5, 0.5, 0.5]),
        (1, [0.5, 0.5, 0.5, 0.5, 0.5]),
        (4, [0.125, 0.25, 0.375, 0.5, 0.5]),
    ],
)
def test_the_rate_rises_in_a_line_and_stays(warmup: int, rates: list[float]) -> None:
    train = trial_spec(train__lr=0.5, train__warmup_steps=warmup).train
    assert [learning_rate(train, step) for step in range(5)] == rates
    assert learning_rate(train, 10**9) == 0.5


def gradient_descent(**settings: Any) -> Session:
    """Plain steps of rate 1."""
    plain = {"train__optimizer": "sgd", "train__beta1": 0.0, "train__weight_decay": 0.0, "train__lr": 1.0}
    return opened(**{**plain, "train__warmup_steps": 0, "train__clip": 0.0, **settings})


def moved(session: Session, *, step: int = 0) -> float:
    """Length of one step through the space of all parameters."""
    before = weights(session)
    session.train_step(session.batch(0), step=step, probe=Blind())
    after = weights(session)
    return float(torch.stack([(after[name] - before[name]).square().sum() for name in before]).sum().sqrt())


def gradient(session: Session) -> dict[str, Tensor]:
    session.loss(session.batch(0)).backward()
    return {
        name: value.grad.clone() for name, value in session.model.named_parameters() if value.grad is not None
    }


def test_a_step_goes_down_the_gradient_by_the_rate() -> None:
    gradients = gradient(gradient_descent())
    session = gradient_descent(train__lr=0.25)
    before = weights(session)
    loss = session.train_step(session.batch(0), step=0, probe=Blind())
    after = weights(session)
    for name, value in gradients.items():
        torch.testing.assert_close(after[name], before[name] - 0.25 * value)
    assert loss == gradient_descent().loss(session.batch(0))
    assert not loss.requires_grad


def test_the_rate_of_a_step_is_that_of_its_number() -> None:
    early, late = (gradient_descent(train__warmup_steps=8) for _ in range(2))
    assert moved(late, step=7) == pytest.approx(8 * moved(early, step=0), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_is_cut_to_the_clip_and_a_clip_of_zero_cuts_nothing(dtype: str) -> None:
    free = moved(gradient_descent(dtype=dtype, train__clip=0.0))
    cut = moved(gradient_descent(dtype=dtype, train__clip=free / 10))
    uncut = moved(gradient_descent(dtype=dtype, train__clip=free * 10))
    assert free == pytest.approx(moved(gradient_descent()), rel=0.01)
    assert cut == pytest.approx(free / 10, rel=1e-3)
    assert uncut == pytest.approx(free, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_the_optimizer_is_that_of_the_spec(name: str, kind: type[torch.optim.Optimizer]) -> None:
    session = opened(train__optimizer=name, train__beta1=0.7, train__beta2=0.8, train__weight_decay=0.3)
    assert type(session.optimizer) is kind
    (group,) = session.optimizer.param_groups
    assert group["weight_decay"] == 0.3
    assert group["momentum" if name == "sgd" else "betas"] == (0.7 if name == "sgd" else (0.7, 0.8))
    assert len(group["params"]) == len(list(session.model.parameters()))


class Diary:
    """A probe that writes down what it sees."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.look = look
        self.entries: list[tuple[str, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield
        self.entries.append((name, self.look()))

    def samples(self) -> tuple[Sample, ...]:
        return ()


def test_a_step_is_forward_then_backward_then_optimizer() -> None:
    session = opened()
    initial = weights(session)

    def look() -> tuple[bool, bool]:
        """Whether there are gradients, and whether the weights have moved."""
        has_gradients = any(parameter.grad is not None for parameter in session.model.parameters())
        return has_gradients, not same(weights(session), initial)

    diary = Diary(look)
    steps(session, 1, diary)
    assert diary.entries == [
        ("forward", (False, False)),
        ("backward", (True, False)),
        ("optimizer", (False, True)),
    ]


@pytest.mark.parametrize("residual", ["plain", "reversible"])
@pytest.mark.parametrize(
    "make",
    [lambda: Stopwatch(torch.device("cpu")), lambda: CpuAllocator(0), Counter, ResidentPeak],
    ids=["Stopwatch", "CpuAllocator", "Counter", "ResidentPeak"],
)
def test_a_probe_changes_nothing(make: Callable[[], Probe], residual: str) -> None:
    settings = {"model__residual": residual, "model__dropout": 0.1, "model__n_layers": 2}
    blind = opened(**settings)
    losses = steps(blind)
    watched, probe = opened(**settings), make()
    assert steps(watched, probe=probe) == losses
    assert same(weights(watched), weights(blind))
    assert probe.samples()


def test_between_steps_weights_and_moments_are_alive() -> None:
    session = opened()
    parameters = sum(value.numel() for value in session.model.parameters())
    assert sum(value.numel() for value in session.live_tensors()) == parameters
    steps(session, 1)
    counters = len(list(session.model.parameters()))
    assert sum(value.numel() for value in session.live_tensors()) == 3 * parameters + counters


def test_gradients_that_are_there_are_alive() -> None:
    session = opened()
    session.loss(session.batch(0)).backward()
    parameters = sum(value.numel() for value in session.model.parameters())
    assert sum(value.numel() for value in session.live_tensors()) == 2 * parameters


def test_a_step_is_told_by_its_tokens_and_parameters() -> None:
    session = opened(train__batch_size=5, task__length=40)
    tokens, parameters = step_sizes(session)
    assert (tokens.metric, tokens.unit, tokens.values) == ("tokens_per_step", "tokens", (200.0,))
    assert (parameters.metric, parameters.unit) == ("parameters", "count")
    assert parameters.values == (sum(value.numel() for value in session.model.parameters()),)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_train_float32_parameters(dtype: str) -> None:
    session, full = opened(dtype=dtype), opened()
    losses, exact = steps(session, 3), steps(full, 3)
    assert losses != exact
    assert losses == pytest.approx(exact, abs=0.05)
    assert {value.dtype for value in session.model.parameters()} == {torch.float32}
    assert not same(weights(session), weights(opened()))
    assert session.scaler.is_enabled() == (dtype == "float16")


# Evaluation

GRID = {"evaluate__n_hashes": [1, 3], "evaluate__hash_seeds": [0, 5]}


def table(samples: list[Sample]) -> dict[tuple[tuple[str, Any], ...], dict[str, float]]:
    """Sums by place in the grid; each is there once."""
    cells: dict[tuple[tuple[str, Any], ...], dict[str, float]] = {}
    for sample in samples:
        cell = cells.setdefault(tuple(sample.at.items()), {})
        assert sample.metric not in cell
        assert sample.unit == ("nats" if sample.metric == "nll_nats" else "tokens")
        (cell[sample.metric],) = sample.values
    return cells


def evaluated(session: Session, evaluation: Batch) -> dict[tuple[tuple[str, Any], ...], dict[str, float]]:
    return table(list(session.evaluate(evaluation)))


def directly(session: Session, evaluation: Batch, **setting: Any) -> dict[str, Any]:
    """The sums of the model on the whole set at once."""
    session.model.eval()
    with session.model.attending(**setting):
        scores = session.model.score(
            torch.from_numpy(evaluation.tokens), torch.from_numpy(evaluation.targets)
        )
    session.model.train()
    return {
        "nll_nats": pytest.approx(float(scores.nll_nats), rel=1e-5),
        "correct": float(scores.correct),
        "scored": float(scores.scored),
    }


def test_every_cell_of_the_grid_has_the_sums_of_its_setting() -> None:
    session = opened(**GRID)
    steps(session, 3)
    evaluation = session.spec.task.evaluation_set(seed=0)
    assert len(evaluation.tokens) % session.spec.train.batch_size
    cells = evaluated(session, evaluation)
    expected = {(): directly(session, evaluation)}
    for rounds in (1, 3):
        for seed in (0, 5):
            key = (("n_hashes", rounds), ("hash_seed", seed))
            expected[key] = directly(session, evaluation, n_hashes=rounds, hash_seed=seed)
    for seed in (0, 5):
        expected[("attention", "random"), ("hash_seed", seed)] = directly(
            session, evaluation, kind="random", hash_seed=seed
        )
    for control in ("full", "knock_out"):
        expected[(("attention", control),)] = directly(session, evaluation, kind=control)
    assert cells == expected
    assert all(cell["scored"] == 105 for cell in cells.values())
    assert len({cell["nll_nats"] for cell in cells.values()}) == len(cells)


def test_evaluating_changes_nothing_and_gives_the_same_again() -> None:
    undisturbed = steps(opened(model__dropout=0.2))
    session = opened(model__dropout=0.2)
    evaluation = session.spec.task.evaluation_set(seed=0)
    assert evaluated(session, evaluation) == evaluated(session, evaluation)
    assert session.model.training
    assert steps(session) == undisturbed


def test_a_model_that_hashes_nothing_is_evaluated_as_trained_alone() -> None:
    for layers in (["local"], ["full_standard", "local"]):
        session = opened(model__layers=layers, model__n_layers=2, **GRID)
        assert list(evaluated(session, session.spec.task.evaluation_set(seed=0))) == [()]


def test_a_model_trained_with_full_attention_is_hashed_where_rounds_are_given() -> None:
    session = opened(model__layers=["full"], **GRID)
    evaluation = session.spec.task.evaluation_set(seed=0)
    cells = evaluated(session, evaluation)
    hashed = (("n_hashes", 1), ("hash_seed", 5))
    assert cells[hashed] == directly(session, evaluation, kind="lsh", n_hashes=1, hash_seed=5)
    assert cells[()] == cells[(("attention", "full"),)]
    assert cells[()] != cells[hashed]


@pytest.mark.parametrize("layers", [["full", "lsh"], ["local", "lsh"]])
def test_kinds_of_the_pattern_that_no_layer_has_do_not_count(layers: list[str]) -> None:
    session, expected = opened(model__layers=layers), opened(model__layers=layers[:1])
    evaluation = session.spec.task.evaluation_set(seed=0)
    assert evaluated(session, evaluation) == evaluated(expected, evaluation)
