"""Training in several processes."""

import itertools
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from reformer.config import ATTENTION_KINDS, RESIDUALS
from tests.reformer.helpers import MODELS, AnyModel, any_model, assert_all_close, inputs_and_targets

PROCESSES = 2
NAMES = [build.__name__ for build in MODELS]
DROPOUTS: dict[str, dict[str, Any]] = {
    "no dropout": {},
    "dropout": {"dropout": 0.2, "attention_dropout": 0.3, "hash_dropout": 0.3},
}
CASES = list(itertools.product(NAMES, RESIDUALS, DROPOUTS))

every_model = pytest.mark.parametrize("name", NAMES)
every_residual = pytest.mark.parametrize("residual", RESIDUALS)


def a_model(name: str, residual: str, dropout: str) -> AnyModel:
    """The language model with attention of all kinds, the others with the first two."""
    torch.manual_seed(0)
    n_layers = len(ATTENTION_KINDS) if name == "ReformerLM" else 2
    settings = {"residual": residual, "layers": ATTENTION_KINDS, "n_layers": n_layers, "n_hashes": 2}
    return any_model(MODELS[NAMES.index(name)], **settings, **DROPOUTS[dropout])


def gradients(model: AnyModel, *, share: int | None = None, parallel: bool = False) -> list[Tensor]:
    """Of one training step on a share of the batch, or on all of it; each share has dropout of its own."""
    inputs, targets = inputs_and_targets(type(model))
    rows = slice(None) if share is None else slice(share, share + 1)
    call = DistributedDataParallel(model) if parallel else model
    torch.manual_seed(3 + (share or 0))
    logits = call(*(x[rows] for x in inputs))
    F.cross_entropy(logits.flatten(0, -2), targets[rows].flatten()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def train_a_share(rank: int, folder: Path) -> None:
    """What each process runs: its row of the batch, in every model."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    found = {case: gradients(a_model(*case), share=rank, parallel=True) for case in CASES}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


Found = dict[tuple[str, ...], list[Tensor]]


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(train_a_share, args=(folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@every_model
@every_residual
def test_two_processes_find_the_gradients_of_the_whole_batch(
    name: str, residual: str, of_two_processes: list[Found]
) -> None:
    case = (name, residual, "no dropout")
    expected = gradients(a_model(*case))
    assert len(expected) == len(list(a_model(*case).parameters()))
    for found in of_two_processes:
        assert_all_close(found[case], expected, tolerance=1e-11)


@every_model
@every_residual
def test_with_dropout_they_find_the_mean_of_what_each_finds_alone(
    name: str, residual: str, of_two_processes: list[Found]
) -> None:
    case = (name, residual, "dropout")
    alone = [gradients(a_model(*case), share=rank) for rank in range(PROCESSES)]
    expected = [(first + second) / PROCESSES for first, second in zip(*alone, strict=True)]
    for found in of_two_processes:
        assert_all_close(found[case], expected, tolerance=1e-11)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@every_model
@every_residual
def test_a_process_that_is_alone_finds_what_it_finds_without_the_wrapper(
    name: str, residual: str, one_process: None
) -> None:
    alone = a_model(name, residual, "dropout")
    wrapped = deepcopy(alone)
    assert_all_close(gradients(wrapped, parallel=True), gradients(alone), tolerance=1e-12)
