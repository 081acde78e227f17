"""What a training step costs, from integers alone: operations, and bytes held, moment by moment.

A step is played with tensors that are sizes. A function that bears the name of a piece of the model is its
twin, line by line, and a tape stands in for torch: it allocates, counts products of matrices, keeps what
backward asks for, and runs backward. A size is held for as long as Python holds it, as a tensor is. What is
left after forward is what backward needs; the most that is ever held is the peak. Left out is what is small
beside them: masks of a row, single numbers.

It is a step in float32 on the CPU, by the compiled kernel or the tiled path where they can. And it is not the
first, in which an optimizer makes its states. Nothing but the standard library is imported: a config is read
by attribute. Checks of types that wrap every function hold on to its arguments, and so to sizes, until it
returns: under them peaks come out too large.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reformer.config import ReformerConfig

#: Bytes of a number.
FLOAT, LONG, INT, BOOL = 4, 8, 4, 1
#: Bytes of the state of torch's random stream on the CPU.
RANDOM_STATE = 5056
#: Of each optimizer, how many states are as large as the parameters; fused, it has no temporaries.
OPTIMIZERS = {"adamw": 2, "adam": 2, "sgd": 1}
#: Those of `reformer.kernels.flash`, and `_COORDINATES` of `reformer.attention.options`: they import torch.
PAIRS, ROWS, COORDINATES = 2**19, 2**13, 2**23
#: `ROWS` of `reformer.attention.head_groups`.
HEAD_ROWS = 2**12
#: Those of `reformer/kernels/native.cpp`: queries at once, slots of a segment, most numbers of a vector.
QUERIES, SEGMENT, LANES = 16, 256, 16


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
    config: ReformerConfig,
    *,
    batch: int,
    seq: int,
    optimizer: str = "adamw",
    threads: int = 1,
    compiled: bool = True,
) -> StepCost:
    """What a step of training a language model costs.

    A million tokens, 6 layers of width 256: teraflops, and GiB kept for backward and at the peak.

    >>> from reformer import ReformerConfig
    >>> sizes = {"vocab_size": 256, "max_length": 2**20, "d_model": 256, "n_layers": 6, "n_hashes": 1}
    >>> blocks = {"heads_at_once": 1, "ff_chunk_length": 4096, "loss_chunk_length": 4096}
    >>> for residual in ("plain", "reversible"):
    ...     config = ReformerConfig(residual=residual, positions="axial", **sizes, **blocks)
    ...     cost = step_cost(config, batch=1, seq=2**20)
    ...     print(residual, cost.flops // 10**12, cost.saved_bytes >> 30, cost.peak_bytes >> 30)
    plain 35 37 40
    reversible 42 2 7

    Args:
        config: anything with the attributes of a `ReformerConfig`.
        batch: sequences a step.
        seq: tokens a sequence.
        optimizer: `adamw`, `adam` or `sgd` (with momentum).
        threads: CPU threads; each has scratch memory in full attention and in the compiled kernel.
        compiled: whether `auto` finds the compiled kernel, as where a C++ compiler is.

    Raises:
        ValueError: an optimizer or a hash family whose cost is not known.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    states = OPTIMIZERS[optimizer]
    tape = _Tape()
    step = _Step(config, tape, batch=batch, seq=seq, threads=threads)
    step.compiled = compiled
    step.native = config.backend == "native" or (config.backend == "auto" and compiled)
    loss = _loss(step)
    del step
    saved = dict(+tape.held)
    tape.phase = "backward"
    tape.backward([(loss, loss.memory)], [])
    del loss
    tape.phase = "optimizer"
    _Memory(tape, "optimizer", 0)
    sizes = [gradient.size for gradient in tape.gradients.values()]
    tape.gradients.clear()
    tape.states.clear()
    assert not tape.held.total(), f"held after the step: {+tape.held}"
    always = {"parameters": sum(sizes), "optimizer": states * sum(sizes), "batch": 2 * LONG * batch * seq}
    by_phase, by_part = Counter[str](), Counter[str]()
    for (phase, part), flops in tape.flops.items():
        by_phase[phase] += flops
        by_part[part] += flops
    peaks = {phase: dict(Counter(always) + Counter(peak)) for phase, peak in tape.peaks.items()}
    return StepCost(
        parameters=sum(sizes) // FLOAT,
        flops_by_phase=dict(by_phase),
        flops_by_part=dict(by_part),
        saved_by_part=saved,
        peaks=peaks,
    )


# A tape of sizes.


class _Memory:
    """Bytes of a part of the model, held for as long as Python holds this."""

    def __init__(self, tape: _Tape, part: str, size: int) -> None:
        self.tape, self.part, self.size = tape, part, size
        #: Whether it is the gradient of several tensors: then nothing is added to it in place.
        self.shared = False
        tape.held[part] += size
        if tape.held.total() > sum(tape.peaks.get(tape.phase, {}).values()):
            tape.peaks[tape.phase] = dict(+tape.held)

    def __del__(self) -> None:
        self.tape.held[self.part] -= self.size


_Gradients = list["_Memory | None"]


@dataclass(eq=False)
class _Node:
    """What makes the gradients of inputs from those of outputs.

    Args:
        number: nodes run backward from the last to the first.
        inputs: for each, the node it came from, as which of its outputs, and bytes.
        backward: holds what is kept; None where it has run, and at a leaf.
    """

    number: int = 0
    inputs: Sequence[tuple[_Node | None, int, int]] = ()
    backward: Callable[[_Gradients], _Gradients] | None = None


@dataclass(frozen=True)
class _Tensor:
    """Bytes of some memory, and the node they came from, as which of its outputs."""

    memory: _Memory
    size: int
    node: _Node | None = None
    output: int = 0


@dataclass
class _Tape:
    """What is held, what has been multiplied, and how to run backward.

    Args:
        phase: whose peak is being taken.
        held: bytes held now, by part.
        peaks: bytes held at the fullest moment of each phase, by part.
        flops: operations, by phase and part.
        gradients: of the parameters.
        states: of random streams.
        recording: whether what is computed now is kept for backward.
        again: whether it was computed before.
        times: how often it is computed, one after the other.
    """

    phase: str = "forward"
    held: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)
    gradients: dict[str, _Memory] = field(default_factory=dict)
    states: list[_Memory] = field(default_factory=list)
    recording: bool = True
    again: bool = False
    times: int = 1
    _nodes: int = 0

    @contextmanager
    def set(self, **state: bool | int) -> Iterator[None]:
        """Another `recording`, `again` or `times` inside."""
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        yield
        vars(self).update(before)

    def multiply(self, part: str, flops: int) -> None:
        if flops:
            self.flops["recompute" if self.again else self.phase, part] += flops * self.times

    def op(
        self,
        part: str,
        *inputs: _Tensor,
        out: int,
        keeps: Sequence[_Tensor | _Memory] = (),
        keeps_out: bool = False,
        beside: tuple[int, int] = (0, 0),
        flops: tuple[int, int] = (0, 0),
        weights: Mapping[str, int] | None = None,
        shares: bool = False,
    ) -> _Tensor:
        """What an operator of torch does.

        Args:
            part: what it is part of.
            inputs: what is differentiated by.
            out: bytes of the output.
            keeps: what backward asks for.
            keeps_out: whether it asks for the output.
            beside: bytes that are there for a moment, next to the output, and next to gradients of inputs.
            flops: of products of matrices, forward and backward.
            weights: numbers in each parameter that it uses.
            shares: whether the gradient of each input is that of the output, or a view of it.
        """
        memory = _Memory(self, part, out)
        _Memory(self, part, beside[0])
        self.multiply(part, flops[0])
        kept = [x.memory if isinstance(x, _Tensor) else x for x in keeps] + [memory] * keeps_out
        sizes = [x.size for x in inputs]

        def backward(gradients: _Gradients, kept: list[_Memory] = kept) -> _Gradients:
            self.multiply(part, flops[1])
            if shares and gradients[0]:
                gradients[0].shared |= len(sizes) > 1
                return gradients * len(sizes)
            found: _Gradients = [_Memory(self, part, size) for size in sizes]
            for name, numbers in (weights or {}).items():
                # The first is kept, others are added to it.
                self.gradients.setdefault(name, _Memory(self, "gradients", FLOAT * numbers))
            _Memory(self, part, beside[1])
            return found

        return self.record(inputs, [memory], backward)[0]

    def record(
        self,
        inputs: Sequence[_Tensor],
        outputs: Sequence[_Memory],
        backward: Callable[[_Gradients], _Gradients],
    ) -> list[_Tensor]:
        """Outputs as tensors that know how they were made, if that is recorded."""
        if not self.recording:
            return [_Tensor(memory, memory.size) for memory in outputs]
        self._nodes += 1
        node = _Node(self._nodes, [(x.node, x.output, x.size) for x in inputs], backward)
        return [_Tensor(memory, memory.size, node, index) for index, memory in enumerate(outputs)]

    def backward(
        self, roots: Sequence[tuple[_Tensor, _Memory | None]], leaves: Sequence[_Tensor]
    ) -> _Gradients:
        """Gradients of the leaves, from those of the roots."""
        waiting: dict[_Node, dict[int, _Memory]] = {}
        for root, gradient in roots:
            if root.node and gradient:
                waiting.setdefault(root.node, {})[root.output] = gradient
        del roots, gradient
        while nodes := [node for node in waiting if node.backward]:
            self._run(max(nodes, key=lambda node: node.number), waiting)
        return [waiting[leaf.node][0] if leaf.node in waiting else None for leaf in leaves]

    def _run(self, node: _Node, waiting: dict[_Node, dict[int, _Memory]]) -> None:
        """One node: what it kept goes, and gradients that meet are added up, in place if they can be."""
        arrived = waiting.pop(node)
        gradients: _Gradients = [arrived.pop(output, None) for output in range(max(arrived) + 1)]
        assert node.backward
        found = node.backward(gradients)
        node.backward = None
        gradients.clear()
        for source, output, size in node.inputs:
            gradient = found.pop(0)
            if source and gradient:
                there = waiting.setdefault(source, {})
                if output in there and there[output].shared:
                    gradient = _Memory(self, gradient.part, size)
                elif output in there:
                    gradient = there[output]
                there[output] = gradient


# Sizes.


class _Step:
    """A config at work on rows of tokens, and the tape of it."""

    def __init__(self, c: ReformerConfig, tape: _Tape, *, batch: int, seq: int, threads: int) -> None:
        self.config, self.tape, self.batch, self.seq, self.threads = c, tape, batch, seq, threads
        self.op, self.new = tape.op, partial(_Memory, tape)
        #: Whether the compiled kernel is there, and whether it attends where it can.
        self.compiled = self.native = False
        #: Tokens a row, with those that the conventions of transformers append.
        padded = c.conventions == "transformers" and seq > c.shortest_chunk
        self.length = -(-seq // c.length_multiple) * c.length_multiple if padded else seq
        #: Width of all heads together.
        self.width = c.n_heads * c.head_width
        #: Bytes of a number for each token; of a residual stream, and of a row for each token and head.
        self.numbers = FLOAT * batch * self.length
        self.stream, self.heads = self.numbers * c.d_model, self.numbers * self.width
        #: Later chunks that `lsh` layers see.
        self.after = c.n_chunks_after if c.n_chunks_after is not None else int(not c.causal)
        #: Whether they see a band of the sorted order; one bucket alone; rounds that roll into each other.
        self.strict = c.causal and c.causality == "strict"
        self.same_bucket = bool(c.bucket_mask) or (c.causal and c.causality != "published")
        self.wraps = c.seams == "reference" and not self.strict
        #: Whether later rounds leave out what earlier ones show.
        self.counts = c.duplicates == "count" and c.n_hashes > 1


class _Windows:
    """Chunks of queries, and the chunks of keys that each one sees, its own among them."""

    def __init__(self, s: _Step, *, length: int, rounds: int = 1, views: int = 1) -> None:
        dim = s.config.head_width
        #: Tokens, the last chunk filled up, of every round, head and batch row.
        self.slots = s.batch * s.config.n_heads * rounds * -(-s.length // length) * length
        #: Queries and keys that meet, and bytes of a number for each.
        self.pairs = self.slots * views * length
        self.scores = FLOAT * self.pairs
        #: Bytes of a row a slot, and of a row for each slot that each chunk sees.
        self.rows = FLOAT * self.slots * dim
        self.seen = self.rows * views
        #: Operations of queries by keys, or of weights by values: forward, and by the gradient of both.
        self.product = 2 * self.pairs * dim, 4 * self.pairs * dim


# From tokens to the loss.


def _loss(s: _Step) -> _Tensor:
    """`TokenModel.loss`."""
    streams = [replace(x, size=x.size // s.length * s.seq) for x in _run_blocks(s, _embed(s))]
    length = s.config.loss_chunk_length
    whole = length is None or length >= s.seq
    if not whole:
        return _sum_blocks(s, *streams, length=length or 0)
    joined = _join(s, *streams)
    del streams
    return _score(s, joined)


def _join(s: _Step, first: _Tensor, second: _Tensor) -> _Tensor:
    """`Streams.merged`."""
    c = s.config
    return s.op("head", first, second, out=first.size // c.d_model * c.joined_width, shares=True)


def _score(s: _Step, joined: _Tensor) -> _Tensor:
    """`LanguageModelHead`, and the cross-entropy."""
    c = s.config
    normed = _dropout(s, "head", _norm(s, "head", joined, of="head", width=c.joined_width))
    of = "embedding" if c.tie_weights else "projection"
    logits = _linear(s, "head", normed, of=of, inner=c.joined_width, columns=c.vocab_size, bias=True)
    del normed, joined
    log_softmax = s.op("head", logits, out=logits.size, keeps_out=True)
    return s.op("head", log_softmax, out=0)


def _embed(s: _Step) -> _Tensor:
    """`Trunk._embed`: tokens, and positions on them."""
    c, table, weights = s.config, s.stream // s.batch, dict[str, int]()
    x = s.op("streams", out=s.stream, weights={"embedding": c.vocab_size * c.d_model})
    beside = 0
    if c.positions == "learned":
        weights = {"positions": c.max_length * c.d_model}
    elif c.positions == "axial":
        # By row and by column, and both of them joined.
        (rows, columns), (row_width, column_width), beside = c.axial_grid, c.axial_split, table
        weights = {"rows": rows * row_width, "columns": columns * column_width}
        s.new("streams", 2 * table)
    elif c.positions == "sinusoidal":
        # Angles, sines, cosines and both of them, in float64; then in float32.
        s.new("streams", 5 * table)
        beside = table
    if c.positions != "rotary":
        x = s.op("streams", x, out=s.stream, beside=(beside, 0), weights=weights)
    return _dropout(s, "streams", x)


def _run_blocks(s: _Step, x: _Tensor) -> tuple[_Tensor, _Tensor]:
    """`run_stack`, from the embedding to two streams."""
    start = _round(s, x)
    run = {"plain": _run_plain, "checkpoint": _run_checkpointed}.get(s.config.residual, _run_reversible)
    return run(s, start, start)


# Stacks. A branch is known by its number: attention of a layer, then its feed-forward.


def _run_plain(s: _Step, x1: _Tensor, x2: _Tensor) -> tuple[_Tensor, _Tensor]:
    for branch in range(2 * s.config.n_layers):
        x1, x2 = _step(s, branch, x1, x2)[:2]
    return x1, x2


def _run_checkpointed(s: _Step, x1: _Tensor, x2: _Tensor) -> tuple[_Tensor, _Tensor]:
    for layer in range(s.config.n_layers):
        x1, x2 = _checkpointed(s, (2 * layer, 2 * layer + 1), x1, x2)
    return x1, x2


def _checkpointed(s: _Step, block: Sequence[int], x1: _Tensor, x2: _Tensor) -> tuple[_Tensor, _Tensor]:
    """`reformer.checkpointing`: a block runs again, and then backwards, from the streams that enter it."""
    saved = (x1, x2)
    _keep_random(s, 1)
    y1, y2, used = _run_unrecorded(s, block, x1, x2)

    def backward(gradients: _Gradients) -> _Gradients:
        x1, x2 = leaves = [_Tensor(x.memory, s.stream, _Node()) for x in saved]
        with s.tape.set(recording=True, again=True):
            for branch in block:
                x1, x2, _ = _step(s, branch, x1, x2, used[branch])
        return s.tape.backward(list(zip((x1, x2), gradients, strict=True)), leaves)

    y1, y2 = s.tape.record(saved, (y1.memory, y2.memory), backward)
    return y1, y2


def _run_reversible(s: _Step, x1: _Tensor, x2: _Tensor) -> tuple[_Tensor, _Tensor]:
    """`reformer.reversible`: a branch runs again and backwards, and is taken off its stream."""
    branches, exact = range(2 * s.config.n_layers), s.config.residual == "reversible_exact"
    _keep_random(s, len(branches))
    last1, last2, used = _run_unrecorded(s, branches, x1, x2)
    saved = [last1.memory, last2.memory]
    del last1, last2

    def backward(gradients: _Gradients) -> _Gradients:
        (y1, y2), (dy1, dy2) = saved, gradients
        # Neither the graph nor the list of gradients holds on to them.
        saved.clear()
        gradients.clear()
        for branch in reversed(branches):
            out, dstream = _vjp(s, branch, y1, dy2, used[branch])
            # Differences and sums of floats lie in the memory of the branch and of its gradient.
            y1, y2 = _sum(s, y2, _round(s, out)) if exact else out.memory, y1
            dy1, dy2 = dy2, dstream or dy1
            del out, dstream
        return [dy1, dy2]

    y1, y2 = s.tape.record((x1, x2), list(saved), backward)
    return y1, y2


def _vjp(
    s: _Step, branch: int, x: _Memory, gradient: _Memory | None, buckets: _Memory | None
) -> tuple[_Tensor, _Memory | None]:
    """`Branch.vjp`: a branch again, and the gradient of its stream."""
    c, length = s.config, s.config.ff_chunk_length
    if branch % 2 and length is not None and length < s.length:
        return _vjp_by_rows(s, branch, x, gradient, length=length)
    if not branch % 2 and c.heads_at_once is not None and c.heads_at_once < c.n_heads:
        return _vjp_by_heads(s, branch, x, gradient, buckets)
    stream = _Tensor(x, s.stream, _Node())
    with s.tape.set(recording=True, again=True):
        out, _ = _run_branch(s, branch, stream, buckets)
    (dstream,) = s.tape.backward([(out, gradient)], [stream])
    return replace(out, node=None), dstream


def _vjp_by_rows(
    s: _Step, branch: int, x: _Memory, gradient: _Memory | None, *, length: int
) -> tuple[_Tensor, _Memory | None]:
    out, dstream = s.new("feed_forward", s.stream), s.new("feed_forward", s.stream)
    for rows, times in _blocks(s.length, length):
        leaf = _Tensor(x, s.stream // s.length * rows, _Node())
        with s.tape.set(recording=True, times=times):
            with s.tape.set(again=True):
                result = _feed(s, branch, leaf)
            s.tape.backward([(result, gradient)], [leaf])
    return _Tensor(out, s.stream), dstream


def _keep_random(s: _Step, times: int) -> None:
    """`Replay.capture`, if any branch draws; kept longer than the step's graph, as what is no tensor is."""
    c = s.config
    if max(c.dropout, c.attention_dropout, c.local_dropout) > 0:
        s.tape.states.append(s.new("streams", times * RANDOM_STATE))


def _run_unrecorded(
    s: _Step, branches: Sequence[int], x1: _Tensor, x2: _Tensor
) -> tuple[_Tensor, _Tensor, dict[int, _Memory | None]]:
    """The streams behind the branches, and the buckets of each."""
    used = {}
    with s.tape.set(recording=False):
        for branch in branches:
            x1, x2, used[branch] = _step(s, branch, x1, x2)
    return x1, x2, used


def _step(
    s: _Step, branch: int, x1: _Tensor, x2: _Tensor, buckets: _Memory | None = None
) -> tuple[_Tensor, _Tensor, _Memory | None]:
    """The streams behind a branch, and its buckets."""
    out, buckets = _run_branch(s, branch, x2, buckets)
    out = _round(s, out)
    return x2, s.op("streams", x1, out, out=s.stream, shares=True), buckets


def _round(s: _Step, x: _Tensor) -> _Tensor:
    """To the grid on which `reversible_exact` adds; others add as it is."""
    exact = s.config.residual == "reversible_exact"
    return s.op("streams", x, out=s.stream, shares=True) if exact else x


def _sum(s: _Step, *terms: object) -> _Memory:
    """Of streams or of their gradients, outside of what is recorded."""
    return s.new("streams", s.stream)


def _run_branch(s: _Step, branch: int, x: _Tensor, buckets: _Memory | None) -> tuple[_Tensor, _Memory | None]:
    """`Branch`: what is added to a stream, and the buckets it used, which are made if there are none."""
    c = s.config
    if branch % 2:
        return _map_blocks(s, branch, x), None
    if c.heads_at_once is not None and c.heads_at_once < c.n_heads and not s.tape.recording:
        return _by_heads(s, branch, buckets)
    normed = _norm(s, "projections", x, of=f"{branch}", width=c.d_model)
    out, buckets = _attend(s, branch, normed, buckets)
    del normed
    return _dropout(s, "projections", out), buckets


def _map_blocks(s: _Step, branch: int, x: _Tensor) -> _Tensor:
    """`map_blocks` of the feed-forward.

    Full blocks are one that is computed as often; the last one may be shorter. Where nothing is recorded they
    are written where they belong, else their results are there until all of them are joined. In backward a
    block runs again, up to the last tensor that is asked for.
    """
    c, tape, part, length = s.config, s.tape, "feed_forward", s.config.ff_chunk_length
    if length is None or length >= s.length:
        return _feed(s, branch, x)
    memory, blocks = x.memory, _blocks(s.length, length)
    out = None if tape.recording else s.new(part, s.stream)
    random = [
        s.new(part, RANDOM_STATE) for _ in range(-(-s.length // length)) if tape.recording and c.dropout
    ]
    done: list[_Memory] = []
    for rows, times in blocks:
        size = s.stream // s.length * rows
        done.append(s.new(part, 0 if out else size * (times - 1)))
        with tape.set(recording=False, times=times):
            done.append(_feed(s, branch, _Tensor(memory, size)).memory)
        if out:
            done.clear()
    out = out or s.new(part, s.stream)

    def backward(gradients: _Gradients, kept: object = random) -> _Gradients:
        done: _Gradients = []
        for rows, times in reversed(blocks):
            size = s.stream // s.length * rows
            done.append(s.new(part, size * (times - 1)))
            leaf = _Tensor(memory, size, _Node())
            with tape.set(recording=True, times=times):
                with tape.set(again=True):
                    result = _feed(s, branch, leaf, whole=False)
                done += tape.backward([(result, gradients[0])], [leaf])
            del result
        return [s.new(part, s.stream)]

    return tape.record([x], [out], backward)[0]


def _sum_blocks(s: _Step, *streams: _Tensor, length: int) -> _Tensor:
    """`sum_blocks` of the head, which writes the gradients of its inputs where they belong."""
    c, tape, sizes = s.config, s.tape, [x.size for x in streams]
    memories, blocks = [x.memory for x in streams], _blocks(s.seq, length)
    random = s.new("head", RANDOM_STATE if c.dropout else 0)

    def leaves(rows: int) -> list[_Tensor]:
        return [_Tensor(x, size // s.seq * rows, _Node()) for x, size in zip(memories, sizes, strict=True)]

    for rows, times in blocks:
        with tape.set(recording=False, times=times):
            _score(s, _join(s, *leaves(rows)))

    def backward(gradients: _Gradients, kept: object = random) -> _Gradients:
        found: _Gradients = [s.new("head", size) for size in sizes]
        matrix, scale = "embedding" if c.tie_weights else "projection", c.joined_width
        weights = {matrix: c.joined_width * c.vocab_size, f"{matrix} bias": c.vocab_size, "head scale": scale}
        if c.norm == "layer_norm":
            weights["head shift"] = scale
        for name, numbers in weights.items():
            tape.gradients[name] = s.new("gradients", FLOAT * numbers)
        for rows, times in reversed(blocks):
            inputs = leaves(rows)
            with tape.set(recording=True, times=times):
                with tape.set(again=True):
                    result = _score(s, _join(s, *inputs))
                tape.backward([(result, gradients[0])], inputs)
            del result
        return found

    return tape.record(streams, [s.new("head", 0)], backward)[0]


def _blocks(seq: int, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows of a full block, and how many there are; of the last one, which may be shorter, and one."""
    full = (seq - 1) // length
    return (length, full), (seq - full * length, 1)


# Norms, linear layers and dropout, wherever they are.


def _norm(s: _Step, part: str, x: _Tensor, *, of: str, width: int) -> _Tensor:
    """`build_norm`: without a mean, torch keeps what is not scaled yet, too."""
    weights = {f"{of} scale": width}
    if s.config.norm == "rms_norm":
        unscaled = _by_mean_square(s, part, x, width=width)
        return s.op(part, unscaled, out=x.size, keeps=[unscaled], weights=weights, beside=(0, x.size))
    rows = s.new(part, 2 * x.size // width)
    return s.op(part, x, out=x.size, keeps=[x, rows], weights=weights | {f"{of} shift": width})


def _by_mean_square(s: _Step, part: str, x: _Tensor, *, width: int) -> _Tensor:
    """Rows by the root of their mean square, whose gradient takes several steps."""
    rows = s.new(part, x.size // width)
    return s.op(part, x, out=x.size, keeps=[x, rows], beside=(0, 3 * x.size))


def _linear(
    s: _Step,
    part: str,
    x: _Tensor,
    *,
    of: str,
    inner: int,
    columns: int,
    bias: bool = False,
    skip: bool = False,
) -> _Tensor:
    """A product with a matrix; with `skip` only its gradient is computed."""
    out = x.size // inner * columns
    flops = 2 * out // FLOAT * inner
    weights = {of: inner * columns} | ({f"{of} bias": columns} if bias else {})
    done = int(not skip)
    return s.op(part, x, out=done * out, keeps=[x], flops=(done * flops, 2 * flops), weights=weights)


def _dropout(s: _Step, part: str, x: _Tensor, *, share: float | None = None) -> _Tensor:
    """Kept is a factor for every number; the share is that of the model, if it is not another."""
    if not (s.config.dropout if share is None else share):
        return x
    return s.op(part, x, out=x.size, keeps=[s.new(part, x.size)])


# Feed-forward.


def _feed(s: _Step, branch: int, x: _Tensor, *, whole: bool = True) -> _Tensor:
    """`Block._feed_rows`; `whole`: unlike backward, which does not ask for the last product."""
    c, part, d_ff = s.config, "feed_forward", s.config.feed_forward_width
    x = _norm(s, part, x, of=f"{branch}", width=c.d_model)
    gates = 2 if c.activation in ("swiglu", "geglu") else 1
    linear = partial(_linear, s, part, bias=True)
    wide = linear(x, of=f"{branch} wide", inner=c.d_model, columns=gates * d_ff)
    del x
    # A ReLU asks for nothing but its output; a gate is kept.
    size, relu = wide.size // gates, c.activation == "relu"
    keeps = [] if relu else [wide.memory, s.new(part, size * (gates - 1))]
    inner = s.op(part, wide, out=size, keeps=keeps, keeps_out=relu)
    del wide, keeps
    inner = _dropout(s, part, inner)
    # What is dropped of it is asked for.
    skip = not whole and not c.dropout
    return _dropout(s, part, linear(inner, of=f"{branch} narrow", inner=d_ff, columns=c.d_model, skip=skip))


# Attention layers.


def _attend(s: _Step, branch: int, x: _Tensor, buckets: _Memory | None) -> tuple[_Tensor, _Memory | None]:
    """`SharedQueryKeyAttention` and `StandardAttention`."""
    c = s.config
    project = partial(_linear, s, "projections", inner=c.d_model, columns=s.width)
    *turned, v = (project(x, of=f"{branch} {name}") for name in _projections(s, branch))
    if c.positions == "rotary":
        turned = [_rotate(s, x) for x in turned]
    if _kind(s, branch) == "lsh":
        buckets = buckets or _hash(s)
    out = _among(s, branch, turned, v)
    return _linear(s, "projections", out, of=f"{branch} output", inner=s.width, columns=c.d_model), buckets


def _projections(s: _Step, branch: int) -> list[str]:
    shared = s.config.kind(branch // 2) in ("lsh", "full", "oracle")
    return ["query", "value"] if shared else ["query", "key", "value"]


def _kind(s: _Step, branch: int) -> str:
    c, kind = s.config, s.config.kind(branch // 2)
    fits = c.conventions == "transformers" and s.length <= c.chunk_length
    return "full" if kind == "lsh" and fits else kind


def _among(s: _Step, branch: int, turned: Sequence[_Tensor], v: _Tensor) -> _Tensor:
    """Attention among the tokens."""
    kind = _kind(s, branch)
    if kind == "lsh":
        # As `LSHOptions.backend_on` the CPU.
        if s.config.backend == "reference" or s.wraps or (s.same_bucket and not s.strict):
            return _lsh_attention(s, turned[0], v)
        return (_native_attention if s.native else _tiled_attention)(s, turned[0], v)
    if kind == "local":
        return _local_attention(s, turned, v)
    return _full_attention(s, kind, turned, v)


def _rotate(s: _Step, x: _Tensor) -> _Tensor:
    """`rotate`, by a cosine and a sine for each of a head's pairs, half by half."""
    angles = s.new("projections", FLOAT * s.length * s.config.head_width)
    return s.op("projections", x, out=x.size, keeps=[angles], beside=(x.size, x.size))


def _merge_heads(s: _Step, x: _Tensor) -> _Tensor:
    """A copy, of heads that do not lie beside each other in memory."""
    return s.op("attend", x, out=s.heads, shares=True) if s.config.n_heads > 1 else replace(x, size=s.heads)


def _unit_keys(s: _Step, qk: _Tensor) -> _Tensor:
    """`unit_keys`: divided by a norm, then by a constant."""
    unit = _by_mean_square(s, "attend", qk, width=s.config.head_width)
    return s.op("attend", unit, out=qk.size)


# Attention some heads at a time: `HeadGroups`.


class _Fewer:
    """A config with fewer heads, of the same width."""

    def __init__(self, c: ReformerConfig, n_heads: int) -> None:
        self.config, self.n_heads = c, n_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _groups(s: _Step) -> list[_Step]:
    c, groups = s.config, []
    assert c.heads_at_once
    for first in range(0, c.n_heads, c.heads_at_once):
        group = copy(s)
        group.config = _Fewer(c, min(c.heads_at_once, c.n_heads - first))  # type: ignore[assignment]
        group.width = group.config.n_heads * c.head_width
        group.heads = s.numbers * group.width
        groups.append(group)
    return groups


def _by_heads(s: _Step, branch: int, buckets: _Memory | None) -> tuple[_Tensor, _Memory | None]:
    """`HeadGroups.__call__`."""
    if _kind(s, branch) == "lsh" and buckets is None:
        queries = _project_rows(s, ["query"])
        if s.config.positions == "rotary":
            queries = [_rotate(s, x) for x in queries]
        buckets = _hash(s)
        del queries
    out = s.new("projections", s.stream)
    for group in _groups(s):
        _add_output(group, _attend_group(group, branch, _project_rows(group, _projections(s, branch))))
    return _Tensor(_drop_again(s, out), s.stream), buckets


def _vjp_by_heads(
    s: _Step, branch: int, x: _Memory, gradient: _Memory | None, buckets: _Memory | None
) -> tuple[_Tensor, _Memory | None]:
    """`HeadGroups.vjp`."""
    c, tape, names = s.config, s.tape, _projections(s, branch)
    gradient = _drop_again(s, gradient) if gradient else None
    out, dnormed = s.new("projections", s.stream), s.new("projections", s.stream)
    for name in (*names, "output"):
        numbers = c.d_model * s.width
        tape.gradients.setdefault(f"{branch} {name}", s.new("gradients", FLOAT * numbers))
    for group in _groups(s):
        with tape.set(again=True):
            parts = _project_rows(group, names)
            leaves = [_Tensor(part.memory, part.size, _Node()) for part in parts]
            with tape.set(recording=True):
                attended = _attend_group(group, branch, leaves)
            _add_output(group, replace(attended, node=None))
        # The gradients of the output's matrix, of what it is given, and of what is attended to.
        tape.multiply("projections", 4 * group.heads // FLOAT * c.d_model)
        s.new("projections", FLOAT * group.width * c.d_model)
        dmerged = s.new("projections", group.heads)
        s.new("projections", group.heads // s.length * _rows(s))
        dparts = tape.backward([(attended, dmerged)], leaves)
        del attended, parts, leaves, dmerged
        # Those of the projections' matrices, and of what is normalised.
        tape.multiply("projections", len(names) * 4 * group.heads // FLOAT * c.d_model)
        s.new("projections", 2 * s.stream // s.length * _rows(s) + FLOAT * group.width * c.d_model)
        del dparts
    scale = c.d_model * (1 if c.norm == "rms_norm" else 2)
    for name in ("scale", "shift")[: scale // c.d_model]:
        tape.gradients.setdefault(f"{branch} {name}", s.new("gradients", FLOAT * c.d_model))
    s.new("projections", (5 if c.norm == "rms_norm" else 2) * s.stream // s.length * _rows(s))
    return _Tensor(_drop_again(s, out), s.stream), dnormed


def _rows(s: _Step) -> int:
    """Tokens of a row that are normalised and multiplied at a time."""
    return min(s.length, max(1, HEAD_ROWS // s.batch))


def _project_rows(s: _Step, names: Sequence[str]) -> list[_Tensor]:
    """Queries, keys and values of the heads; beside them a block of rows, normalised and multiplied."""
    rows = _rows(s)
    parts = [_Tensor(s.new("projections", s.heads), s.heads) for _ in names]
    contiguous = s.batch == 1 or rows == s.length
    normed = (1 if contiguous else 2) * s.stream // s.length * rows
    s.new("projections", normed + len(names) * s.heads // s.length * rows)
    s.tape.multiply("projections", len(names) * 2 * s.heads // FLOAT * s.config.d_model)
    return parts


def _attend_group(s: _Step, branch: int, parts: Sequence[_Tensor]) -> _Tensor:
    *turned, v = parts
    if s.config.positions == "rotary":
        turned = [_rotate(s, x) for x in turned]
    return _among(s, branch, turned, v)


def _add_output(s: _Step, attended: _Tensor) -> None:
    """What the heads add to the output; `attended` is held meanwhile."""
    s.tape.multiply("projections", 2 * s.heads // FLOAT * s.config.d_model)
    s.new("projections", s.stream // s.length * _rows(s))


def _drop_again(s: _Step, x: _Memory) -> _Memory:
    """By a stream of its own: which are kept, the product with them, and its quotient by their share."""
    if not s.config.dropout:
        return x
    kept = s.new("projections", s.stream)
    product = s.new("projections", s.stream)
    quotient = s.new("projections", s.stream)
    del kept, product
    return quotient


# Hashing.


def _hash(s: _Step) -> _Memory:
    """`hash_into_buckets`, and its ids as integers."""
    c, (columns, axes, bytes_a_slot) = s.config, _hash_family(s.config, compiled=s.compiled)
    slots = s.batch * s.length * c.n_heads * c.n_hashes
    s.tape.multiply("hash", 2 * slots * c.head_width * columns)
    vectors = s.new("hash", 2 * s.heads if c.hash_dropout else 0)
    at_once = COORDINATES // (slots // s.length * axes)
    if at_once >= s.length or getattr(c.hashing, "data_rotation", False):
        ids = s.new("hash", (bytes_a_slot + LONG) * slots)
        del vectors, ids
        return s.new("hash", INT * slots)
    ids = s.new("hash", INT * slots)
    s.new("hash", (bytes_a_slot + LONG) * slots * max(1, at_once) // s.length)
    return ids


def _hash_family(c: ReformerConfig, *, compiled: bool) -> tuple[int, int, int]:
    """Columns that vectors are multiplied by, axes of the buckets, and bytes a token and round at the most.

    Raises:
        ValueError: a family that is not known here.
    """
    name, size = type(c.hashing).__name__, 1 << (c.head_width - 1).bit_length()
    factors = c.bucket_count if isinstance(c.bucket_count, tuple) else (c.bucket_count,)
    axes, bits = sum(factors) // 2, sum(factor.bit_length() - 1 for factor in factors)
    number = (BOOL + LONG) * bits
    several = 2 * LONG * (len(factors) > 1)
    known = {
        # The largest and the smallest coordinate, where they are, and the ids that follow; compiled, the ids.
        "CrossPolytope": (axes, FLOAT * axes + (several if compiled else 2 * (FLOAT + LONG) + 2 * LONG)),
        "Hyperplane": (bits, number),
        "OrthogonalHyperplane": (bits, number),
        "Syndrome": (bits, FLOAT * bits + number),
        "BitSampling": (0, number),
        # A stage of a Hadamard transform has its input, the two halves of its output, and these together;
        # beside it is what the transform began with.
        "Codeword": (0, (BOOL + 4 * FLOAT) * axes),
        "HadamardCrossPolytope": (0, 4 * FLOAT * size * -(-axes // size)),
        "Random": (0, 0),
    }
    if name not in known:
        raise ValueError(f"hashing={c.hashing!r}: its cost is not known; add it to `_hash_family` in cost.py")
    columns, bytes_a_slot = known[name]
    return columns, axes, bytes_a_slot


# LSH attention, all rounds at once.


def _lsh_attention(s: _Step, qk: _Tensor, v: _Tensor) -> _Tensor:
    """`_attend_at_once`, the reference backend."""
    c, op, chunks = s.config, s.tape.op, -(-s.length // s.config.chunk_length)
    views = min(c.n_chunks_before, chunks - 1) + 1 + min(s.after, chunks - 1)
    if s.wraps:
        views = min(c.n_chunks_before + 1 + s.after, chunks * c.n_hashes)
    w = _Windows(s, length=c.chunk_length, rounds=c.n_hashes, views=views)
    buckets, order = s.new("attend", LONG * w.slots), s.new("attend", 2 * LONG * w.slots)
    keys = _unit_keys(s, qk)
    # Queries and keys side by side, in the order of each round; then values.
    rows = op("attend", qk, keys, out=2 * s.heads, shares=True)
    rows = _sort_rows(s, rows, order)
    values = _sort_rows(s, v, order)
    out = _attend_chunks(s, w, rows, values)
    out = op("attend", out, out=w.rows, keeps=[order])
    # Rounds are weighted and added up.
    mixing = s.new("attend", FLOAT * w.slots)
    out = op("attend", out, out=w.rows, keeps=[out, mixing], beside=(0, w.rows))
    out = op("attend", out, out=w.rows // c.n_hashes, shares=True)
    out = op("attend", out, out=s.heads)
    del buckets, keys, values, rows, mixing
    return _merge_heads(s, out)


def _sort_rows(s: _Step, x: _Tensor, order: _Memory) -> _Tensor:
    """Filled up to whole chunks, and copied into the order of every round."""
    c = s.config
    filled = x.size // s.length * -(-s.length // c.chunk_length) * c.chunk_length
    x = s.op("attend", x, out=filled, shares=True) if filled > x.size else x
    out = c.n_hashes * filled
    return s.op("attend", x, out=out, keeps=[order], beside=(0, out))


def _attend_chunks(s: _Step, w: _Windows, rows: _Tensor, values: _Tensor) -> _Tensor:
    halves = s.tape.record([rows], [rows.memory] * 2, lambda gradients: [s.new("attend", 2 * w.rows)])
    query, key = (replace(half, size=w.rows) for half in halves)
    window_keys = _look_around(s, w, key)
    scores = _matmul(s, w, query, window_keys, out=w.scores)
    masks = _window_masks(s, w)
    # The gradient of a softmax takes each row's product of weights and their gradients.
    softmax = partial(s.op, "attend", beside=(0, w.scores), flops=(0, 2 * w.pairs))
    weights = softmax(scores, out=w.scores, keeps=[masks], keeps_out=True)
    weights = _dropout(s, "attend", weights, share=s.config.attention_dropout)
    return _matmul(s, w, weights, _look_around(s, w, values), out=w.rows)


def _matmul(s: _Step, w: _Windows, a: _Tensor, b: _Tensor, *, out: int) -> _Tensor:
    """Queries by keys, or weights by values."""
    return s.op("attend", a, b, out=out, keeps=[a, b], flops=w.product)


def _look_around(s: _Step, w: _Windows, x: _Tensor) -> _Tensor:
    """Other chunks are rolled to where they are seen, then all are joined."""
    rolled = min(w.seen - w.rows, 2 * w.rows)
    return s.op("attend", x, out=w.seen, beside=(w.seen - w.rows, rolled))


def _window_masks(s: _Step, w: _Windows) -> _Memory:
    """Which pairs are hidden, and which are a token with itself.

    They are compared by codes, an integer a slot; three of them are alive at once, one for all that is seen.
    """
    if s.strict:
        # Differences of codes, compared with both ends of the band, the second comparison into the first.
        compared = INT + BOOL
    elif s.wraps and (s.same_bucket or s.counts):
        # Differences modulo the number of chunks, which takes three of them.
        compared = 3 * LONG + BOOL * s.same_bucket
    else:
        # Differences compared with both ends of a range, and both answers at once; or only positions.
        compared = 2 * BOOL if s.wraps else LONG + 3 * BOOL
    masks = s.new("attend", 2 * BOOL * w.pairs)
    s.new("attend", compared * w.pairs + (2 + w.seen // w.rows) * LONG * w.slots)
    return masks


# LSH attention, tile by tile.


def _tiled_attention(s: _Step, qk: _Tensor, v: _Tensor) -> _Tensor:
    """`reformer.kernels.flash`: kept are a log-sum-exp a token, and its place in the order of each round."""
    c, dim, chunk = s.config, s.config.head_width, s.config.chunk_length
    views = c.n_chunks_before + 1 + s.after
    fits = max(1, ROWS // s.length)
    row_step, head_step = (fits // c.n_heads, c.n_heads) if fits >= c.n_heads else (1, fits)
    blocks = [
        (min(row_step, s.batch - row), min(head_step, c.n_heads - head))
        for row in range(0, s.batch, row_step)
        for head in range(0, c.n_heads, head_step)
    ]
    # Between batch rows is a gap.
    chunks = [rows * (heads * -(-s.length // chunk) + views - 1) - (views - 1) for rows, heads in blocks]
    product = 2 * sum(chunks) * c.n_hashes * chunk**2 * views * dim
    # Of the first block, the largest: tokens, slots, and rows around them; of a group, and its pairs.
    tokens, slots, around = prod(blocks[0]) * s.length, chunks[0] * chunk, (chunks[0] + views - 1) * chunk
    group = min(chunks[0], max(1, PAIRS // (chunk**2 * views)))
    group_slots, group_rows, pairs = group * chunk, (group + views - 1) * chunk, group * chunk**2 * views
    # By slot, of this round and the last: tokens, rows of queries and values, codes; and all earlier codes.
    earlier = (c.n_hashes - 1) * s.counts
    order = LONG * (tokens + slots + 2 * around) + FLOAT * 2 * around
    orders = min(2, c.n_hashes) * order + FLOAT * earlier * (tokens + around) + 3 * LONG * tokens
    # Queries, keys, values; scores, and differences of codes.
    both = 3 * group_rows * dim + pairs * (1 + (s.strict or earlier > 0))
    # Factors of dropout are there for a moment, before memory that a second group finds there already.
    dropped = pairs * (c.attention_dropout > 0)
    several = len(blocks) > 1 or c.n_hashes > 1 or group < chunks[0]
    together: Callable[[list[int]], int] = sum if several else max
    # Results by slot, twice; then of a group, and by token.
    forward = both + 2 * slots * dim + slots + together([dropped, (group_slots + tokens) * dim])
    # Gradients of pairs, windows and outputs; by slot and token, of queries and values; outputs by token.
    # Then gradients of keys and a product with them, of queries, and what is added by token.
    backward = both + dropped + pairs + pairs // chunk * dim + (group_slots + 2 * around + 3 * tokens) * dim
    backward += together([dropped, (2 * group_rows + group_slots + tokens) * dim])
    kept = s.new("attend", (FLOAT + INT * c.n_hashes) * s.numbers // FLOAT * c.n_heads)
    beside = FLOAT * forward + orders, FLOAT * backward + orders
    return _fused(s, qk, v, keeps=[kept], product=product, beside=beside)


def _native_attention(s: _Step, qk: _Tensor, v: _Tensor) -> _Tensor:
    """`reformer.kernels.native`: it keeps what the tiled path keeps; its scratch is counted before."""
    c, chunk, rounds = s.config, s.config.chunk_length, s.config.n_hashes
    slots = s.batch * c.n_heads * rounds * -(-s.length // chunk) * chunk
    product = 2 * slots * (c.n_chunks_before + 1 + s.after) * chunk * c.head_width
    own = 0 if s.strict else chunk - 1
    back = _up(min(min(c.n_chunks_before * chunk, s.length) + own, s.length), QUERIES)
    ahead = 0 if s.strict else _up(min(s.after * chunk + own, s.length), QUERIES)
    capacity = back + SEGMENT + ahead + QUERIES
    # By slot or position: where it is, what it sees, a sum, and codes that later rounds are told.
    earlier = (rounds - 1) * s.counts
    lines = s.threads if s.batch * c.n_heads >= s.threads else s.batch * c.n_heads
    of_lines = lines * (3 + earlier) * s.length
    dim = _up(c.head_width, LANES)
    # Queries, keys and values around a segment, and a product of values; backward, gradients and outputs too.
    window = capacity * (3 * dim + QUERIES + 2 + earlier)
    forward = of_lines + s.threads * (window + QUERIES * dim)
    backward = of_lines + s.threads * (window + capacity * (5 * dim + QUERIES))
    kept = s.new("attend", (FLOAT + INT * rounds) * s.numbers // FLOAT * c.n_heads)
    return _fused(s, qk, v, keeps=[kept], product=product, beside=(FLOAT * forward, FLOAT * backward))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _fused(
    s: _Step, *inputs: _Tensor, keeps: Sequence[_Memory], product: int, beside: tuple[int, int]
) -> _Tensor:
    """Attention by a kernel that computes scores twice: in all two products forward and five backward."""
    keeps, flops = [*(x.memory for x in inputs), *keeps], (2 * product, 5 * product)
    return s.op("attend", *inputs, out=s.heads, keeps=keeps, keeps_out=True, beside=beside, flops=flops)


# Local and dense attention.


def _local_attention(s: _Step, turned: Sequence[_Tensor], v: _Tensor) -> _Tensor:
    """`local_attention`."""
    c, length = s.config, s.config.local_chunk_length or s.config.chunk_length
    chunks, before, after = -(-s.length // length), c.local_n_chunks_before, c.local_n_chunks_after
    after = int(not c.causal) if after is None else after
    if c.conventions == "own" or chunks == 1:
        before, after = min(before, chunks - 1), min(after, chunks - 1)
    w = _Windows(s, length=length, views=before + 1 + after)
    # Distances of positions, and what they add to scores.
    bias = s.new("attend", (LONG + FLOAT) * w.pairs // (s.batch * c.n_heads))
    q, k = turned
    k, v = _look_around(s, w, k), _look_around(s, w, v)
    out = _softmax_attention(s, w, q, k, v, share=c.local_dropout)
    del bias
    return _merge_heads(s, out)


def _full_attention(s: _Step, kind: str, turned: Sequence[_Tensor], v: _Tensor) -> _Tensor:
    """`full_attention`, `full_standard_attention` and `oracle_attention`."""
    c, w = s.config, _Windows(s, length=s.length)
    # What is added to scores: of every row, where padding is hidden.
    made = kind != "full_standard"
    square = s.length**2 * (s.batch if s.length > s.seq else made or (c.causal and c.attention_dropout > 0))
    bias = [s.new("attend", FLOAT * square)]
    s.new("attend", (FLOAT * made + 2 * BOOL) * square)
    q, k = turned if len(turned) > 1 else (turned[0], _unit_keys(s, turned[0]))
    if kind == "oracle":
        bias = _nearest_alone(s, w, bias[0])
    if c.attention_dropout:
        out = _softmax_attention(s, w, q, k, v, share=c.attention_dropout)
    else:
        out = _flash_attention(s, w, q, k, v, bias=bias[0])
    del bias, k
    return _merge_heads(s, out) if c.attention_dropout or c.positions == "rotary" else out


def _softmax_attention(s: _Step, w: _Windows, q: _Tensor, k: _Tensor, v: _Tensor, *, share: float) -> _Tensor:
    """`scaled_dot_product_attention` where no kernel serves: of chunks, or with dropout."""
    op, local = s.tape.op, w.pairs < w.slots * s.length
    scaled_q, scaled_k = op("attend", q, out=w.rows), op("attend", k, out=w.seen)
    # What lies head beside head is copied; windows do not, nor what was rotated.
    copied = s.config.n_heads > 1, s.config.n_heads > 1 and s.config.positions != "rotary"
    copies = (copied[1], scaled_q), (copied[1] and not local, scaled_k), (copied[0] and not local, v)
    queries, keys, values = (op("attend", x, out=x.size, shares=True) if copy else x for copy, x in copies)
    scores = _matmul(s, w, queries, keys, out=w.scores)
    del queries, keys
    weights = op("attend", scores, out=w.scores, keeps_out=True, beside=(BOOL * w.pairs, 0))
    del scores
    weights = _dropout(s, "attend", weights, share=share)
    return _matmul(s, w, weights, values, out=w.rows)


def _flash_attention(s: _Step, w: _Windows, q: _Tensor, k: _Tensor, v: _Tensor, *, bias: _Memory) -> _Tensor:
    """`scaled_dot_product_attention` by torch's kernel for the CPU, which holds a block of pairs a thread.

    Source: the block sizes in `FlashAttentionKernel.cpp` of torch 2.13.
    """
    queries = 256 if s.length >= 768 else 64 if s.length >= 192 else 32
    scratch = FLOAT * s.threads * min(queries, s.length) * min(512, s.length)
    keeps = [bias, s.new("attend", s.numbers * s.config.n_heads)]
    return _fused(s, q, k, v, keeps=keeps, product=w.product[0], beside=(scratch, 2 * scratch))


def _nearest_alone(s: _Step, w: _Windows, shared: _Memory) -> list[_Memory]:
    """`nearest_alone`: of the scores that may be seen, those below the last one shown are hidden."""
    c, attend = s.config, partial(s.new, "attend")
    shown = w.slots * min(s.length, c.n_hashes * (c.n_chunks_before + s.after) * c.chunk_length)
    s.tape.multiply("attend", w.product[0])
    # Next to the bias of all heads, that of a token with itself.
    own = attend((FLOAT + BOOL) * shared.size // FLOAT)
    logits = attend(w.scores)
    logits = attend(w.scores)
    largest = attend(FLOAT * shown)
    attend(LONG * shown)
    below, others = attend(BOOL * w.pairs), attend(w.scores)
    del below, largest, logits
    bias = attend(w.scores)
    del own
    return [bias, others]


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

    @property
    def dense(self) -> int:
        """Pairs of tokens."""
        return self.b * self.n_h * self.l**2

    @property
    def hashed(self) -> int:
        """What the tables have for pairs of LSH attention: b·n_h·n_r·l·c with c = (4l/n_c)²."""
        return self.b * self.n_h * self.n_r * self.l * (4 * self.l // self.n_c) ** 2


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
    hashed = p.b * p.n_h * p.n_r * p.l * min(2, p.n_c) * (p.l // p.n_c)
    dense = p.dense, p.dense
    table = {"scaled_dot_product": dense, "memory_efficient": dense, "lsh": (p.hashed, hashed)}
    _check_row(kind, table)
    printed, pairs = table[kind]
    printed = max(p.b * p.n_h * p.l * p.d_k, printed)
    return Complexity(memory=printed, time=printed, pairs=pairs)


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
    wide, narrow, dense, hashed = p.b * p.l * p.d_ff, p.b * p.l * p.d_model, p.dense, p.hashed
    table = {
        "transformer": (max(wide, dense) * p.n_l, wide + dense),
        "reversible": (max(wide, dense), p.n_h * wide + dense),
        "chunked_reversible": (max(narrow, dense), p.n_h * wide + dense),
        "lsh": (max(wide, hashed) * p.n_l, wide + hashed),
        "reformer": (max(narrow, hashed), wide + hashed),
    }
    _check_row(variant, table)
    memory, time = table[variant]
    kind = "lsh" if variant in ("lsh", "reformer") else "scaled_dot_product"
    return Complexity(memory=memory, time=time * p.n_l, pairs=attention_complexity(kind, p).pairs * p.n_l)


def _check_row(name: str, table: Mapping[str, object]) -> None:
    if name not in table:
        raise ValueError(f"{name!r} is no row of the table: use one of {', '.join(table)}")
