"""What a training step costs, from integers alone: operations, and bytes held, moment by moment.

A step is played on a ledger. Each function below that bears the name of a piece of the model is its twin. In
that piece's order it lists the tensors that are made, and those that go once they are used up (`make`), the
ones that are alive for a moment (`need`), the ones that backward alone still asks for (`release`: they stay
where something is kept for it, and go elsewhere), and the products of matrices (`multiply`). What is left
after forward is what backward needs; the most that is ever held is the peak. Left out is what is small beside
them: masks of a row, means, single numbers.

The twins follow the reference backend in float32, at any step but the first, in which an optimizer makes its
states. Nothing but the standard library is imported: a config is read by attribute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from reformer.config import ReformerConfig

_Row = TypeVar("_Row")

#: Bytes of a number.
FLOAT, LONG, INT, BOOL = 4, 8, 4, 1
#: Bytes of the state of torch's random stream on the CPU.
RANDOM_STATE = 5056
#: Of each optimizer, how many states are as large as the parameters, and how many temporaries as one of them.
OPTIMIZERS = {"adamw": (2, 2), "adam": (2, 2), "sgd": (1, 0)}


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of one training step.

    Operations are by the parts `projections`, `hash`, `attend`, `feed_forward` and `head`. Bytes are also by
    `streams` (residual streams and their gradients), `batch` (tokens and targets), `parameters`, `gradients`
    (of parameters) and `optimizer`.

    Args:
        parameters: numbers that are trained.
        flops_by_phase: operations of `forward`, of `backward`, and of `recompute`, what backward does again.
        flops_by_part: the same operations by part.
        saved_by_part: bytes that forward leaves for backward.
        peaks: bytes held by each part at the fullest moment of `forward`, `backward` and `optimizer`.
    """

    parameters: int
    flops_by_phase: Mapping[str, int]
    flops_by_part: Mapping[str, int]
    saved_by_part: Mapping[str, int]
    peaks: Mapping[str, Mapping[str, int]]

    @property
    def flops(self) -> int:
        """Floating-point operations: 2·n·k·m for a product of n×k and k×m, nothing for all else."""
        return sum(self.flops_by_phase.values())

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved_by_part.values())

    @property
    def peak_phase(self) -> str:
        """The phase with the fullest moment."""
        return max(self.peaks, key=lambda phase: sum(self.peaks[phase].values()))

    @property
    def peak_by_part(self) -> Mapping[str, int]:
        """Bytes held by each part at the fullest moment of the step."""
        return self.peaks[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak_by_part.values())


def step_cost(
    config: ReformerConfig, *, batch: int, seq: int, optimizer: str = "adamw", threads: int = 1
) -> StepCost:
    """What a step of training a language model costs.

    A million tokens, 6 layers of width 256: teraflops, and GiB kept for backward and at the peak.

    >>> from reformer import ReformerConfig
    >>> sizes = {"vocab_size": 256, "max_length": 2**20, "d_model": 256, "n_layers": 6, "n_hashes": 1}
    >>> blocks = {"positions": "axial", "ff_chunk_length": 4096, "loss_chunk_length": 4096}
    >>> for residual in ("plain", "reversible"):
    ...     config = ReformerConfig(residual=residual, **sizes, **blocks)
    ...     cost = step_cost(config, batch=1, seq=2**20)
    ...     print(residual, cost.flops // 10**12, cost.saved_bytes >> 30, cost.peak_bytes >> 30)
    plain 34 98 100
    reversible 44 4 27

    Args:
        config: anything with the attributes of a `ReformerConfig`.
        batch: sequences a step.
        seq: tokens a sequence.
        optimizer: `adamw`, `adam` or `sgd` (with momentum).
        threads: CPU threads; each has scratch memory in full attention.

    Raises:
        ValueError: an optimizer or a hash family whose cost is not known.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    states, temporaries = OPTIMIZERS[optimizer]
    ledger = _Ledger()
    s = _Step(config, batch, seq, threads, ledger)
    sizes = _parameters(s)
    s.part("parameters").make(all=FLOAT * sum(sizes))
    s.part("optimizer").make(states=states * FLOAT * sum(sizes))
    s.part("batch").make(tokens=LONG * s.tokens, targets=LONG * s.tokens)
    between_steps = Counter(ledger.held)

    _embed(s)
    _run_stack(s)
    _loss(s)
    saved = ledger.held - between_steps
    ledger.phase = "backward"
    _loss_backward(s)
    _run_stack_backward(s)
    _embed_backward(s)
    ledger.phase = "optimizer"
    s.part("optimizer").need(temporaries=temporaries * FLOAT * max(sizes))
    s.part("gradients").clear()
    assert ledger.held == between_steps, f"held after the step: {ledger.held - between_steps}"
    return StepCost(
        parameters=sum(sizes),
        flops_by_phase=ledger.flops(by="phase"),
        flops_by_part=ledger.flops(by="part"),
        saved_by_part=dict(saved),
        peaks=ledger.peaks,
    )


# The ledger.


@dataclass
class _Ledger:
    """Bytes held and operations done so far.

    Args:
        phase: whose peak is being taken.
        held: bytes held now, by part.
        peaks: bytes held at the fullest moment of each phase, by part.
        keeping: whether what is computed now is kept for backward.
        again: whether what is computed now was computed before.
    """

    phase: str = "forward"
    held: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, Mapping[str, int]] = field(default_factory=dict)
    keeping: bool = True
    again: bool = False
    _tensors: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    _flops: Counter[tuple[str, str]] = field(default_factory=Counter)

    @contextmanager
    def computing(self, *, keeping: bool, again: bool = False) -> Iterator[None]:
        """Whether what is computed inside is kept for backward, and whether it was computed before."""
        before = self.keeping, self.again
        self.keeping, self.again = keeping, again or self.again
        yield
        self.keeping, self.again = before

    def hold(self, part: str, tensors: Mapping[str, int]) -> None:
        for name, size in tensors.items():
            self._tensors.setdefault(part, {}).setdefault(name, []).append(size)
            self.held[part] += size
        if self.held.total() > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(+self.held)

    def drop(self, part: str, name: str) -> None:
        self.held[part] -= self._tensors[part][name].pop()

    def clear(self, part: str) -> None:
        self._tensors.pop(part, None)
        self.held.pop(part, None)

    def multiply(self, part: str, flops: int) -> None:
        self._flops["recompute" if self.again else self.phase, part] += flops

    def flops(self, *, by: str) -> dict[str, int]:
        """Operations so far, by `phase` or by `part`."""
        totals: Counter[str] = Counter()
        for (phase, part), count in self._flops.items():
            totals[phase if by == "phase" else part] += count
        return dict(totals)


@dataclass(frozen=True)
class _Part:
    """The page of one part of the model in the ledger."""

    ledger: _Ledger
    name: str

    def make(self, *used_up: str, **tensors: int) -> None:
        """Make tensors of so many bytes, all alive at once, and only then let go of what is used up."""
        self.ledger.hold(self.name, tensors)
        self.drop(*used_up)

    def need(self, **tensors: int) -> None:
        """Tensors that are alive for this moment."""
        self.make(*tensors, **tensors)

    def drop(self, *names: str) -> None:
        """Let go; of several tensors of a name, the last."""
        for name in names:
            self.ledger.drop(self.name, name)

    def release(self, *names: str) -> None:
        """Let go, unless kept for backward."""
        if not self.ledger.keeping:
            self.drop(*names)

    def clear(self) -> None:
        """Let go of everything."""
        self.ledger.clear(self.name)

    def multiply(self, rows: int, inner: int, columns: int, *, times: int = 1) -> None:
        """Products of matrices rows×inner and inner×columns."""
        self.ledger.multiply(self.name, 2 * rows * inner * columns * times)


# Sizes.


@dataclass(frozen=True)
class _Step:
    """A config at work on a batch, and the ledger of it."""

    config: ReformerConfig
    batch: int
    seq: int
    threads: int
    ledger: _Ledger

    def part(self, name: str) -> _Part:
        return _Part(self.ledger, name)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def stream(self) -> int:
        """Bytes of a residual stream."""
        return FLOAT * self.tokens * self.config.d_model

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.config.n_heads * self.config.head_width

    @property
    def heads(self) -> int:
        """Bytes of one row for each token and head."""
        return FLOAT * self.tokens * self.width

    @property
    def branches(self) -> list[str]:
        """What is added to the streams, in turn: attention of some kind, then feed-forward."""
        kinds = [self.config.kind(layer) for layer in range(self.config.n_layers)]
        return [branch for kind in kinds for branch in (kind, "feed_forward")]

    def rows(self, length: int | None) -> int:
        """Rows at once, over the batch, of what is computed in blocks of `length` tokens."""
        return self.batch * min(self.seq, length or self.seq)

    def windows(self, kind: str) -> _Windows:
        """Who meets whom in attention of a kind."""
        c = self.config
        if kind not in ("lsh", "local"):
            return _Windows(self, 1, 1, self.seq, 1)
        rounds, length, before, after = c.n_hashes, c.chunk_length, c.n_chunks_before, c.n_chunks_after
        if kind == "local":
            rounds, length = 1, c.local_chunk_length or c.chunk_length
            before, after = c.local_n_chunks_before, c.local_n_chunks_after
        chunks, after = -(-self.seq // length), _after(c, after)
        views = min(before, chunks - 1) + 1 + min(after, chunks - 1)
        if kind == "lsh" and _wraps(c):
            views = min(before + 1 + after, chunks * rounds)
        return _Windows(self, rounds, chunks, length, views)


@dataclass(frozen=True)
class _Windows:
    """Chunks of queries, and the chunks of keys that each one sees.

    Args:
        step: what they are part of.
        rounds: orders of the tokens, which come one after the other.
        chunks: chunks a round.
        length: tokens a chunk.
        views: chunks that a chunk sees, its own among them.
    """

    step: _Step
    rounds: int
    chunks: int
    length: int
    views: int

    @property
    def window(self) -> int:
        """Keys that a query meets."""
        return self.views * self.length

    @property
    def slots(self) -> int:
        """Tokens, the last chunk filled up, of every round, head and batch row."""
        return self.step.batch * self.step.config.n_heads * self.rounds * self.chunks * self.length

    @property
    def pairs(self) -> int:
        """Queries and keys that meet."""
        return self.slots * self.window

    @property
    def scores(self) -> int:
        """Bytes of a number a pair."""
        return FLOAT * self.pairs

    @property
    def rows(self) -> int:
        """Bytes of one row a slot."""
        return FLOAT * self.slots * self.step.config.head_width

    @property
    def seen(self) -> int:
        """Bytes of one row for each slot that each chunk sees."""
        return self.views * self.rows

    @property
    def filled(self) -> int:
        """Bytes of one row a token and head, if they are copied to be filled up."""
        return self.rows // self.rounds if self.chunks * self.length != self.step.seq else 0


def _parameters(s: _Step) -> list[int]:
    """Numbers in each parameter."""
    c, d, d_ff, gates = s.config, s.config.d_model, s.config.feed_forward_width, _gates(s.config)
    sizes = [c.vocab_size * d, *_position_parameters(c)]
    for branch in s.branches:
        sizes += [d] * _norms(c)
        if branch == "feed_forward":
            sizes += [d * d_ff * gates, d_ff * gates, d_ff * d, d]
        else:
            sizes += [d * s.width] * (len(_projections(branch)) + 1)
    weight = [] if c.tie_weights else [c.joined_width * c.vocab_size]
    return [*sizes, *[c.joined_width] * _norms(c), *weight, c.vocab_size]


def _position_parameters(c: ReformerConfig) -> list[int]:
    if c.positions == "axial":
        return [side * width for side, width in zip(c.axial_grid, c.axial_split, strict=True)]
    return [c.max_length * c.d_model] if c.positions == "learned" else []


def _norms(c: ReformerConfig) -> int:
    """Numbers that a norm has for each coordinate: a scale, and where it takes a mean off, a shift."""
    return 1 if c.norm == "rms_norm" else 2


def _gates(c: ReformerConfig) -> int:
    """Matrices that go into the wide layer."""
    return 2 if c.activation in ("swiglu", "geglu") else 1


def _projections(kind: str) -> tuple[str, ...]:
    """What attention of a kind projects its input to."""
    return ("query_key", "value") if _shares(kind) else ("query", "key", "value")


def _shares(kind: str) -> bool:
    """Whether queries and keys are one projection."""
    return kind in ("lsh", "full", "oracle")


def _after(c: ReformerConfig, n_chunks_after: int | None) -> int:
    return n_chunks_after if n_chunks_after is not None else (0 if c.causal else 1)


def _strict(c: ReformerConfig) -> bool:
    return c.causal and c.causality == "strict"


def _wraps(c: ReformerConfig) -> bool:
    """Whether windows roll over all rounds."""
    return c.seams == "reference" and not _strict(c)


# Stacks. Streams are of one size, and so are their gradients: they are counted, not told apart. A branch
# leaves its output as `branch`, its backward pass the gradient of what it was made from as `gradient`. The
# gradients of both last streams are one tensor, `joined`.


def _run_stack(s: _Step) -> None:
    """`reformer.stacks.run_stack`: from the embedding to two streams."""
    streams, residual = s.part("streams"), s.config.residual
    with s.ledger.computing(keeping=residual == "plain"):
        for index, branch in enumerate(s.branches):
            _run_branch(s, branch)
            streams.make("branch", stream=s.stream)
            if residual == "plain" and branch == "lsh":
                s.part("hash").drop("buckets")
            if residual.startswith("reversible") and index >= 2:
                streams.drop("stream")
    if residual.startswith("reversible"):
        # The embedding, which both streams start as.
        streams.drop("stream")
    # What is run again draws again; a block as a whole, or each branch.
    runs = {"plain": 0, "checkpoint": s.config.n_layers}.get(residual, len(s.branches))
    streams.make(random=RANDOM_STATE * runs if s.config.dropout or s.config.attention_dropout else 0)


def _run_stack_backward(s: _Step) -> None:
    """From the gradients of both streams to that of the embedding."""
    if s.config.residual == "plain":
        _plain_backward(s)
    elif s.config.residual == "checkpoint":
        _checkpointed_backward(s)
    else:
        _reversible_backward(s)
    s.part("streams").drop("random")
    s.part("streams").make("gradient", "gradient", gradient=s.stream)


def _plain_backward(s: _Step) -> None:
    """`reformer.stacks.run_plain`, backwards."""
    streams = s.part("streams")
    for index, branch in enumerate(reversed(s.branches)):
        _run_branch_backward(s, branch)
        streams.drop("stream")
        # The sum, and then neither of its terms.
        streams.make("gradient", gradient=s.stream)
        if index == 1:
            streams.drop("joined")
        elif index > 1:
            streams.drop("gradient")


def _checkpointed_backward(s: _Step) -> None:
    """`reformer.checkpointing`: a block runs again, and then backwards."""
    streams = s.part("streams")
    for layer in reversed(range(s.config.n_layers)):
        block = s.branches[2 * layer : 2 * layer + 2]
        with s.ledger.computing(keeping=True, again=True):
            for branch in block:
                _run_branch(s, branch, hashed=True)
                streams.make("branch", stream=s.stream)
        for branch in reversed(block):
            _run_branch_backward(s, branch)
            streams.make("gradient", gradient=s.stream)
        # The streams out of the block and into it, and the gradients of those out of it.
        streams.drop(*["stream"] * (4 if layer > 0 else 3))
        if layer == s.config.n_layers - 1:
            streams.drop("joined")
        else:
            streams.drop("gradient", "gradient")
        if "lsh" in block:
            s.part("hash").drop("buckets")


def _reversible_backward(s: _Step) -> None:
    """`reformer.reversible`: a branch runs again and backwards, and is taken off its stream.

    The outputs of the stack and their gradients are there to the end. The output of a branch, and the
    gradient that it adds to its stream, are there until the next branch gives its own.
    """
    streams = s.part("streams")
    for index, branch in enumerate(reversed(s.branches)):
        with s.ledger.computing(keeping=True, again=True):
            _run_branch(s, branch, hashed=True)
        if index > 0:
            streams.drop("branch")
        _run_branch_backward(s, branch)
        if index > 0:
            streams.drop("gradient")
        streams.make(stream=s.stream)
        streams.make(gradient=s.stream)
        if index > 1:
            streams.drop("stream", "gradient")
    streams.drop("branch", "gradient", "joined", *["stream"] * 4)
    s.part("hash").clear()


def _run_branch(s: _Step, branch: str, *, hashed: bool = False) -> None:
    """`reformer.layer.Branch`; `hashed`: its buckets are there already."""
    if branch == "feed_forward":
        _feed(s)
    else:
        _attend(s, branch, hashed=hashed)


def _run_branch_backward(s: _Step, branch: str) -> None:
    if branch == "feed_forward":
        _feed_backward(s)
    else:
        _attend_backward(s, branch)


# Embedding and language-model head.


def _embed(s: _Step) -> None:
    """`Trunk._embed`: tokens, and positions on them."""
    streams = s.part("streams")
    streams.make(stream=s.stream)
    if s.config.positions != "rotary":
        streams.need(with_positions=s.stream)
    _dropout(s, streams, s.stream)


def _embed_backward(s: _Step) -> None:
    streams, gradients = s.part("streams"), s.part("gradients")
    _dropout_backward(s, streams, s.stream)
    gradients.make(positions=FLOAT * sum(_position_parameters(s.config)))
    gradients.need(by_position=s.stream // s.batch)
    gradients.make(embedding=FLOAT * s.config.vocab_size * s.config.d_model)
    if s.config.tie_weights:
        gradients.drop("weight")
    streams.drop("gradient")


def _loss(s: _Step) -> None:
    """`merge_streams` and `LanguageModelHead.loss`."""
    c = s.config
    s.part("head").make(joined=FLOAT * s.tokens * c.joined_width)
    # Kept is what enters a branch, or a block; of reversible streams both that leave.
    s.part("streams").drop(*["stream"] * {"plain": 1, "checkpoint": 2}.get(c.residual, 0))
    with s.ledger.computing(keeping=s.rows(c.loss_chunk_length) == s.tokens):
        _score(s)


def _score(s: _Step) -> None:
    """`Head._sum`: the tensors of a block of rows, the products of all blocks."""
    head, rows, c = s.part("head"), s.rows(s.config.loss_chunk_length), s.config
    normed, logits = FLOAT * rows * c.joined_width, FLOAT * rows * c.vocab_size
    _norm(s, head, normed)
    _dropout(s, head, normed)
    head.multiply(s.tokens, c.joined_width, c.vocab_size)
    head.make(logits=logits)
    _release_normed(s, head)
    head.make("logits", log_softmax=logits)
    head.release("log_softmax")


def _loss_backward(s: _Step) -> None:
    head, gradients, c = s.part("head"), s.part("gradients"), s.config
    rows = s.rows(c.loss_chunk_length)
    normed, joined = FLOAT * rows * c.joined_width, FLOAT * s.tokens * c.joined_width
    logits, weight = FLOAT * rows * c.vocab_size, FLOAT * c.joined_width * c.vocab_size
    # Of several blocks the last one, when the gradients of the others' rows and weights are there.
    in_blocks = rows < s.tokens
    if in_blocks:
        head.make(others=joined - normed)
        gradients.make(weight=weight)
        with s.ledger.computing(keeping=True, again=True):
            _score(s)
    head.make("log_softmax", dlog_softmax=logits, dlogits=logits)
    head.drop("dlog_softmax")
    head.multiply(s.tokens, c.joined_width, c.vocab_size, times=2)
    add_gradients = gradients.need if in_blocks else gradients.make
    add_gradients(weight=weight)
    head.make("dlogits", dnormed=normed)
    _dropout_backward(s, head, normed)
    _norm_backward(s, head, normed)
    gradients.make(rest=FLOAT * (c.joined_width * _norms(c) + c.vocab_size))
    head.drop("joined")
    head.need(together=joined)
    if in_blocks:
        head.drop("others")
    s.part("streams").make(joined=joined)


# Norms and dropout, wherever they are.


def _norm(s: _Step, part: _Part, size: int) -> None:
    """Of a norm without a mean, torch also keeps what is not scaled yet."""
    part.make(normed=size, **({"unscaled": size} if s.config.norm == "rms_norm" else {}))


def _release_normed(s: _Step, part: _Part) -> None:
    part.release("normed", *["unscaled"] if s.config.norm == "rms_norm" else [])


def _norm_backward(s: _Step, part: _Part, size: int) -> None:
    """From `dnormed` to the gradient of the input, which the caller makes."""
    part.drop("normed")
    if s.config.norm == "rms_norm":
        part.make("dnormed", "unscaled", by_scale=2 * size)
        part.drop("by_scale")
        # By the value itself, and through the mean square in four steps.
        part.need(by_value=size, by_mean=4 * size)
    else:
        part.need(dinput=size)
        part.drop("dnormed")


def _dropout(s: _Step, part: _Part, size: int) -> None:
    """Kept is a factor for every number."""
    if s.config.dropout:
        part.make(factors=size)
        part.need(dropped=size)
        part.release("factors")


def _dropout_backward(s: _Step, part: _Part, size: int) -> None:
    if s.config.dropout:
        part.need(dropped=size)
        part.drop("factors")


# Feed-forward.


def _feed(s: _Step) -> None:
    """`Block.feed`: norm, feed-forward, dropout."""
    part, rows = s.part("feed_forward"), s.rows(s.config.ff_chunk_length)
    _norm(s, part, s.stream)
    # Of several blocks the last one, when the outputs of the others are there.
    in_blocks = rows < s.tokens
    if in_blocks:
        part.make(others=s.stream - FLOAT * rows * s.config.d_model)
    with s.ledger.computing(keeping=s.ledger.keeping and not in_blocks):
        _feed_rows(s)
    if in_blocks:
        part.need(together=s.stream)
        part.drop("others")
    part.drop("out")
    s.part("streams").make(branch=s.stream)
    _release_normed(s, part)
    _dropout(s, part, s.stream)


def _feed_rows(s: _Step, *, whole: bool = True) -> None:
    """`FeedForward._rows`: the tensors of a block of rows, the products of all blocks.

    A block is not run again as a whole, but up to the last tensor that backward asks for.
    """
    part, c, rows = s.part("feed_forward"), s.config, s.rows(s.config.ff_chunk_length)
    wide, gates = FLOAT * rows * c.feed_forward_width, _gates(c)
    part.multiply(s.tokens, c.d_model, c.feed_forward_width, times=gates)
    if gates > 1:
        part.make(wide=2 * wide, gate=wide, inner=wide)
        part.release("gate", "wide")
    else:
        part.make(wide=wide, inner=wide)
        if _keeps_wide(c):
            part.release("wide")
        else:
            part.drop("wide")
    _dropout(s, part, wide)
    if whole:
        part.multiply(s.tokens, c.feed_forward_width, c.d_model)
        part.make(out=FLOAT * rows * c.d_model)
        part.release("inner")


def _keeps_wide(c: ReformerConfig) -> bool:
    """Whether more is kept than what enters the second matrix. A ReLU asks for nothing but its own output."""
    return c.activation != "relu" or c.dropout > 0


def _feed_backward(s: _Step) -> None:
    part, gradients, c = s.part("feed_forward"), s.part("gradients"), s.config
    rows, d, d_ff, gates = s.rows(c.ff_chunk_length), c.d_model, c.feed_forward_width, _gates(c)
    block, wide = FLOAT * rows * d, FLOAT * rows * d_ff
    narrow_weights, wide_weights = FLOAT * (d_ff * d + d), FLOAT * (d * d_ff + d_ff) * gates
    _dropout_backward(s, part, s.stream)
    # Of several blocks the last one, when the gradients of the others' rows and weights are there.
    in_blocks = rows < s.tokens
    if in_blocks:
        part.make(others=s.stream - block)
        gradients.make(narrow=narrow_weights, wide=wide_weights)
        with s.ledger.computing(keeping=True, again=True):
            _feed_rows(s, whole=False)
    add_gradients = gradients.need if in_blocks else gradients.make
    part.multiply(s.tokens, d_ff, d, times=2)
    part.make(dinner=wide)
    add_gradients(narrow=narrow_weights)
    if _keeps_wide(c):
        part.drop("inner")
    _dropout_backward(s, part, wide)
    if gates > 1:
        part.make("dinner", "gate", dgate=wide, dvalue=wide)
        part.make("dgate", "dvalue", "wide", dwide=2 * wide)
    else:
        part.make("dinner", "wide" if _keeps_wide(c) else "inner", dwide=wide)
    part.multiply(s.tokens, d, d_ff, times=2 * gates)
    part.make(dblock=block)
    add_gradients(wide=wide_weights)
    part.drop("dwide", "dblock")
    part.make(dnormed=s.stream)
    if in_blocks:
        part.drop("others")
    gradients.make(norm=FLOAT * d * _norms(c))
    _norm_backward(s, part, s.stream)
    s.part("streams").make(gradient=s.stream)


# Attention layers.


def _attend(s: _Step, kind: str, *, hashed: bool) -> None:
    """`Block.attend`: norm, projections, attention, output, dropout; `hashed`: its buckets are there."""
    part, names = s.part("projections"), _projections(kind)
    _norm(s, part, s.stream)
    part.multiply(s.tokens, s.config.d_model, s.width, times=len(names))
    part.make(**dict.fromkeys(names, s.heads))
    if s.config.positions == "rotary":
        # All but values are turned, half by half, by a cosine and a sine for each of a head's pairs.
        part.make(angles=(len(names) - 1) * FLOAT * s.seq * s.config.head_width)
        part.need(turned=(len(names) - 1) * s.heads, halves=s.heads)
        part.release("angles")
    if kind == "lsh":
        if not hashed:
            _hash(s)
        _lsh_attention(s)
    elif kind == "local" or s.config.attention_dropout:
        _softmax_attention(s, kind)
    else:
        _flash_attention(s, kind)
    part.multiply(s.tokens, s.width, s.config.d_model)
    s.part("streams").make(branch=s.stream)
    kept = _kept_projections(s, kind)
    part.drop(*(name for name in names if name not in kept))
    part.release("merged", *kept)
    _release_normed(s, part)
    _dropout(s, part, s.stream)


def _attend_backward(s: _Step, kind: str) -> None:
    part, gradients, names = s.part("projections"), s.part("gradients"), _projections(kind)
    weight = FLOAT * s.config.d_model * s.width
    _dropout_backward(s, part, s.stream)
    part.multiply(s.tokens, s.width, s.config.d_model, times=2)
    part.make(dmerged=s.heads)
    gradients.make(output=weight)
    if kind == "lsh":
        _lsh_attention_backward(s)
    elif kind == "local" or s.config.attention_dropout:
        _softmax_attention_backward(s, kind)
    else:
        _flash_attention_backward(s, kind)
    part.drop(*_kept_projections(s, kind))
    if s.config.positions == "rotary":
        part.drop("angles")
    part.multiply(s.tokens, s.config.d_model, s.width, times=2 * len(names))
    part.make(dnormed=s.stream)
    part.need(by_another=s.stream)
    gradients.make(projections=weight * len(names), norm=FLOAT * s.config.d_model * _norms(s.config))
    part.drop(*(f"d{name}" for name in names))
    _norm_backward(s, part, s.stream)
    s.part("streams").make(gradient=s.stream)


def _kept_projections(s: _Step, kind: str) -> list[str]:
    """Projections that attention keeps; of the others it keeps copies in an order of its own."""
    copied = kind in ("lsh", "local") or s.config.attention_dropout
    return [name for name in _projections(kind) if name == "query_key" or not copied]


# Hashing.


def _hash(s: _Step) -> None:
    """`SharedQueryKeyAttention._hash`."""
    part, (columns, bytes_a_slot) = s.part("hash"), _hash_family(s.config)
    slots = s.tokens * s.config.n_heads * s.config.n_hashes
    part.multiply(slots, s.config.head_width, columns)
    part.need(vectors=2 * s.heads if s.config.hash_dropout else 0, ids=(bytes_a_slot + LONG) * slots)
    part.make(buckets=INT * slots)


def _hash_family(c: ReformerConfig) -> tuple[int, int]:
    """Columns of the matrix that vectors are multiplied by, and bytes a token and round at the fullest.

    Raises:
        ValueError: a family that is not known here.
    """
    name, count = type(c.hashing).__name__, c.bucket_count
    factors = count if isinstance(count, tuple) else (count,)
    axes = sum(factor // 2 for factor in factors)
    bits = sum(factor.bit_length() - 1 for factor in factors)
    # The largest and the smallest coordinate, where they are, and the ids that follow.
    nearest = 2 * (FLOAT + LONG) + 2 * LONG
    number = (BOOL + LONG) * bits
    if name == "CrossPolytope":
        return axes, FLOAT * axes + nearest
    if name in ("Hyperplane", "OrthogonalHyperplane"):
        return bits, number
    if name == "Syndrome":
        return bits, FLOAT * bits + number
    if name == "BitSampling":
        return 0, number
    # A stage of a Hadamard transform has its input, the two halves of its output, and these together; beside
    # it is what the transform began with.
    if name == "Codeword":
        return 0, (BOOL + 4 * FLOAT) * axes
    if name == "HadamardCrossPolytope":
        size = 1 << (c.head_width - 1).bit_length()
        return 0, 4 * FLOAT * size * -(-axes // size)
    if name == "Random":
        return 0, 0
    raise ValueError(f"hashing={c.hashing!r}: its cost is not known; add it to `_hash_family` in cost.py")


# LSH attention.


def _lsh_attention(s: _Step) -> None:
    """`reformer.attention.lsh.attend`."""
    part, w, dim = s.part("attend"), s.windows("lsh"), s.config.head_width
    part.make(order=2 * LONG * w.slots, buckets=LONG * w.slots)
    _unit_keys(s, part)
    # Queries and keys side by side, filled up, in the order of each round; then values.
    part.make(joined=2 * s.heads)
    part.make("joined", filled=2 * w.filled, rows=2 * w.rows)
    part.drop("filled")
    part.make(filled=w.filled, values=w.rows)
    part.drop("filled")
    _look_around(part, w, "window_keys")
    part.multiply(w.slots, dim, w.window)
    part.make(scores=w.scores)
    _mask(s, w)
    part.make(weights=w.scores)
    _drop_weights(s, w)
    _look_around(part, w, "window_values")
    part.multiply(w.slots, w.window, dim)
    part.make("scores", attended=w.rows)
    part.release("window_values", "window_keys", "weights", "hidden", "own")
    # Back in the order of the sequence, weighted, and added up over rounds.
    part.make("attended", unsorted=w.rows)
    part.need(weighted=w.rows, combined=w.rows // w.rounds)
    part.need(combined=w.rows // w.rounds, out=s.heads)
    part.drop("keys", "values", "buckets")
    part.release("unsorted", "rows", "order")
    part.make(out=s.heads)
    s.part("projections").make(merged=s.heads)
    part.drop("out")


def _lsh_attention_backward(s: _Step) -> None:
    part, projections, w, dim = s.part("attend"), s.part("projections"), s.windows("lsh"), s.config.head_width
    projections.drop("merged")
    part.make(dout=s.heads)
    projections.drop("dmerged")
    part.make("dout", "unsorted", dunsorted=w.rows, dround_weights=w.rows)
    part.drop("dround_weights")
    part.make("dunsorted", dattended=w.rows)
    part.multiply(w.slots, dim, w.window, times=2)
    part.make("dattended", "window_values", dwindow_values=w.seen, dweights=w.scores)
    _look_around_backward(part, w, "dwindow_values", "dvalues")
    _drop_weights_backward(s, w)
    # The gradient of a softmax takes each row's product of weights and their gradients.
    part.multiply(w.slots, w.window, 1)
    part.make("dweights", "weights", centred=w.scores, dscores=w.scores)
    part.drop("centred")
    # None for pairs that are hidden or oneself: a copy each.
    part.need(masked=w.scores)
    part.drop("own", "hidden")
    part.multiply(w.slots, w.window, dim, times=2)
    part.make("dscores", "window_keys", "rows", dwindow_keys=w.seen, dqueries=w.rows)
    _look_around_backward(part, w, "dwindow_keys", "dkeys")
    part.make("dqueries", "dkeys", drows=2 * w.rows)
    part.make(unsorted=w.rows)
    projections.make(dvalue=s.heads)
    part.drop("unsorted", "dvalues")
    part.make("drows", "order", unsorted=2 * w.rows, djoined=2 * s.heads)
    part.drop("unsorted")
    projections.make(dquery_key=s.heads)
    _unit_keys_backward(s, part)
    part.drop("djoined")


def _mask(s: _Step, w: _Windows) -> None:
    """`windows.window_masks`: which pairs are hidden, and which are a token with itself.

    They are compared by codes, an integer a slot; three of them are alive at once, one for all that is seen.
    """
    part, c = s.part("attend"), s.config
    same_bucket = (c.causal and c.causality != "published") or c.bucket_mask
    if _strict(c):
        # Differences of codes, compared with both ends of the band, the second comparison into the first.
        compared = INT + BOOL
    elif not _wraps(c):
        # Differences compared with both ends of a range, and both answers at once.
        compared = LONG + 3 * BOOL
    elif same_bucket or (c.duplicates == "count" and c.n_hashes > 1):
        # Differences modulo the number of chunks, which takes three of them.
        compared = 3 * LONG + (BOOL if same_bucket else 0)
    else:
        compared = 2 * BOOL
    part.make(hidden=BOOL * w.pairs, own=BOOL * w.pairs)
    part.need(compared=compared * w.pairs, codes=(2 + w.views) * LONG * w.slots)


def _look_around(part: _Part, w: _Windows, name: str) -> None:
    """`chunking.look_around`: other chunks are rolled to where they are seen, then all are joined."""
    part.make(rolled=w.seen - w.rows, **{name: w.seen})
    part.drop("rolled")


def _look_around_backward(part: _Part, w: _Windows, name: str, result: str) -> None:
    part.make(name, rolled=min(w.views - 1, 2) * w.rows, **{result: w.rows})
    part.drop("rolled")


def _unit_keys(s: _Step, part: _Part) -> None:
    """`projection.unit_keys`: divided by a norm, then by a constant."""
    part.make(keys=s.heads)
    part.need(divided=s.heads)


def _unit_keys_backward(s: _Step, part: _Part) -> None:
    """By the value itself, and through the mean square."""
    part.need(by_value=s.heads, by_mean=2 * s.heads)


def _drop_weights(s: _Step, w: _Windows) -> None:
    """Dropout of attention weights: a factor for each is kept, and what is left of it."""
    if s.config.attention_dropout:
        s.part("attend").make(factors=w.scores, dropped=w.scores)
        s.part("attend").release("factors", "dropped")


def _drop_weights_backward(s: _Step, w: _Windows) -> None:
    part = s.part("attend")
    if s.config.attention_dropout:
        part.drop("dropped")
        part.need(masked=w.scores)
        part.drop("factors")


# Local and dense attention.


def _softmax_attention(s: _Step, kind: str) -> None:
    """`scaled_dot_product_attention` where no kernel serves: of chunks, or with dropout."""
    part, w, dim = s.part("attend"), s.windows(kind), s.config.head_width
    if kind == "local":
        # Distances of positions, and what they add to scores.
        part.make(bias=(LONG + FLOAT) * w.chunks * w.length * w.window)
        _look_around(part, w, "unscaled")
        _look_around(part, w, "values")
    else:
        _bias(s, kind)
        part.make(unscaled=s.heads, values=s.heads)
    part.make(copied=w.rows, queries=w.rows, window_keys=w.seen)
    part.multiply(w.slots, dim, w.window)
    part.make(scores=w.scores)
    part.release("queries", "window_keys")
    part.make(weights=w.scores)
    part.need(unseen=BOOL * w.pairs)
    part.drop("scores")
    _drop_weights(s, w)
    part.multiply(w.slots, w.window, dim)
    part.make("bias", "unscaled", "copied", out=w.rows)
    if _shares(kind):
        part.drop("keys")
    if kind == "oracle":
        part.drop("others")
    part.release("weights", "values")
    s.part("projections").make(merged=s.heads)
    part.drop("out")


def _softmax_attention_backward(s: _Step, kind: str) -> None:
    part, projections, w, dim = s.part("attend"), s.part("projections"), s.windows(kind), s.config.head_width
    projections.drop("merged")
    part.make(dout=w.rows)
    projections.drop("dmerged")
    part.multiply(w.slots, dim, w.window, times=2)
    part.make("dout", "values", dwindow_values=w.seen, dweights=w.scores)
    _drop_weights_backward(s, w)
    part.make("dweights", "weights", dscores=w.scores)
    part.multiply(w.slots, w.window, dim, times=2)
    part.make("dscores", "window_keys", "queries", dwindow_keys=w.seen, dqueries=w.rows)
    part.need(scaled=w.seen)
    _look_around_backward(part, w, "dwindow_keys", "dkeys")
    _look_around_backward(part, w, "dwindow_values", "dvalues")
    part.drop("dqueries", "dkeys", "dvalues")
    projections.make(**{f"d{name}": s.heads for name in _projections(kind)})
    if _shares(kind):
        _unit_keys_backward(s, part)


def _flash_attention(s: _Step, kind: str) -> None:
    """`scaled_dot_product_attention` by torch's kernel for the CPU, which holds a block of pairs a thread."""
    part, w = s.part("attend"), s.windows(kind)
    if _shares(kind):
        _bias(s, kind)
    part.multiply(w.slots, s.config.head_width, w.window, times=2)
    s.part("projections").make(merged=s.heads)
    part.need(scratch=_scratch(s))
    if s.config.positions == "rotary":
        # What was turned is laid out head by head, and so is what comes out: `merged` is a copy of it.
        part.make(out=s.heads)
        part.release("out")
    if _shares(kind):
        part.release("bias", "keys")
    if kind == "oracle":
        part.drop("others")


def _flash_attention_backward(s: _Step, kind: str) -> None:
    part, projections, w = s.part("attend"), s.part("projections"), s.windows(kind)
    # The scores again, and the gradients of values, weights, queries and keys.
    part.multiply(w.slots, s.config.head_width, w.window, times=5)
    part.make(scratch=2 * _scratch(s), dquery=s.heads, dkey=s.heads, dvalue=s.heads)
    part.drop("scratch")
    projections.drop("merged", "dmerged")
    if s.config.positions == "rotary":
        part.drop("out")
    if _shares(kind):
        part.drop("bias", "keys")
        _unit_keys_backward(s, part)
    part.drop("dquery", "dkey", "dvalue")
    projections.make(**{f"d{name}": s.heads for name in _projections(kind)})


def _bias(s: _Step, kind: str) -> None:
    """What is added to the scores of dense attention; if queries and keys are shared, keys of unit length."""
    part, square = s.part("attend"), s.seq**2
    part.make(bias=FLOAT * square)
    if _shares(kind):
        part.need(unmasked=FLOAT * square, masks=2 * BOOL * square)
        _unit_keys(s, part)
    if kind == "oracle":
        _hide_all_but_the_largest(s)


def _hide_all_but_the_largest(s: _Step) -> None:
    """`oracle.nearest_alone`: of the scores that may be seen, those below the last one shown are hidden."""
    part, w, c, square = s.part("attend"), s.windows("oracle"), s.config, s.seq**2
    n_chunks = c.n_chunks_before + _after(c, c.n_chunks_after)
    shown = w.slots * min(s.seq, c.n_hashes * n_chunks * c.chunk_length)
    part.multiply(w.slots, c.head_width, w.window)
    # Next to the bias of all heads, that of a token with itself.
    part.drop("bias")
    part.make(shared_bias=2 * FLOAT * square, own=BOOL * square, scores=w.scores)
    part.make("scores", visible=w.scores)
    part.make(largest=FLOAT * shown)
    part.need(places=LONG * shown)
    part.make(below=BOOL * w.pairs, others=w.scores)
    part.drop("below", "largest", "visible")
    part.make("shared_bias", "own", bias=w.scores)


def _scratch(s: _Step) -> int:
    """Bytes of the blocks of scores that threads work on.

    Source: the block sizes in `FlashAttentionKernel.cpp` of torch 2.13.
    """
    queries = 256 if s.seq >= 768 else 64 if s.seq >= 192 else 32
    return FLOAT * s.threads * min(queries, s.seq) * min(512, s.seq)


# The paper's tables.


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """Sizes, by the letters of the paper.

    Args:
        b: batch size.
        l: length of a sequence.
        n_h: heads.
        d_k: width of a head.
        n_r: hash rounds.
        n_c: chunks a round; divides l.
        n_l: layers.
        d_model: width of a residual stream.
        d_ff: width of the feed-forward layer.
    """

    b: int
    l: int  # noqa: E741
    n_h: int
    d_k: int
    n_r: int = 1
    n_c: int = 1
    n_l: int = 1
    d_model: int = 1
    d_ff: int = 1


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """A row of the paper's tables, constants left out, and next to it what is exact.

    Args:
        memory: numbers held, as printed.
        time: operations, as printed.
        pairs: queries and keys that meet in one forward pass of ours.
    """

    memory: int
    time: int
    pairs: int


def attention_complexity(kind: str, p: Symbols) -> Complexity:
    """Table 1: attention variants.

    LSH attention is printed too large, in time and in memory. A chunk has at most (4l/n_c)² pairs, and there
    are n_c chunks; the table multiplies by l instead, which is l/n_c, the length of a chunk, too much. The
    bound adds to that: l/n_c queries meet the 2·l/n_c keys of two chunks. In all, the printed term is 8·l/n_c
    times `pairs`. Memory-efficient attention is printed with all pairs in memory; by the text it holds those
    of one query at a time.

    Args:
        kind: `scaled_dot_product`, `memory_efficient` or `lsh`.
        p: the sizes.

    Raises:
        ValueError: an unknown kind.

    Source: Kitaev, Kaiser, Levskaya 2020, §2, table 1.
    """
    rows, dense = p.b * p.n_h * p.l * p.d_k, p.b * p.n_h * p.l**2
    hashed = p.b * p.n_h * p.n_r * p.l * (4 * p.l // p.n_c) ** 2
    pairs = p.b * p.n_h * p.n_r * p.l * min(2, p.n_c) * (p.l // p.n_c)
    table = {
        "scaled_dot_product": Complexity(memory=max(rows, dense), time=max(rows, dense), pairs=dense),
        "memory_efficient": Complexity(memory=max(rows, dense), time=max(rows, dense), pairs=dense),
        "lsh": Complexity(memory=max(rows, hashed), time=max(rows, hashed), pairs=pairs),
    }
    return _row(table, kind)


def transformer_complexity(variant: str, p: Symbols) -> Complexity:
    """Table 3: Transformer variants, where c = (4l/n_c)².

    The terms with c are too large as in `attention_complexity`. In the time of the reversible kinds the
    feed-forward term is printed with n_h, which it does not depend on; it is left as it is.

    Args:
        variant: `transformer`, `reversible`, `chunked_reversible`, `lsh` or `reformer`.
        p: the sizes; the paper has n_c = l/32, so that c = 128².

    Raises:
        ValueError: an unknown variant.

    Source: Kitaev, Kaiser, Levskaya 2020, §3, table 3.
    """
    c = (4 * p.l // p.n_c) ** 2
    wide, narrow = p.b * p.l * p.d_ff, p.b * p.l * p.d_model
    dense, hashed = p.b * p.n_h * p.l**2, p.b * p.n_h * p.n_r * p.l * c
    printed = {
        "transformer": (max(wide, dense) * p.n_l, (wide + dense) * p.n_l),
        "reversible": (max(wide, dense), (p.n_h * wide + dense) * p.n_l),
        "chunked_reversible": (max(narrow, dense), (p.n_h * wide + dense) * p.n_l),
        "lsh": (max(wide, hashed) * p.n_l, (wide + hashed) * p.n_l),
        "reformer": (max(narrow, hashed), (wide + hashed) * p.n_l),
    }
    memory, time = _row(printed, variant)
    kind = "lsh" if variant in ("lsh", "reformer") else "scaled_dot_product"
    return Complexity(memory=memory, time=time, pairs=attention_complexity(kind, p).pairs * p.n_l)


def _row(table: Mapping[str, _Row], name: str) -> _Row:
    if name not in table:
        raise ValueError(f"{name!r} is no row of the table: use one of {', '.join(table)}")
    return table[name]
