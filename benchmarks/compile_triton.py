"""Case A15: compile every Triton kernel for sm_80 and sm_90 without a device, and read the compiler's report.

`python -m benchmarks.compile_triton [--quick]` writes benchmarks/results/triton_compile.csv (or prints a few rows).
The real launch code runs on small CPU tensors behind a stub driver, so exactly what would be launched is compiled.
"""

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels.gca.triton import gca_triton, gca_triton_backward
from kernels.gca.triton_backward import key_kernel, query_kernel, reduce_kernel
from kernels.gca.triton_forward import forward_kernel

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel, "reduce": reduce_kernel}
SHARED_LIMIT = {80: 166_912, 90: 232_448}
COLUMNS = ["kernel", "arch", "dtype", "rows", "C", "D", "off_by_one", "warps", "registers", "stack", "shared", "mma"]
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Shape = tuple[torch.dtype, int, int, int, int, bool]
"""dtype, S, G, C, D, off by one and ragged lengths."""


class StubDriver:
    """Answers what the compiler asks a driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # one cache of compiled kernels per architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def shapes() -> list[Shape]:
    """List every tile choice of the launch table, training and decoding, plain and with all options."""
    half = [
        (dtype, rows, group, chunk, size, options)
        for dtype in (torch.bfloat16, torch.float16)
        for size in (16, 32, 64, 96, 128, 256)
        for rows, group, chunk, options in (
            (64, 1, 63, True),
            (65, 1, 64, False),
            (64, 4, 64, False),
            (1, 8, 200, True),
        )
    ]
    full = [(torch.float32, 64, 1, 63, size, True) for size in (64, 128, 256)]
    return half + full


def _record(launches: list[tuple[str, Any]]) -> None:
    """Make every launch compile only, and keep what was compiled."""
    for name, kernel in KERNELS.items():
        run = type(kernel).run

        def compile_only(*args: Any, name: str = name, kernel: Any = kernel, run: Any = run, **options: Any) -> Any:
            launches.append((name, run(kernel, *args, **(options | {"warmup": True}))))

        kernel.run = compile_only


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread and stack bytes (spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / "cuobjdump"), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if numbers is None:
        raise RuntimeError(f"cuobjdump reported no resources: {report}")
    return int(numbers[1]), int(numbers[2])


def compile_shapes(chosen: list[Shape], archs: tuple[int, ...] = (80, 90)) -> Iterator[dict[str, Any]]:
    """Compile forward and backward of each shape; yields one row a kernel."""
    launches: list[tuple[str, Any]] = []
    _record(launches)
    for arch in archs:
        triton.runtime.driver.set_active(StubDriver(arch))
        for dtype, rows, group, chunk, size, options in chosen:
            q = torch.zeros(1, 16, rows, 2 * group, size, dtype=dtype)
            k = torch.zeros(1, 16, chunk, 2, size, dtype=dtype)
            indices, weights = torch.zeros(1, 16, 8, dtype=torch.int32), torch.zeros(1, 16, 8)
            lengths = torch.zeros(1, 16, dtype=torch.int32) if options else None
            lse = gca_triton(q, k, k, indices, weights, lengths, 0.1, options)[1]
            gca_triton_backward(q, q, k, k, indices, weights, lengths, lse, 0.1)
            for name, kernel in launches:
                registers, stack = _resources(kernel.asm["cubin"])
                mma = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", kernel.asm["ptx"]))
                values = (name, arch, str(dtype)[6:], rows * group, chunk, size, options, kernel.metadata.num_warps)
                yield dict(zip(COLUMNS, (*values, registers, stack, kernel.metadata.shared, mma), strict=True))
            launches.clear()


def problem(row: dict[str, Any]) -> str | None:
    """Say what is wrong with a compiled kernel; None if nothing is."""
    if row["stack"]:
        return f"spills {row['stack']} bytes"
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        return f"needs {row['shared']} bytes of shared memory"
    if not row["mma"] and row["kernel"] != "reduce" and row["dtype"] != "float32":
        return "has no tensor-core instruction"
    return None


def main(quick: bool) -> int:
    """Compile, write the report, and return 1 if a kernel has a problem."""
    chosen = [shape for shape in shapes() if shape[:2] == (torch.bfloat16, 64) and shape[4] in (64, 128)][:2]
    rows = []
    for row in compile_shapes(chosen if quick else shapes()):
        rows.append(row)
        print(*row.values(), problem(row) or "", flush=True)
    if not quick:
        path = Path(__file__).parent / "results" / "triton_compile.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 1 if any(problem(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
