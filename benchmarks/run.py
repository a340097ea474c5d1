"""Run the benchmarks: `python -m benchmarks.run [GROUP or CASE ...]`; rows are appended to benchmarks/results/*.csv."""

import csv
import importlib
import importlib.metadata
import pkgutil
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import benchmarks
from benchmarks.registry import CASES, Case, Row

RESULTS = Path(__file__).parent / "results"
IDENTITY = ["date", "commit", "machine", "threads", "torch", "triton"]
FINDINGS = ["case", "shape", "measure", "ours", "peer", "other", "ratio", "target", "floor", "passed"]


def machine(device: str) -> str:
    """Name the processor or the accelerator, never the host."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit_of(folder: Path) -> str:
    """Name the commit that a folder is of, with "-dirty" behind it if code was changed since: rows are no code."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    rows = [f":(top,exclude)benchmarks/{name}" for name in ("results", "figures")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *rows)
    return (git("describe", "--always", "--exclude", "*") or "unknown") + ("-dirty" if changed else "")


def identity(device: str) -> dict[str, str]:
    """Say when, of what and where a row was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of(RESULTS.parent),
        "machine": machine(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def record(case: Case, row: Row) -> None:
    """Append one row to the file of its group."""
    values = {
        **identity(case.device),
        "case": case.id,
        "shape": row.shape,
        "measure": row.measure,
        "ours": f"{row.ours:.4g}",
        "peer": row.peer,
        "other": f"{row.other:.4g}",
        "ratio": f"{row.ratio:.3g}",
        "target": f"{'>=' if row.better == 'higher' else '<='} {row.target:g}",
        "floor": "" if row.floor is None else f"{row.floor:g}",
        "passed": "yes" if row.reaches(row.target) else "no",
    }
    path = RESULTS / f"{case.group}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, IDENTITY + FINDINGS)
        if new:
            writer.writeheader()
        writer.writerow(values)
    print("  ".join(str(values[name]) for name in FINDINGS), flush=True)


def select(names: list[str]) -> list[Case]:
    """Import every module of this folder and pick the cases of the groups or ids asked for.

    Raises:
        ValueError: if a name is neither a group nor a case.
    """
    for module in pkgutil.iter_modules(benchmarks.__path__):
        try:
            importlib.import_module(f"benchmarks.{module.name}")
        except ImportError as error:  # an optional package: the other cases still run
            print(f"benchmarks.{module.name}: skipped, {error}")
    known = {case.id for case in CASES} | {case.group for case in CASES}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"no benchmark group or case {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [case for case in CASES if not names or case.id in names or case.group in names]


def main(names: list[str]) -> int:
    """Run the cases; returns 1 if a row fell below its floor, 2 on a wrong name."""
    try:
        cases = select(names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    start, broken = time.monotonic(), []
    for case in cases:
        if problem := case.problem():
            print(f"{case.id}: skipped, {problem}")
            continue
        for row in case.run():
            record(case, row)
            if row.broken:
                broken.append(case.id)
    print(f"{time.monotonic() - start:.0f} s" + (f"; below the floor: {', '.join(broken)}" if broken else ""))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
