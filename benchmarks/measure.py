"""Measuring: interleaved process CPU time, CUDA events, allocated memory, and the correctness check before it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

Function = Callable[[], object]


def cpu_seconds(functions: Mapping[str, Function], repeats: int = 5) -> dict[str, float]:
    """Time the functions in turns (A B A B), one warm-up each; returns the best process CPU time of each."""
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn:
                best[name] = min(best[name], time.process_time() - start)
    return best


def cuda_seconds(functions: Mapping[str, Function], repeats: int = 20) -> dict[str, float]:
    """Time the functions in turns by CUDA events, after three warm-ups each; returns the median of each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 3):
        for name, function in functions.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(stop) * 1e-3)
    return {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}


def seconds_on(device: str, functions: Mapping[str, Function], repeats: int = 20) -> dict[str, float]:
    """Time the functions in turns: by CUDA events on a GPU, once by process CPU time on a CPU."""
    return cuda_seconds(functions, repeats) if device == "cuda" else cpu_seconds(functions, 1)


def peak_bytes_on(device: str, function: Function) -> int:
    """Run a function; returns the peak of live bytes beyond those that were live before."""
    if device != "cuda":
        return allocations(function)[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fitting(functions: Mapping[str, Function]) -> dict[str, Function]:
    """Run each function once; returns those for which the device has the memory."""
    fit = {}
    for name, function in functions.items():
        try:
            function()
            fit[name] = function
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return fit


@dataclass(frozen=True)
class Product:
    """A large bfloat16 matrix product, timed beside what it is the limit of."""

    run: Function
    flops: float

    @classmethod
    def on(cls, device: str) -> "Product":
        """Choose a size that fills the device."""
        size = 8192 if device == "cuda" else 256
        left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        return cls(partial(torch.mm, left, right), 2.0 * size**3)

    def limit(self, flops: float, seconds: float) -> float:
        """Return how long other FLOPs take at the rate of the product, which took some seconds."""
        return flops * seconds / self.flops


def allocations(function: Function) -> tuple[int, int]:
    """Run a function on the CPU; returns the peak of its live bytes and its largest single allocation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    live = peak = largest = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak, largest = max(peak, live), max(largest, size)
    return peak, largest


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` and `empty_like` hand out with NaN, so that an unwritten output shows."""

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    empty, empty_like = torch.empty, torch.empty_like
    with (
        patch("torch.empty", lambda *args, **options: fill(empty(*args, **options))),
        patch("torch.empty_like", lambda *args, **options: fill(empty_like(*args, **options))),
    ):
        yield


def check(results: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> None:
    """Refuse to time a wrong result: relative error in norm of every tensor against a reference."""
    for name, reference in expected.items():
        difference = (results[name].double() - reference.double()).norm() / reference.double().norm()
        if not difference <= limit:
            raise ArithmeticError(f"{name} is wrong: relative error {difference:.2e}, allowed {limit:.0e}")
