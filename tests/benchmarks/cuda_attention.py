"""An attention layer on a GPU, forward and backward: ours, full attention, published Reformers, and the peak.

    python -m tests.benchmarks.cuda_attention --out cuda.jsonl

Every layer has its projections, and ours its hashing. At each length all implementations and counts of rounds
take turns, so that a slow moment of the device meets all of them; shown are medians. What runs out of memory
is marked and not tried at greater lengths, nor is what would take longer than what is left of `--seconds`.
Peers are left out where they are not installed. Needs torch alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from reformer import ReformerConfig
from reformer.attention.modules import AttentionCall, SharedQueryKeyAttention, StandardAttention

Layer = Callable[[Tensor], Tensor]
MIB = 2**20
#: FLOP/s of dense bfloat16 products, as the makers' data sheets say, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12}
FULL = "full (SDPA)"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the layers of a run have in common."""

    n_heads: int
    head_width: int
    chunk_length: int

    @property
    def width(self) -> int:
        return self.n_heads * self.head_width


@dataclass(kw_only=True)
class Record:
    """A cell: an implementation at a length, with that many rounds.

    Args:
        status: `ok`, `out_of_memory`, `no_time` or what went wrong.
        forward_s: seconds of forward, a turn each.
        both_s: of forward and backward.
        peak_bytes: at the fullest moment, parameters and input left out; None where nothing tells.
        peak_share: of the FLOP/s that the device has at most; None if that is not known.
    """

    layer: str
    length: int
    n_hashes: int | None
    status: str = "ok"
    forward_s: list[float] = field(default_factory=list)
    both_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    peak_share: float | None = None


def ours(shape: Shape, *, length: int, n_hashes: int | None, backend: str) -> Layer:
    assert n_hashes is not None
    config = _config(shape, length=length, n_hashes=n_hashes, backend=backend)
    return _Called(SharedQueryKeyAttention(config, layer=0))


def full(shape: Shape, *, length: int, n_hashes: int | None) -> Layer:
    return _Called(StandardAttention(_config(shape, length=length, layers=("full_standard",)), layer=0))


def _config(shape: Shape, *, length: int, **settings: object) -> ReformerConfig:
    given: dict[str, object] = {
        "vocab_size": 2,
        "max_length": length,
        "d_model": shape.width,
        "n_heads": shape.n_heads,
        "n_layers": 1,
        "chunk_length": shape.chunk_length,
        "causal": True,
        **settings,
    }
    return ReformerConfig(**given)  # type: ignore[arg-type]


class _Called(nn.Module):
    """One of our layers as a function of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, call=AttentionCall()).out
        return out


class _Transformers(nn.Module):
    """transformers' layer, with an output projection."""

    def __init__(self, shape: Shape, *, length: int, n_hashes: int | None) -> None:
        from transformers import ReformerConfig as PeerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention

        super().__init__()
        config = PeerConfig(
            hidden_size=shape.width, num_attention_heads=shape.n_heads,
            attention_head_size=shape.head_width, lsh_attn_chunk_length=shape.chunk_length,
            num_hashes=n_hashes, num_buckets=None, is_decoder=True, max_position_embeddings=length,
            lsh_attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.layer, self.output = LSHSelfAttention(config), nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.layer(x).hidden_states)
        return out


def lucidrains(shape: Shape, *, length: int, n_hashes: int | None) -> Layer:
    from reformer_pytorch import LSHSelfAttention

    layer: Layer = LSHSelfAttention(
        dim=shape.width, heads=shape.n_heads, n_hashes=n_hashes, bucket_size=shape.chunk_length, causal=True
    )
    return layer


def _backend(name: str) -> Callable[..., Layer]:
    return lambda shape, **settings: ours(shape, backend=name, **settings)


LAYERS: Mapping[str, Callable[..., Layer]] = {
    "ours, triton": _backend("triton"),
    "ours, flex": _backend("flex"),
    "ours, reference": _backend("reference"),
    "ours, auto": _backend("auto"),
    FULL: full,
    "transformers": _Transformers,
    "reformer-pytorch": lucidrains,
}
DEFAULT_LAYERS = [name for name in LAYERS if name != "ours, auto"]


class Clock:
    """Seconds between two points of the device's work, and the memory in between."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def seconds(self, function: Callable[[], object]) -> float:
        """Of a call, until the device is through with it."""
        if not self.on_gpu:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start_event.record()
        function()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return float(start_event.elapsed_time(end_event)) / 1e3

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """What a call needs at the fullest moment, beside what was there."""
        if not self.on_gpu:
            function()
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device)) - before


class Cell:
    """An implementation that can be run, and the record of it."""

    def __init__(self, record: Record, *, shape: Shape, x: Tensor) -> None:
        self.record, self.x = record, x
        torch.manual_seed(0)
        self.layer = LAYERS[record.layer](shape, length=record.length, n_hashes=record.n_hashes)
        if isinstance(self.layer, nn.Module):
            self.layer.to(x.device, x.dtype)

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def both(self) -> None:
        parameters = list(self.layer.parameters()) if isinstance(self.layer, nn.Module) else []
        out = self.forward()
        torch.autograd.grad(out, [self.x, *parameters], torch.ones_like(out), allow_unused=True)


def flops(shape: Shape, *, length: int, n_hashes: int | None) -> float:
    """Of forward and backward: three projections, and scores and weighted values of all pairs looked at."""
    projections = 3 * 2 * length * shape.width**2
    keys = (length + 1) / 2 if n_hashes is None else n_hashes * 2 * shape.chunk_length
    # Backward has two products for each of forward's, and makes the scores again.
    return 3 * projections + 3.5 * 2 * 2 * length * keys * shape.width


class Run:
    """The cells of a run: which are still tried, and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.shape = Shape(
            n_heads=arguments.n_heads, head_width=arguments.head_width, chunk_length=arguments.chunk_length
        )
        self.device = torch.device(arguments.device)
        self.clock = Clock(self.device)
        self.deadline = time.monotonic() + arguments.seconds
        self.peak_flops = arguments.peak_tflops * 1e12 if arguments.peak_tflops else known_peak(self.device)
        #: Implementations, with their rounds, that are not tried any more, and why.
        self.given_up: dict[tuple[str, int | None], str] = {}
        #: The last length, and seconds that all its turns take.
        self.took: dict[tuple[str, int | None], tuple[int, float]] = {}

    def at(self, length: int) -> list[Record]:
        """The cells of a length, measured in turns."""
        names = [
            (name, rounds)
            for name in self.arguments.layers
            for rounds in ([None] if name == FULL else self.arguments.n_hashes)
        ]
        records = [Record(layer=name, length=length, n_hashes=rounds) for name, rounds in names]
        x = torch.randn(
            1, length, self.shape.width, device=self.device, dtype=getattr(torch, self.arguments.dtype)
        ).requires_grad_()
        cells = [cell for cell in (self._begin(record, x=x) for record in records) if cell is not None]
        for _ in range(self.arguments.turns):
            for cell in cells:
                self._guarded(cell.record, partial(self._measure, cell))
        return records

    def _begin(self, record: Record, *, x: Tensor) -> Cell | None:
        """Build it, warm it up and see what memory it needs."""
        key = (record.layer, record.n_hashes)
        left = self.deadline - time.monotonic()
        length, seconds = self.took.get(key, (record.length, 0.0))
        # As full attention grows.
        if seconds * (record.length / length) ** 2 > left:
            self.given_up.setdefault(key, "no_time")
        if key in self.given_up:
            record.status = self.given_up[key]
            return None
        made: list[Cell] = []

        def begin() -> None:
            cell = Cell(record, shape=self.shape, x=x)
            cell.both()
            start = time.monotonic()
            record.peak_bytes = self.clock.peak_bytes(cell.both)
            self.took[key] = (record.length, (time.monotonic() - start) * (1 + 2 * self.arguments.turns))
            made.append(cell)

        self._guarded(record, begin)
        return made[0] if made else None

    def _measure(self, cell: Cell) -> None:
        record = cell.record
        if record.status != "ok" or time.monotonic() > self.deadline:
            return
        with torch.no_grad():
            record.forward_s.append(self.clock.seconds(cell.forward))
        record.both_s.append(self.clock.seconds(cell.both))
        if self.peak_flops:
            work = flops(self.shape, length=record.length, n_hashes=record.n_hashes)
            record.peak_share = work / statistics.median(record.both_s) / self.peak_flops

    def _guarded(self, record: Record, function: Callable[[], None]) -> None:
        """Run it; where it fails, say so in the record and give it up."""
        try:
            function()
        except torch.OutOfMemoryError:
            self._give_up(record, "out_of_memory")
        except ImportError as error:
            self._give_up(record, f"not installed: {error.name}")
        except Exception as error:
            # A peer's fault must not end the run.
            self._give_up(
                record, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )

    def _give_up(self, record: Record, status: str) -> None:
        record.status = self.given_up[record.layer, record.n_hashes] = status
        if self.clock.on_gpu:
            torch.cuda.empty_cache()


def known_peak(device: torch.device) -> float | None:
    """The most FLOP/s of a device, if its name tells."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def row(record: Record, *, against: Record | None) -> str:
    """A line of the table, compared with full attention at that length."""
    cells = [str(record.length), record.layer, "" if record.n_hashes is None else str(record.n_hashes)]
    if record.status != "ok" or not record.both_s:
        return (
            "| " + " | ".join([*cells, record.status if record.status != "ok" else "no_time"]) + " | | | | |"
        )
    forward, both = (1e3 * statistics.median(times) for times in (record.forward_s, record.both_s))
    ratio = f"{1e3 * statistics.median(against.both_s) / both:.2f}" if against and against.both_s else ""
    share = "" if record.peak_share is None else f"{record.peak_share:.1%}"
    peak = "" if record.peak_bytes is None else f"{record.peak_bytes / MIB:.0f}"
    return "| " + " | ".join([*cells, f"{forward:.2f}", f"{both:.2f}", ratio, share, peak]) + " |"


def environment(device: torch.device) -> dict[str, str | None]:
    """What the numbers depend on."""
    version: str | None = None
    with suppress(ImportError):
        import triton

        version = triton.__version__
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": version}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**power for power in range(10, 21)])
    parser.add_argument("--n-hashes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--n-heads", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--chunk-length", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=480.0, help="nothing is begun after that")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where its name does not tell")
    parser.add_argument("--layers", nargs="+", default=DEFAULT_LAYERS, choices=list(LAYERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="a file of records, one line of JSON each")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse(arguments)
    warnings.filterwarnings("ignore")
    run = Run(parsed)
    facts = environment(run.device)
    print(f"{facts}, {parsed.n_heads} heads of {parsed.head_width}, {parsed.dtype}\n")
    print(
        "| tokens | layer | rounds | forward ms | forward + backward ms | × SDPA | of the peak | peak MiB |"
    )
    print("|--:|:--|--:|--:|--:|--:|--:|--:|")
    lines: list[str] = []
    for length in sorted(parsed.lengths):
        records = run.at(length)
        against = next((record for record in records if record.layer == FULL), None)
        for record in records:
            print(row(record, against=against), flush=True)
            lines.append(json.dumps({**asdict(record), **facts, "dtype": parsed.dtype, **asdict(run.shape)}))
        if parsed.out is not None:
            # After each length, so that what is cut off keeps what it had.
            parsed.out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
