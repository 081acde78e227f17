"""`torch.compile` changes neither what a model computes nor how it learns."""

import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import ReformerClassifier, ReformerEncoderDecoder, ReformerMaskedLM
from reformer.compilation import uncompiled
from reformer.config import ATTENTION_KINDS, RESIDUALS
from reformer.trunk import Trunk
from tests.reformer.helpers import (
    AnyModel,
    any_model,
    assert_all_close,
    inputs_and_targets,
    small_model,
    small_tokens,
)

pytestmark = [
    pytest.mark.usefixtures("unchecked", "nothing_compiled"),
    # The compiler's own, where a graph ends in the middle of a model and at any autograd function.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
]


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """What other tests compiled is gone, and afterwards what this one did."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(model: AnyModel, call: Callable[..., Tensor]) -> list[Tensor]:
    """Logits of two hash draws, the gradients of both, and where they leave the random stream."""
    torch.manual_seed(3)
    logits = [call(*inputs_and_targets(type(model), seed=seed)[0]) for seed in (0, 1)]
    torch.stack(logits).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*logits, *gradients, torch.get_rng_state()]


def evaluated(model: AnyModel, call: Callable[..., Tensor]) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [call(*inputs_and_targets(type(model))[0])]


def draws(model: AnyModel) -> list[dict[str, Tensor]]:
    return [part.get_extra_state() for part in model.modules() if isinstance(part, Trunk)]


def assert_compiled_is_the_same(model: AnyModel, run: Callable[..., list[Tensor]], **compiler: Any) -> None:
    compiled = deepcopy(model)
    call: Any = torch.compile(compiled, **({"backend": "aot_eager"} | compiler))
    assert_all_close(run(compiled, call), run(model, model), tolerance=1e-12)
    assert draws(compiled) == draws(model)


SETTINGS: dict[str, Any] = {"ff_chunk_length": 13, "dropout": 0.1, "attention_dropout": 0.1}


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_compiled_model_learns_as_it_does_uncompiled(residual: str) -> None:
    model = small_model(residual=residual, layers=ATTENTION_KINDS, n_layers=len(ATTENTION_KINDS), **SETTINGS)
    assert_compiled_is_the_same(model, trained)


@pytest.mark.parametrize(
    "residual",
    [kind if kind == "reversible" else pytest.param(kind, marks=pytest.mark.slow) for kind in RESIDUALS],
)
@pytest.mark.parametrize("build", [ReformerMaskedLM, ReformerClassifier, ReformerEncoderDecoder])
def test_so_do_models_that_read_both_sides_or_two_sequences(build: type[AnyModel], residual: str) -> None:
    model = any_model(build, residual=residual, layers=("lsh", "local"), n_layers=2, **SETTINGS)
    assert_compiled_is_the_same(model, trained)


def test_a_compiled_model_predicts_what_it_does_uncompiled() -> None:
    assert_compiled_is_the_same(
        small_model(residual="reversible_exact", layers=("full",), n_layers=1), evaluated
    )


@pytest.mark.parametrize("residual", [pytest.param("plain", marks=pytest.mark.slow), "reversible"])
def test_nothing_is_compiled_again_for_another_hash_draw_or_layer(residual: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def graphs_of(*, n_layers: int, draws: int) -> int:
        torch.compiler.reset()
        graphs.clear()
        call: Any = torch.compile(small_model(residual=residual, n_layers=n_layers), backend=counting)
        for _ in range(draws):
            call(small_tokens())
        return len(graphs)

    # What is the same number in the first call, and another in the second, may become a variable then.
    few = graphs_of(n_layers=2, draws=2)
    assert graphs_of(n_layers=2, draws=11) == few
    assert graphs_of(n_layers=11, draws=2) == few


def test_uncompiled_functions_are_themselves_outside_of_the_compiler() -> None:
    assert uncompiled(trained) is trained


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("residual", RESIDUALS)
def test_inductor_gives_the_same_model(
    residual: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = small_model(residual=residual, n_layers=1)
    # One thread: this process alone compiles, and no worker outlives the test.
    assert_compiled_is_the_same(model, trained, backend="inductor", options={"compile_threads": 1})
