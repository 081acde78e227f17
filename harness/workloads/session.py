"""A model with its optimizer and data, ready to take steps under a probe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.devices import autocast
from harness.peers import OURS, PEERS, PeerModel
from harness.probes import Probe
from harness.record import Sample
from harness.spec import TrainSpec, TrialSpec
from harness.tasks.task import Batch
from reformer import ReformerLM
from reformer.attention.modules import SHARED_KINDS, Attending


@dataclass
class Session:
    """What a trial works on; built by `open_session`."""

    spec: TrialSpec
    device: torch.device
    model: ReformerLM | PeerModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def ours(self) -> ReformerLM:
        """The model, which is no peer's."""
        assert isinstance(self.model, ReformerLM)
        return self.model

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a training step, on the device."""
        train = self.spec.train
        batch = self.spec.task.training_batch(seed=self.spec.seed, step=step, batch_size=train.batch_size)
        return self._to_device(batch)

    def train_step(self, batch: tuple[Tensor, Tensor], *, step: int, probe: Probe) -> Tensor:
        """One step of training; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec.train, step)
        with probe.phase("forward"):
            loss = self.loss(batch)
        with probe.phase("backward"):
            self.scaler.scale(loss).backward()
        with probe.phase("optimizer"):
            if self.spec.train.clip > 0:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.train.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The training loss of a batch."""
        with autocast(self.spec.device, self.spec.dtype):
            return self.model.loss(*batch)

    def evaluate(self, evaluation: Batch) -> Iterator[Sample]:
        """Sums over the evaluation set, as trained and under every other setting; of models of ours alone."""
        self.model.eval()
        yield from self._score(evaluation, {}, Attending())
        if self._kinds & set(SHARED_KINDS):
            for at, attending in self.spec.evaluate.settings():
                yield from self._score(evaluation, at, attending)
        self.model.train()

    def live_tensors(self) -> Iterator[Tensor]:
        """Everything that is allocated between two steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from (parameter.grad for parameter in self.model.parameters() if parameter.grad is not None)
        for state in self.optimizer.state.values():
            yield from (
                value for value in state.values() if isinstance(value, Tensor) and value.device == self.device
            )

    @property
    def _kinds(self) -> set[str]:
        """Attention kinds of the layers that there are, which may be fewer than the pattern names."""
        config = self.ours.config
        return {config.kind(layer) for layer in range(config.n_layers)}

    def _score(self, evaluation: Batch, at: dict[str, int | str], attending: Attending) -> Iterator[Sample]:
        # A model that was trained with full attention is hashed here for the first time.
        hashes = attending.n_hashes is not None and "lsh" not in self._kinds
        totals = {"nll_nats": 0.0, "correct": 0.0, "scored": 0.0}
        rows = self.spec.train.batch_size
        with self.ours.attending(
            kind="lsh" if hashes else attending.kind,
            n_hashes=attending.n_hashes,
            hash_seed=attending.hash_seed,
        ):
            for start in range(0, len(evaluation.tokens), rows):
                part = Batch(
                    evaluation.tokens[start : start + rows], evaluation.targets[start : start + rows]
                )
                with autocast(self.spec.device, self.spec.dtype):
                    scores = self.ours.score(*self._to_device(part))
                for name, value in scores._asdict().items():
                    totals[name] += float(value)
        for name, value in totals.items():
            unit = "nats" if name == "nll_nats" else "tokens"
            yield Sample(metric=name, unit=unit, values=(value,), at=at)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        return tokens.to(self.device), targets.to(self.device)


def open_session(spec: TrialSpec, *, implementation: str = OURS) -> Session:
    """Build the model, ours or a peer's, its optimizer and its data; parameters depend on the seed alone."""
    device = torch.device(spec.device)
    # This process belongs to the trial: the global stream is its own, for initialisation and dropout.
    torch.manual_seed(stream_seed("parameters", spec.seed))
    ours = implementation == OURS
    model = ReformerLM(spec.reformer_config()) if ours else PEERS[implementation].build_model(spec)
    model = model.to(device)
    torch.manual_seed(stream_seed("dropout", spec.seed))
    return Session(
        spec=spec,
        device=device,
        model=model,
        optimizer=_optimizer(spec.train, model),
        scaler=torch.amp.GradScaler(spec.device, enabled=spec.dtype == "float16"),
    )


def stream_seed(name: str, seed: int) -> int:
    """A seed of its own for every use of the trial's seed."""
    return int.from_bytes(hashlib.sha256(f"{name}:{seed}".encode()).digest()[:7], "big")


def learning_rate(train: TrainSpec, step: int) -> float:
    """Linear warm-up to a constant rate.

    Args:
        train: the rate and the length of the warm-up.
        step: from 0.
    """
    return train.lr * min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else train.lr


def step_sizes(session: Session) -> tuple[Sample, ...]:
    """What a step is made of: its tokens, and the parameters of the model."""
    train, task = session.spec.train, session.spec.task
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    return (
        Sample(metric="tokens_per_step", unit="tokens", values=(float(train.batch_size * task.length),)),
        Sample(metric="parameters", unit="count", values=(float(parameters),)),
    )


def _optimizer(train: TrainSpec, model: nn.Module) -> torch.optim.Optimizer:
    parameters = model.parameters()
    common: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay, "fused": True}
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=train.beta1, **common)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, betas=(train.beta1, train.beta2), **common)
