"""What numbers depend on besides models, texts and options: dtype, device and versions."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from evaluation.results import git_commit


def arithmetic(device: torch.device, dtype: str) -> dict[str, Any]:
    """Return dtype, device and the versions of what computes; numbers that differ in them are not mixed."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"dtype": dtype, "device": device_name(device), "versions": versions}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, ``cpu`` of any CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str | None]:
    """Return the versions of all that was at work, for a report."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git_commit(),
    }
