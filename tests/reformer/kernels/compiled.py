"""What Triton compiles of the kernels' launches for an H100, one line of JSON each; needs no GPU.

TRITON_INTERPRET=0 python -m tests.reformer.kernels.compiled bfloat16 64 64 --n-hashes 2
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from reformer.attention.lsh import pattern_of
from reformer.attention.options import LSHOptions
from reformer.kernels import rounds as sorting
from reformer.kernels import triton_attention


class Absent:
    """A driver of an H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiling:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **settings: Any) -> None:
            binary = self.kernel.warmup(*arguments, grid=grid, **settings)
            print(json.dumps({"name": self.kernel.__name__, **facts(binary)}))

        return launch


def facts(binary: Any) -> dict[str, Any]:
    """Its memory, as the binary says, and whether it has instructions of the matrix units."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "shared_bytes": binary.metadata.shared,
        "uses_matrix_units": "mma" in binary.asm["ptx"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dtype")
    parser.add_argument("dim", type=int)
    parser.add_argument("chunk_length", type=int)
    parser.add_argument("--mode", default="strict")
    parser.add_argument("--n-hashes", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--tf32", action="store_true")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    triton.runtime.driver.set_active(Absent())
    for name in ("_forward", "_delta", "_backward"):
        setattr(triton_attention, name, Compiling(getattr(triton_attention, name)))
    options = LSHOptions(
        n_hashes=arguments.n_hashes,
        chunk_length=arguments.chunk_length,
        causal=arguments.mode != "both ways",
        causality="strict" if arguments.mode == "strict" else "published",
        dropout_p=arguments.dropout,
    )
    dtype = getattr(torch, arguments.dtype)
    x = torch.zeros(1, 16, 256, arguments.dim, dtype=dtype)
    rounds = sorting.Rounds(
        order=sorting.sort(torch.zeros(1, 16, arguments.n_hashes, 256, dtype=torch.int32), real=None),
        real=None,
        pattern=pattern_of(options, dim=arguments.dim),
        seed=2**61 + 1,
    )
    out, logsumexp = triton_attention.forward(x, x, rounds)
    triton_attention.backward(x, x, rounds, out=out, logsumexp=logsumexp, dout=x)


if __name__ == "__main__":
    main()
