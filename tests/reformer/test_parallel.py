"""Training in several processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from reformer import ReformerLM
from reformer.config import ATTENTION_KINDS, RESIDUALS
from tests.reformer.helpers import assert_all_close, small_model, small_tokens, with_residual

PROCESSES = 2


def gradients(model: ReformerLM, tokens: Tensor, *, parallel: bool = False) -> list[Tensor]:
    call = DistributedDataParallel(model) if parallel else model
    logits = call(tokens)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def a_model(residual: str) -> ReformerLM:
    torch.manual_seed(0)
    return small_model(residual=residual, layers=ATTENTION_KINDS, n_layers=4)


def train_a_share(rank: int, folder: Path) -> None:
    """What each process runs: its part of the batch, under every residual kind."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    share = small_tokens().chunk(PROCESSES)[rank]
    found = {residual: gradients(a_model(residual), share, parallel=True) for residual in RESIDUALS}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(train_a_share, args=(folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("residual", RESIDUALS)
def test_two_processes_find_the_gradients_of_the_whole_batch(
    residual: str, of_two_processes: list[dict[str, list[Tensor]]]
) -> None:
    expected = gradients(a_model(residual), small_tokens())
    assert len(expected) == len(list(a_model(residual).parameters()))
    for found in of_two_processes:
        assert_all_close(found[residual], expected, tolerance=1e-11)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_process_that_is_alone_finds_what_it_finds_without_the_wrapper(
    residual: str, one_process: None
) -> None:
    alone = small_model(residual=residual, dropout=0.2, attention_dropout=0.3)
    wrapped = with_residual(alone, residual)
    found = []
    for model, parallel in ((alone, False), (wrapped, True)):
        torch.manual_seed(3)
        found.append(gradients(model, small_tokens(), parallel=parallel))
    assert_all_close(found[1], found[0], tolerance=1e-12)
