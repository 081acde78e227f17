"""Measure cached decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from harness.devices import autocast
from harness.probes import Blind, Counter, OthersWatch, Probe, ResidentPeak, Stopwatch, Together
from harness.record import Measurement, Outcome, Sample
from harness.workloads.measure import allocator_probe
from harness.workloads.session import Session, open_session, step_sizes
from harness.workloads.workload import Workload
from reformer import DecodeState

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Tokens written under a probe of their own: resident memory, the allocator, the count of operations.
_PROBED = 3


@dataclass(frozen=True, kw_only=True)
class Decode(Workload):
    """Read a prompt into caches, then write token after token, greedily; fresh weights in eval mode.

    A step is a token of every row; `prefill_s` is the time of the prompt, `cache_bytes` what the caches hold
    in the end.

    Args:
        new_tokens: written and timed.
        warmup_tokens: written before the clock counts.
    """

    new_tokens: int = 64
    warmup_tokens: int = 4

    def __post_init__(self) -> None:
        if self.warmup_tokens < 0 or self.new_tokens < 1:
            raise ValueError(
                f"workload.warmup_tokens={self.warmup_tokens}, workload.new_tokens={self.new_tokens}: "
                "give at least 0 and 1"
            )

    @property
    def written(self) -> int:
        """Tokens behind the prompt."""
        return self.warmup_tokens + self.new_tokens + _PROBED

    def backend(self, spec: TrialSpec) -> str:
        """As of any workload, where there is room for a prompt.

        Raises:
            ValueError: the task is no longer than what is written, or the spec cannot run.
        """
        if spec.task.length <= self.written:
            raise ValueError(
                f"task.length={spec.task.length}: a prompt and the {self.written} tokens behind it do not "
                f"fit; use task.length={2 * self.written} or fewer workload.new_tokens"
            )
        return super().backend(spec)

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        session = open_session(spec)
        session.model.eval()
        tokens, _ = session.batch(0)
        prompt = tokens[:, : spec.task.length - self.written]
        progress("reading the prompt")
        started = time.perf_counter()
        with autocast(spec.device, spec.dtype):
            state = session.ours.start_decode(prompt, max_new_tokens=self.written)
        _synchronize(session.device)
        prefill_s = time.perf_counter() - started
        stopwatch = Together(OthersWatch(), Stopwatch(session.device))
        for token in range(self.warmup_tokens + self.new_tokens):
            _write(session, state, Blind() if token < self.warmup_tokens else stopwatch)
            progress(f"token {token + 1}/{self.warmup_tokens + self.new_tokens}")
        footprint, method = _footprint(session, state, prompt)
        tokens_per_step, parameters = step_sizes(session)
        rows = float(spec.train.batch_size)
        return Measurement(
            outcome=Outcome(status="ok"),
            samples=(
                Sample(metric=tokens_per_step.metric, unit=tokens_per_step.unit, values=(rows,)),
                parameters,
                Sample(metric="prompt_tokens", unit="tokens", values=(float(prompt.shape[1]),)),
                Sample(metric="prefill_s", unit="s", values=(prefill_s,)),
                *stopwatch.samples(),
                *footprint,
                Sample(metric="cache_bytes", unit="bytes", values=(float(state.cache_bytes),)),
            ),
            environment={"mem_method": method},
        )


def _write(session: Session, state: DecodeState, probe: Probe) -> None:
    """One more token of every row."""
    tokens = state.logits.argmax(dim=-1)
    with probe.phase("forward"), autocast(session.spec.device, session.spec.dtype):
        state.step(tokens)


def _footprint(session: Session, state: DecodeState, prompt: torch.Tensor) -> tuple[tuple[Sample, ...], str]:
    """Memory and cost of a token, each under a probe of its own; the caches count as held."""
    resident = ResidentPeak()
    _write(session, state, resident)
    of_pages = resident.samples()
    allocator = allocator_probe(session, (prompt, state.logits), held=state.cache_bytes)
    _write(session, state, allocator)
    counter = Counter()
    _write(session, state, counter)
    peaks = (sample for sample in allocator.samples() if sample.metric != "saved_bytes")
    return (*of_pages, *peaks, *counter.samples()), resident.method


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
