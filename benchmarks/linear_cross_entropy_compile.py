"""Compile the tile kernels of the per-token loss for sm_80 and sm_90 without a device, and read the compiler's report.

`python -m benchmarks.linear_cross_entropy_compile` writes benchmarks/results/linear_cross_entropy_compile.csv. The real
launch code runs on small CPU tensors behind a stub driver. These kernels multiply no matrices, so no tensor-core
instruction is expected; none may spill.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.compile_triton import SHARED_LIMIT, StubDriver, _resources
from kernels.linear_cross_entropy import triton as kernels
from kernels.linear_cross_entropy.tiles import Running, Tile

COLUMNS = ["kernel", "arch", "dtype", "U", "bias", "softcap", "keep", "warps", "registers", "stack", "shared"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _steps(dtype: torch.dtype, width: int, bias: bool, softcap: bool) -> Iterator[tuple[bool, Any]]:
    """Yield (keep, call) of every step over a tile of a few rows."""
    rows = 4
    hidden, entries = torch.zeros(rows, 8, dtype=dtype), torch.zeros(width, 8, dtype=dtype)
    targets, statistic = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    tile = Tile(hidden, entries, torch.zeros(width) if bias else None, targets, 30.0 if softcap else None)
    running = Running(statistic, statistic, statistic)
    yield False, lambda: kernels.accumulate(tile, running, False)
    yield True, lambda: kernels.accumulate(tile, running, True)
    yield False, lambda: kernels.differentiate(tile, statistic, statistic)


def compile_kernels(
    widths: Sequence[int] = (4096, 4095, 1000, 100), *, every_option: bool = True
) -> Iterator[dict[str, Any]]:
    """Compile every variant, or only those of bfloat16 with all options; yields one row a kernel."""
    choices = (
        (DTYPES, widths, (False, True), (False, True)) if every_option else ([torch.bfloat16], widths, [True], [True])
    )
    launches: list[tuple[str, Any]] = []
    for kernel in (kernels.accumulate_kernel, kernels.differentiate_kernel):
        run = type(kernel).run

        def compile_only(*arguments: Any, kernel: Any = kernel, run: Any = run, **options: Any) -> None:
            launches.append((kernel.__name__, run(kernel, *arguments, **(options | {"warmup": True}))))

        kernel.run = compile_only
    only_kernels: Any = kernels
    only_kernels.product = lambda a, b: torch.zeros(len(a), len(b))
    for arch in (80, 90):
        triton.runtime.driver.set_active(StubDriver(arch))
        for dtype, width, bias, softcap in product(*choices):
            for keep, step in _steps(dtype, width, bias, softcap):
                step()
                name, compiled = launches.pop()
                registers, stack = _resources(compiled.asm["cubin"])
                values = (name, arch, str(dtype)[6:], width, bias, softcap, keep, compiled.metadata.num_warps)
                yield dict(zip(COLUMNS, (*values, registers, stack, compiled.metadata.shared), strict=True))


def problem(row: dict[str, Any]) -> str | None:
    """Say what is wrong with a compiled kernel; None if nothing is."""
    if row["stack"]:
        return f"spills {row['stack']} bytes"
    return "needs too much shared memory" if row["shared"] > SHARED_LIMIT[row["arch"]] else None


def main() -> int:
    """Compile, write the report, and return 1 if a kernel has a problem."""
    rows = []
    for row in compile_kernels():
        rows.append(row)
        print(*row.values(), problem(row) or "", flush=True)
    path = Path(__file__).parent / "results" / "linear_cross_entropy_compile.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return 1 if any(problem(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
