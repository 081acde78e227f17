"""What one trial is: the intent, decoded and checked, executed elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.devices import DEVICES, DTYPES
from harness.record import MOST_REPLICATES
from harness.tasks.task import Task
from harness.workloads.workload import OMITTED, Workload
from reformer import HashFamily, ReformerConfig
from reformer.attention.modules import Attending
from reformer.attention.options import at_least
from reformer.attention.oracle import LONGEST as LONGEST_ORACLE
from reformer.config import ATTENTION_KINDS
from reformer.hashing import Buckets

OPTIMIZERS = ("adamw", "adam", "sgd")
#: More than any machine has; the runtime of torch dies of far more.
MOST_THREADS = 1024
CONTROLS = ("full", "oracle", "random", "knock_out")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The `attention` group: the kind, and the switches of LSH (see `reformer.lsh_attention`)."""

    kind: str
    n_hashes: int
    n_buckets: Buckets | None
    chunk_length: int
    n_chunks_before: int
    n_chunks_after: int | None
    causality: str
    duplicates: str
    seams: str
    logit_scale: str
    hash_dropout: float
    backend: str

    def __post_init__(self) -> None:
        _one_of("attention.kind", self.kind, ATTENTION_KINDS)


@dataclass(frozen=True, kw_only=True)
class LocalSpec:
    """The window of `local` layers."""

    chunk_length: int | None
    n_chunks_before: int

    def __post_init__(self) -> None:
        if self.chunk_length is not None:
            at_least("local.chunk_length", self.chunk_length, 1)
        at_least("local.n_chunks_before", self.n_chunks_before, 0)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The `model` group (see `reformer.ReformerConfig`); `max_length` None is the task's length."""

    d_model: int
    d_ff: int | None
    n_heads: int
    d_head: int | None
    n_layers: int
    layers: tuple[str, ...]
    residual: str
    grid_bits: int
    positions: str
    axial_shape: tuple[int, int] | None
    axial_dims: tuple[int, int] | None
    max_length: int | None
    norm: str
    norm_eps: float
    activation: str
    heads_at_once: int | None
    ff_chunk_length: int | None
    loss_chunk_length: int | None
    dropout: float
    attention_dropout: float
    merge: str
    tie_weights: bool
    embedding_std: float


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How weights are trained.

    Args:
        steps: training steps.
        batch_size: sequences a step.
        lr: learning rate after warm-up.
        warmup_steps: steps over which it rises from 0.
        weight_decay: decoupled for `adamw`.
        clip: largest gradient norm; 0 does not clip.
        optimizer: `adamw`, `adam` or `sgd`.
        beta1, beta2: moments of the Adam kinds; `beta1` is also the momentum of `sgd`.
        save_weights: whether the trained weights are kept beside the record, for `harness evaluate`.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    weight_decay: float
    clip: float
    optimizer: str
    beta1: float
    beta2: float
    save_weights: bool = field(default=False, metadata={OMITTED: True})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "warmup_steps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: give 0 ≤ {name} < 1")
        _one_of("train.optimizer", self.optimizer, OPTIMIZERS)


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """Other settings that the trained weights are evaluated under.

    Args:
        n_hashes: hash rounds.
        hash_seeds: every setting that hashes is evaluated once a seed.
        controls: `full` attention, the `oracle`, `random` buckets, attention `knock_out`.
    """

    n_hashes: tuple[int, ...]
    hash_seeds: tuple[int, ...]
    controls: tuple[str, ...]

    def __post_init__(self) -> None:
        for rounds in self.n_hashes:
            if rounds < 1:
                raise ValueError(f"evaluate.n_hashes={list(self.n_hashes)}: each must be at least 1")
        if not self.hash_seeds:
            raise ValueError("evaluate.hash_seeds=[]: give at least one seed, for example [0]")
        for control in self.controls:
            _one_of("evaluate.controls", control, CONTROLS)

    def settings(self) -> list[tuple[dict[str, int | str], Attending]]:
        """Each setting with its place in the grid."""
        grid: list[tuple[dict[str, int | str], Attending]] = []
        for rounds in self.n_hashes:
            for seed in self.hash_seeds:
                grid.append(
                    ({"n_hashes": rounds, "hash_seed": seed}, Attending(n_hashes=rounds, hash_seed=seed))
                )
        for control in self.controls:
            for hash_seed in self.hash_seeds if control == "random" else (None,):
                at: dict[str, int | str] = {"attention": control}
                if hash_seed is not None:
                    at["hash_seed"] = hash_seed
                grid.append((at, Attending(kind=control, hash_seed=hash_seed)))
        return grid


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: everything that changes its numbers, and nothing else.

    Args:
        dtype: `float32`; `bfloat16` or `float16` run under autocast over float32 parameters.
        threads: CPU threads of the trial.
        seed: feeds parameters, data and hash rotations through separate streams.
        repeat: 0, 1, … tells replicates of one spec apart.
    """

    attention: AttentionSpec
    hashing: HashFamily
    local: LocalSpec
    model: ModelSpec
    task: Task
    workload: Workload
    train: TrainSpec
    evaluate: EvaluateSpec
    device: str
    dtype: str
    threads: int
    seed: int
    repeat: int

    def __post_init__(self) -> None:
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, tuple(DTYPES))
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}: must be at least 1")
        if self.threads > MOST_THREADS:
            raise ValueError(f"threads={self.threads}: must be at most {MOST_THREADS}")
        for name in ("seed", "repeat"):
            if not 0 <= getattr(self, name) < MOST_REPLICATES:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 ≤ {name} < 2**31")
        if self.train.save_weights and not self.workload.trains:
            raise ValueError("train.save_weights=true: this workload trains no weights to keep; use false")
        _ = self.backend
        if "oracle" in self.evaluate.controls and self.task.length > LONGEST_ORACLE:
            raise ValueError(
                f"evaluate.controls={list(self.evaluate.controls)}: the oracle holds every pair of at most "
                f"{LONGEST_ORACLE} tokens, and task.length={self.task.length}; leave it out or use a shorter "
                "task"
            )

    @property
    def backend(self) -> str:
        """What computes the attention of this trial; empty where there is one way only."""
        return self.workload.backend(self)

    def reformer_config(self) -> ReformerConfig:
        """The model of this trial.

        Raises:
            ValueError: names the value, the rule and the mend.
        """
        max_length = self.model.max_length if self.model.max_length is not None else self.task.length
        if max_length < self.task.length:
            raise ValueError(
                f"model.max_length={max_length}: shorter than task.length={self.task.length}; "
                f"use model.max_length={self.task.length} or null"
            )
        return ReformerConfig(
            vocab_size=self.task.vocab_size,
            max_length=max_length,
            d_model=self.model.d_model,
            d_ff=self.model.d_ff,
            n_heads=self.model.n_heads,
            d_head=self.model.d_head,
            n_layers=self.model.n_layers,
            layers=self.model.layers,
            n_hashes=self.attention.n_hashes,
            n_buckets=self.attention.n_buckets,
            chunk_length=self.attention.chunk_length,
            n_chunks_before=self.attention.n_chunks_before,
            n_chunks_after=self.attention.n_chunks_after,
            causality=self.attention.causality,
            duplicates=self.attention.duplicates,
            seams=self.attention.seams,
            logit_scale=self.attention.logit_scale,
            hashing=self.hashing,
            hash_dropout=self.attention.hash_dropout,
            backend=self.attention.backend,
            local_chunk_length=self.local.chunk_length,
            local_n_chunks_before=self.local.n_chunks_before,
            residual=self.model.residual,
            grid_bits=self.model.grid_bits,
            positions=self.model.positions,
            axial_shape=self.model.axial_shape,
            axial_dims=self.model.axial_dims,
            norm=self.model.norm,
            norm_eps=self.model.norm_eps,
            activation=self.model.activation,
            dropout=self.model.dropout,
            attention_dropout=self.model.attention_dropout,
            heads_at_once=self.model.heads_at_once,
            ff_chunk_length=self.model.ff_chunk_length,
            loss_chunk_length=self.model.loss_chunk_length,
            tie_weights=self.model.tie_weights,
            merge=self.model.merge,
            hash_seed=self.seed,
            embedding_std=self.model.embedding_std,
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use one of {', '.join(choices)}")
