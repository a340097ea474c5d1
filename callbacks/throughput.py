"""Tokens per second, TFLOP/s, share of the device's peak (MFU) and peak memory of training.

Notable: the host looks at the device only where something is logged. Between two marks the clock runs over whole
steps, data loading included, and stands still from the start of a validation to the next training batch.
"""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.ranks import num_data_ranks

# Dense bfloat16 tensor-core TFLOP/s of the vendors' data sheets (no sparsity), by a word of the device's name.
PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a GPU by its name, None when it is not in the table."""
    found = (peak for name, peak in PEAK_BF16_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    return next(found, None)


def flops_per_token(model: Any, context_length: int) -> float:
    """Return FLOPs of forward and backward per token.

    The model's own ``num_flops_per_token(context_length)`` where it has one; else ``6 N`` with N all parameters,
    which leaves attention out and counts an untied input embedding as if it were a product.
    """
    own = getattr(model, "num_flops_per_token", None)
    if own is not None:
        return float(own(context_length))
    # Parameters that DeepSpeed has partitioned keep their true size under another name.
    return 6.0 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


class Throughput(pl.Callback):
    """Log ``perf/tokens_per_second`` (all devices), ``perf/tflops_per_second`` (per device), ``perf/mfu`` and memory.

    ``tflops_per_second = tokens_per_second / devices * flops_per_token / 1e12`` and ``mfu = tflops_per_second /`` the
    device's dense bfloat16 peak; MFU is not logged for a device outside `PEAK_BF16_TFLOPS`. Tokens are those of
    ``batch["input_ids"]``, padding included. ``perf/peak_memory_gib`` is the allocator's peak on a GPU and the
    largest resident size of the process on a CPU. The first step is left out: it pays for compilation and warm-up.

    Args:
        window: number of past marks the average runs over.
        every_n_steps: steps between marks; None is the trainer's ``log_every_n_steps``.

    Attributes:
        last: what was logged last, by name.
    """

    def __init__(self, *, window: int = 5, every_n_steps: int | None = None) -> None:
        if window < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(f"window and every_n_steps must be at least 1, got {window} and {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.last: dict[str, float] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self._tokens, self._step, self._paused = 0, 0, 0.0
        self._pause_start: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with empty marks."""
        self._marks.clear()
        self._pause_start = None
        self._tokens, self._step, self._paused = 0, trainer.global_step, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock when the steps before are done."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            _wait_for(pl_module.device)
            self._pause_start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock run again after a validation and the checkpoint that may follow it."""
        if self._pause_start is not None:
            self._paused += time.perf_counter() - self._pause_start
            self._pause_start = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens; at the end of a step that is logged, set a mark."""
        self._tokens += batch["input_ids"].numel()
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        due = self._step % (self.every_n_steps or trainer.log_every_n_steps or 1) == 0
        if not due and self._marks:
            return
        _wait_for(pl_module.device)
        self._marks.append((time.perf_counter() - self._paused, self._tokens))
        if due and len(self._marks) > 1:
            self._log(trainer, pl_module, batch["input_ids"].shape[1])

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, context_length: int) -> None:
        (start, before), (end, now) = self._marks[0], self._marks[-1]
        tokens_per_second = (now - before) * num_data_ranks(trainer) / (end - start)
        model = getattr(pl_module, "model", pl_module)
        tflops = tokens_per_second / trainer.world_size * flops_per_token(model, context_length) / 1e12
        self.last = {
            "perf/tokens_per_second": tokens_per_second,
            "perf/tflops_per_second": tflops,
            "perf/peak_memory_gib": _peak_memory_gib(pl_module.device),
        }
        peak = _device_peak(pl_module.device)
        if peak is not None:
            self.last["perf/mfu"] = tflops / peak
        for name, value in self.last.items():
            pl_module.log(name, value, prog_bar=name == "perf/tokens_per_second")


def _device_peak(device: torch.device) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on every system, and only needed here

    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
