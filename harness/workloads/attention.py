"""Measure one attention layer alone: ours, torch's full attention, or that of a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.devices import autocast
from harness.peers import OURS, PEERS, check_implementation, versions
from harness.probes import Counter, OthersWatch, Probe, ResidentPeak, Stopwatch, Together
from harness.record import Measurement, Outcome, Sample
from harness.workloads.floor import floor_samples, product_rates_of, rate_sample
from harness.workloads.measure import allocator_probe
from harness.workloads.sampling import Sampling
from harness.workloads.session import stream_seed
from harness.workloads.workload import OMITTED, Workload
from reformer import ReformerConfig
from reformer.attention.modules import AttentionCall, build_attention

if TYPE_CHECKING:
    from harness.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class Attention(Workload):
    """One attention layer with its projections, forward and backward, on random input of the task's length.

    The layer is the first of the model. Inputs are `train.batch_size` sequences of standard normal values.
    Two steps warm up: the first under the counter of operations and the mark of resident memory, the second
    under the allocator's probe; the clock counts the steps that follow. The rate of the machine's matrix
    products is taken before and after them, and the floor follows from it.

    Args:
        implementation: `ours`, or the peer whose layer it is; torch's own full attention is ours with
            `attention=full_standard`.
        timed_steps: steps that the clock counts, at most.
        budget_s: seconds of timed steps after which no further one begins; one there is always.
        precision: what is known of a step so well that no further one is needed (see `Sampling`); 0 is never.
    """

    implementation: str = OURS
    timed_steps: int = 20
    budget_s: float = 2.0
    precision: float = field(default=0.0, metadata={OMITTED: True})

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        self._sampling()

    def backend(self, spec: TrialSpec) -> str:
        """Ours by its backend, a peer by its name."""
        if self.implementation == OURS:
            return super().backend(spec)
        PEERS[self.implementation].check(spec)
        return self.implementation

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        progress("building")
        session = open_layer(spec, implementation=self.implementation)
        batch = session.batch(0)
        resident, counter, allocator = ResidentPeak(), Counter(), allocator_probe(session, batch)
        progress("measuring memory and cost")
        session.step(batch, counter)
        footprint = (*resident.samples(), *counter.samples())
        session.step(batch, allocator)
        rates = [product_rates_of(spec)]
        stopwatch, sampling = Stopwatch(session.device), self._sampling()
        watching = Together(OthersWatch(), stopwatch)
        for step in sampling.steps(stopwatch.step_seconds):
            session.step(batch, watching)
            if session.device.type == "cuda":
                torch.cuda.synchronize(session.device)
            progress(f"step {step + 1}/{self.timed_steps}")
        rates.append(product_rates_of(spec))
        return Measurement(
            outcome=Outcome(status="ok"),
            samples=(
                *session.sizes(),
                *watching.samples(),
                *footprint,
                *allocator.samples(),
                *floor_samples(spec.reformer_config(), batch=spec.train.batch_size, seq=spec.task.length),
                rate_sample(*rates),
            ),
            theory={"stopped_by": sampling.stopped_by},
            environment={"mem_method": resident.method, **versions(self.implementation)},
        )

    def _sampling(self) -> Sampling:
        return Sampling(at_most=self.timed_steps, budget_s=self.budget_s, precision=self.precision)


@dataclass(frozen=True, kw_only=True)
class LayerSession:
    """A layer with its input, ready to take steps under a probe; built by `open_layer`."""

    spec: TrialSpec
    layer: nn.Module
    inputs: Tensor
    gradient: Tensor

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The input, which wants a gradient, and the gradient of the output; the same at every step."""
        return self.inputs, self.gradient

    def step(self, batch: tuple[Tensor, Tensor], probe: Probe) -> None:
        """Forward and backward; the gradients are dropped afterwards."""
        inputs, gradient = batch
        with probe.phase("forward"):
            out = self.forward(inputs)
        with probe.phase("backward"):
            out.backward(gradient)
        del out
        inputs.grad = None
        self.layer.zero_grad(set_to_none=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """The output of the layer, in the precision of the trial."""
        with autocast(self.spec.device, self.spec.dtype):
            out: Tensor = self.layer(inputs)
        return out

    def live_tensors(self) -> Iterator[Tensor]:
        """Everything that is allocated between two steps, but for the batch."""
        yield from self.layer.parameters()
        yield from self.layer.buffers()

    def sizes(self) -> tuple[Sample, ...]:
        """Tokens of a step, and the parameters of the layer."""
        tokens = self.inputs.shape[0] * self.inputs.shape[1]
        parameters = sum(parameter.numel() for parameter in self.layer.parameters())
        return (
            Sample(metric="tokens_per_step", unit="tokens", values=(float(tokens),)),
            Sample(metric="parameters", unit="count", values=(float(parameters),)),
        )


def open_layer(spec: TrialSpec, *, implementation: str) -> LayerSession:
    """Build a layer and its input; both depend on the seed alone."""
    device, config = torch.device(spec.device), spec.reformer_config()
    # This process belongs to the trial: the global stream is its own, for initialisation and rotations.
    torch.manual_seed(stream_seed("parameters", spec.seed))
    layer = _Ours(config) if implementation == OURS else PEERS[implementation].build(spec)
    inputs, gradient = torch.randn(
        2,
        spec.train.batch_size,
        spec.task.length,
        config.d_model,
        generator=torch.Generator().manual_seed(stream_seed("inputs", spec.seed)),
    )
    torch.manual_seed(stream_seed("dropout", spec.seed))
    return LayerSession(
        spec=spec,
        layer=layer.to(device),
        inputs=inputs.clone().to(device).requires_grad_(),
        gradient=gradient.clone().to(device),
    )


class _Ours(nn.Module):
    """Our layer as a function of its input alone."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.attention = build_attention(config, layer=0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, call=AttentionCall()).out
        return out
