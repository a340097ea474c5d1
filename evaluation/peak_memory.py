"""The most memory that a stretch of work held: of the CUDA device, else of the process as Linux counts it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Counts from its ``with`` on.

    Args:
        device: where the work is done; memory of a CUDA device is its own, else the process counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        """Begin to count."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._linux = not self._cuda and _reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def bytes(self) -> int | None:
        """Return the most bytes so far, weights included; None where the system does not tell."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        if not self._linux:
            return None
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def _reset() -> bool:
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return _STATUS.is_file()
