"""How much a step computes: floating-point operations and operator calls, both exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from harness.record import Sample


@dataclass
class Counter:
    """FLOPs by torch's own formulas, those of its `FlopCounterMode`, and the number of operators dispatched.

    The mode itself tracks modules by hooks that a recompute inside a backward pass, such as that of a
    reversible stack, makes fail.
    """

    _flops: int = 0
    _operators: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        counting = _Counting()
        with counting:
            yield
        self._flops += counting.flops
        self._operators += counting.operators

    def samples(self) -> tuple[Sample, ...]:
        """`flops` and `operators`, summed over the phases of all steps seen."""
        return (
            Sample(metric="flops", unit="flop", values=(float(self._flops),)),
            Sample(metric="operators", unit="count", values=(float(self._operators),)),
        )


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.operators = 0
        self._formulas = {**_kernels(), **flop_registry}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            # Outside autograd a composite operator arrives whole; what it is made of is counted instead.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.operators += 1
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out


def _kernels() -> dict[Any, Any]:
    """Formulas for kernels that torch's counter takes for free; its own come first where it has them."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.addmm_: flop_registry[aten.addmm],
        aten.baddbmm_: flop_registry[aten.baddbmm],
    }


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))
