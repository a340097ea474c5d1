"""The choice of tile sizes by measurement on the GPU, remembered on disk.

Notable: without a measurement the choice is the default of `launch.py`, always the same. Measuring happens at the first
call for a class of shapes on a device, with that call's own tensors (every kernel overwrites its results), and not
while a CUDA graph is captured or deterministic algorithms are asked for. Another tile size changes results in the last
bits only.
"""

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from kernels.gca.cache import cache_folder, write_atomically
from kernels.gca.launch import Launch, Shape, candidates

Run = Callable[[Launch], object]
Timer = Callable[[Callable[[], object]], float]


class Tuner:
    """Remembers the fastest launch of each key, in a JSON file and in memory."""

    def __init__(self, path: Path | None, timer: Timer) -> None:
        """Start from a file.

        Args:
            path: the file, shared by processes; None = remember in memory only.
            timer: measures a call, in any unit.
        """
        self.path = path
        self.timer = timer
        self.known = _read(path)

    def choose(self, key: str, options: list[Launch], run: Run, *, may_measure: bool = True) -> Launch:
        """Return the remembered launch, else measure the options (the default comes first and wins ties)."""
        known = self.known.get(key)
        if known is not None and known in options:
            return known
        if not may_measure:
            return options[0]
        times = [self._time(functools.partial(run, option)) for option in options]
        best = options[times.index(min(times))]
        if min(times) < float("inf"):
            self._remember(key, best)
        return best

    def _time(self, call: Callable[[], object]) -> float:
        try:
            return self.timer(call)
        except (TritonError, RuntimeError) as error:  # more registers or shared memory than this device has
            logging.getLogger(__name__).info("a launch is left out: %s", error)
            return float("inf")

    def _remember(self, key: str, best: Launch) -> None:
        self.known = _read(self.path) | self.known | {key: best}  # others may have written meanwhile
        if self.path is not None:
            content = json.dumps({name: asdict(launch) for name, launch in sorted(self.known.items())}, indent=1)
            write_atomically(self.path, content.encode())


def _read(path: Path | None) -> dict[str, Launch]:
    """Read a file; a missing or damaged one is empty, and so is a damaged entry."""
    try:
        entries = {} if path is None else json.loads(path.read_bytes())
        return {key: Launch(**entry) for key, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@functools.cache
def _tuner() -> Tuner:
    folder = cache_folder()
    path = None if folder is None else folder / "gca-launches.json"
    return Tuner(path, lambda call: float(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")))


def tuning_key(shape: Shape, device: str, capability: tuple[int, int]) -> str:
    """Name a class of shapes on a device: sizes count up to the next power of two."""
    rows, keys = (triton.next_power_of_2(size) for size in (shape.rows, shape.chunk_size))
    sizes = f"rows {rows}, keys {keys}, dim {shape.head_dim}, {str(shape.dtype)[6:]}"
    read = ", descriptors" if shape.descriptors else ""
    return f"{shape.kind}: {sizes}{read}; {device} {capability[0]}.{capability[1]}, triton {triton.__version__}"


def choose(shape: Shape, device: torch.device, run: Run) -> Launch:
    """Choose how to launch a kernel on a device; ``run`` launches it with this call's tensors."""
    if device.type != "cuda":
        return candidates(shape, 0)[0]
    capability = torch.cuda.get_device_capability(device)
    options = candidates(shape, capability[0])
    may_measure = not (torch.cuda.is_current_stream_capturing() or torch.are_deterministic_algorithms_enabled())
    key = tuning_key(shape, torch.cuda.get_device_name(device), capability)
    with torch.cuda.device(device):
        return _tuner().choose(key, options, run, may_measure=may_measure)
