"""FLOPs and operator calls: torch's own numbers on eager code, and the recompute of a reversible stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.probes import Counter
from harness.workloads.session import Session, open_session
from reformer.attention.modules import AttentionCall
from tests.harness.specs import trial_spec


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def counted(function: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs and operators."""
    counter = Counter()
    with counter.phase("forward"):
        function()
    flops, operators = counter.samples()
    assert (flops.metric, flops.unit) == ("flops", "flop")
    assert (operators.metric, operators.unit) == ("operators", "count")
    return int(flops.values[0]), int(operators.values[0])


def by_torch(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as mode:
        function()
    return int(mode.get_total_flops())


ROWS, IN, OUT = 5, 7, 11
BATCH, HEADS, SEQ, DIM = 2, 3, 13, 8

EAGER: dict[str, Callable[[], Tensor]] = {
    "matmul": lambda: normal(ROWS, IN) @ normal(IN, OUT),
    "batched": lambda: normal(BATCH, HEADS, SEQ, DIM) @ normal(BATCH, HEADS, DIM, SEQ),
    "addmm": lambda: torch.addmm(normal(OUT), normal(ROWS, IN), normal(IN, OUT)),
    "einsum": lambda: torch.einsum(
        "bhld,hdrk->bhrlk", normal(BATCH, HEADS, SEQ, DIM), normal(HEADS, DIM, 2, 4)
    ),
    "linear": lambda: F.linear(normal(BATCH, ROWS, IN), normal(OUT, IN), normal(OUT)),
    "convolution": lambda: F.conv1d(normal(BATCH, 4, 9), normal(6, 4, 3)),
    "pointwise": lambda: normal(ROWS, IN).softmax(-1).relu(),
    "layers": lambda: nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.LayerNorm(OUT), nn.Linear(OUT, 2))(
        normal(ROWS, IN)
    ),
}


@pytest.mark.parametrize("name", EAGER)
def test_flops_are_those_of_torch(name: str) -> None:
    function = EAGER[name]
    assert counted(function)[0] == by_torch(function)
    with torch.no_grad():
        assert counted(function)[0] == by_torch(function)
    assert counted(lambda: function().sum().backward())[0] == by_torch(lambda: function().sum().backward())


def test_a_multiplication_and_an_addition_are_two() -> None:
    assert counted(EAGER["matmul"])[0] == 2 * ROWS * IN * OUT
    assert counted(lambda: EAGER["matmul"]().sum().backward())[0] == 3 * 2 * ROWS * IN * OUT
    assert counted(EAGER["pointwise"])[0] == 0


def attention() -> Tensor:
    q, k, v = (normal(BATCH, HEADS, SEQ, DIM) for _ in range(3))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


#: One matrix product of attention: queries by keys, or weights by values.
PRODUCT = 2 * BATCH * HEADS * SEQ * SEQ * DIM


def test_attention_out_of_matrix_products_costs_what_torch_says() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(attention)[0] == by_torch(attention) == 2 * PRODUCT
        assert counted(lambda: attention().sum().backward())[0] == 6 * PRODUCT


def test_the_fused_kernel_of_the_cpu_is_not_free() -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert by_torch(attention) == 0
        assert counted(attention)[0] == 2 * PRODUCT
        # Backward computes the weights again: five products instead of four.
        assert counted(lambda: attention().sum().backward())[0] == (2 + 5) * PRODUCT


def test_operators_are_calls_that_reach_a_kernel() -> None:
    a, b, c = normal(ROWS, IN).detach(), normal(IN, OUT).detach(), normal(OUT, IN).detach()
    assert counted(lambda: None) == (0, 0)
    assert counted(lambda: a + a)[1] == 1
    assert counted(lambda: ((a + a) @ b).relu())[1] == 3
    # Composite: a transpose and a product.
    assert counted(lambda: F.linear(a, c))[1] == 2


OPERANDS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "linear": (F.linear, [normal(BATCH, ROWS, IN), normal(OUT, IN), normal(OUT)]),
    "batched": (torch.matmul, [normal(BATCH, HEADS, SEQ, DIM), normal(DIM, SEQ)]),
    "convolution": (F.conv1d, [normal(BATCH, 4, 9), normal(6, 4, 3)]),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_a_composite_operator_is_what_it_is_made_of_without_autograd_too(name: str) -> None:
    function, operands = OPERANDS[name]
    with torch.inference_mode():
        alone = [x.detach().clone() for x in operands]
        cost = counted(lambda: function(*alone))
    operands = [x.detach() for x in operands]
    assert counted(lambda: function(*operands)) == cost
    assert cost[0] == by_torch(lambda: function(*operands)) > 0


def test_phases_and_steps_add_up() -> None:
    counter = Counter()
    for phase in ("forward", "backward", "forward"):
        with counter.phase(phase):
            EAGER["matmul"]()
        EAGER["matmul"]()  # outside of any phase
    flops, operators = (sample.values[0] for sample in counter.samples())
    assert flops == 3 * 2 * ROWS * IN * OUT
    assert operators == 3 * counted(EAGER["matmul"])[1]


def step_cost(session: Session) -> int:
    counter = Counter()
    session.train_step(session.batch(0), step=0, probe=counter)
    return int(counter.samples()[0].values[0])


def branches_cost(session: Session) -> int:
    """FLOPs of every block's branches, hashing left out."""
    spec, call = session.spec, AttentionCall()
    x = normal(spec.train.batch_size, spec.task.length, spec.model.d_model)
    counter = Counter()
    for block in session.model.blocks:
        buckets = block.attend(x, call=call).buckets
        with counter.phase("forward"):
            block.attend(x, call=call, buckets=buckets)
            block.feed(x)
    return int(counter.samples()[0].values[0])


@pytest.mark.parametrize("kind", ["lsh", "local", "full", "full_standard"])
def test_reversible_costs_its_branches_once_more_and_hashes_no_second_time(kind: str) -> None:
    settings = {"model__layers": [kind], "model__n_layers": 2, "attention__n_hashes": 3}
    plain = open_session(trial_spec(model__residual="plain", **settings))
    reversible = open_session(trial_spec(model__residual="reversible", **settings))
    recompute = branches_cost(plain)
    assert recompute > 0
    assert step_cost(reversible) - step_cost(plain) == recompute


def test_the_cost_of_a_step_is_the_same_run_to_run() -> None:
    session = open_session(trial_spec(model__residual="reversible"))
    assert step_cost(session) == step_cost(session)


@pytest.mark.parametrize("accumulated", [False, True])
def test_products_added_in_place_count_as_others(accumulated: bool) -> None:
    """torch's own counter takes them for free."""
    rows, matrix, batched = normal(ROWS, IN), normal(IN, OUT), normal(BATCH, ROWS, IN)
    sums, batched_sums = torch.zeros(ROWS, OUT), torch.zeros(BATCH, ROWS, OUT)
    if accumulated:
        function: Callable[[], Any] = lambda: sums.addmm_(rows, matrix)  # noqa: E731
    else:
        function = lambda: batched_sums.baddbmm_(batched, matrix.expand(BATCH, -1, -1))  # noqa: E731
    with torch.no_grad():
        assert counted(function)[0] == 2 * ROWS * IN * OUT * (1 if accumulated else BATCH)
