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
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels.gca.launch import Launch, Shape, candidates
from kernels.gca.operator import gca_backward_operator, gca_operator
from kernels.gca.triton_backward import key_kernel, query_kernel, reduce_kernel
from kernels.gca.triton_forward import forward_kernel

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel, "reduce": reduce_kernel}
ARCHS = (80, 90)
SHARED_LIMIT = {80: 166_912, 90: 232_448}
FACTS = ["kernel", "arch", "dtype", "rows", "C", "D", "options"]
TILES = ["block_m", "block_c", "warps", "stages", "descriptors"]
REPORT = ["registers", "stack", "shared", "mma", "tma"]
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Problem = tuple[torch.dtype, int, int, int, int, bool]
"""dtype, S, G, C, D, options (off by one and ragged lengths)."""


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


def default_problems() -> list[Problem]:
    """List shapes that cover the default tiles: training and decoding, plain and with all options, every type."""
    half = [
        (dtype, rows, group, chunk, size, options)
        for dtype in (torch.bfloat16, torch.float16)
        for size in (16, 32, 64, 96, 128, 256)
        for rows, group, chunk, options in (
            (64, 1, 63, True),
            (65, 1, 64, False),
            (64, 4, 64, False),
            (64, 1, 128, True),
            (64, 1, 200, True),
            (1, 8, 200, True),
        )
    ]
    full = [(torch.float32, 64, 1, chunk, size, True) for chunk in (63, 200) for size in (64, 128, 256)]
    return half + full


def tuned_problems() -> list[Problem]:
    """List the shapes for which everything that autotuning may choose is compiled."""
    return [
        (torch.bfloat16, 64, group, chunk, size, options)
        for size in (32, 64, 128, 256)
        for group, chunk, options in ((1, 63, True), (4, 64, False), (1, 200, True))
    ]


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


def _launch(problem: Problem) -> None:
    """Run forward and backward on a few query groups."""
    dtype, rows, group, chunk, size, options = problem
    q = torch.zeros(1, 16, rows, 2 * group, size, dtype=dtype)
    k = torch.zeros(1, 16, chunk, 2, size, dtype=dtype)
    indices, weights = torch.zeros(1, 16, 8, dtype=torch.int32), torch.zeros(1, 16, 8)
    tensors = q, k, k, indices, weights, torch.zeros(1, 16, dtype=torch.int32) if options else None, None
    lse = gca_operator(*tensors, 0.1, options, "triton")[1]
    gca_backward_operator(q, *tensors, lse, 0.1, "triton")


def compile_problems(
    problems: list[Problem], *, tuned: bool, archs: tuple[int, ...] = ARCHS
) -> Iterator[dict[str, Any]]:
    """Compile the kernels of each shape, with the default tiles or with all that autotuning may choose.

    Yields:
        One row a kernel: what it is, its tiles, and the compiler's report.
    """
    launches: list[tuple[str, Any]] = []
    _record(launches)
    for arch in archs:
        triton.runtime.driver.set_active(StubDriver(arch))
        for problem in problems:
            done: set[tuple[str, Launch | None]] = set()
            for number in range(12 if tuned else 1):
                chosen: dict[str, Launch] = {}

                def choose(
                    shape: Shape, *_: Any, number: int = number, chosen: Any = chosen, arch: int = arch
                ) -> Launch:
                    options = candidates(shape, arch // 10)
                    chosen[shape.kind] = options[min(number, len(options) - 1)]
                    return chosen[shape.kind]

                launches.clear()
                with patch("kernels.gca.triton.choose", choose):
                    _launch(problem)
                for name, kernel in launches:
                    if (name, chosen.get(name)) not in done:
                        done.add((name, chosen.get(name)))
                        yield _row(name, arch, problem, chosen.get(name), kernel)


def _row(name: str, arch: int, problem: Problem, tiles: Launch | None, kernel: Any) -> dict[str, Any]:
    dtype, rows, group, chunk, size, options = problem
    registers, stack = _resources(kernel.asm["cubin"])
    code = kernel.asm["ptx"]
    mma = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", code))
    values: list[Any] = [name, arch, str(dtype)[6:], rows * group, chunk, size, options]
    if tiles is None:
        values += ["", "", kernel.metadata.num_warps, "", False]
    else:
        values += [tiles.block_m, tiles.block_c, tiles.num_warps, tiles.num_stages, tiles.descriptors]
    values += [registers, stack, kernel.metadata.shared, mma, code.count("cp.async.bulk.tensor")]
    return dict(zip(FACTS + TILES + REPORT, values, strict=True))


def problem_of(row: dict[str, Any]) -> str | None:
    """Say what is wrong with a compiled kernel; None if nothing is."""
    if row["stack"]:
        return f"spills {row['stack']} bytes"
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        return f"needs {row['shared']} bytes of shared memory"
    if not row["mma"] and row["kernel"] != "reduce" and row["dtype"] != "float32":
        return "has no tensor-core instruction"
    if row["descriptors"] and not row["tma"]:
        return "reads no tile by its descriptor"
    return None


def report(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield all rows, or the default tiles of two shapes and one shape's descriptors."""
    if quick:
        yield from compile_problems([(torch.bfloat16, 64, 1, 63, size, True) for size in (64, 128)], tuned=False)
    else:
        yield from compile_problems(default_problems(), tuned=False)
        yield from compile_problems(tuned_problems(), tuned=True)


def main(quick: bool) -> int:
    """Compile, write the report, and return 1 if a kernel has a problem."""
    rows = []
    for row in report(quick):
        rows.append(row)
        print(*row.values(), problem_of(row) or "", flush=True)
    if not quick:
        path = Path(__file__).parent / "results" / "triton_compile.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FACTS + TILES + REPORT)
            writer.writeheader()
            writer.writerows(rows)
    return 1 if any(problem_of(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
