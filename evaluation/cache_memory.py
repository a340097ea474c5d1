"""How much memory a haystack needs, before it is read: refused with the number, not killed at the end.

Letters: E chunks, S text tokens of a chunk, M model width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
# What a segment holds at once, in multiples of its positions times the width: streams, products, gathered chunks.
ACTIVATIONS = 24
# Scores of retrieval are formed in blocks of 2 ** 22 elements; some tensors of that size live at once.
SCORES = 2**22 * 4 * 8


@dataclass(frozen=True)
class Need:
    """Bytes that reading one haystack takes.

    Attributes:
        device: on the device of the model, its weights left out (they are there already).
        host: of the host.
        chunks: the share of the stored chunks in one of them.
    """

    device: int
    host: int
    chunks: int


def estimate(config: Any, length: int, *, segment_length: int, itemsize: int, offload: bool) -> Need:
    """Estimate from sizes alone.

    A chunk of a DRT costs ``2 S heads head_dim`` elements (keys and values) and a landmark of M; appending copies the
    landmarks. A model with neither chunk memory nor window keeps the keys and values of all tokens in every layer.
    """
    segment = min(segment_length, length)
    widest = max(config.hidden_size, getattr(config, "intermediate_size", 0) or 0)
    device = segment * widest * ACTIVATIONS * itemsize
    chunks = 0
    if not any(getattr(config, name, None) for name in ("window_size", "block_width", "sliding_window")):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        device += 2 * length * config.num_hidden_layers * heads * head_dim * itemsize
    if hasattr(config, "offload_chunk_memory"):
        count, width = length // config.chunk_size, config.chunk_num_kv_heads * config.head_dim
        chunk = 2 * config.chunk_size * width * itemsize
        chunks, landmarks = count * chunk, 2 * count * config.hidden_size * itemsize
        wanted = min(count, (segment // config.chunk_size + 1) * config.chunk_top_k)
        device += landmarks + SCORES + 2 * wanted * chunk
    tokens = 3 * 8 * length
    return Need(device + (0 if offload else chunks), tokens + (chunks if offload else 0), chunks)


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return the free bytes of the device and of the host; a CPU is both at once."""
    host = _host_memory()
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host), host


def check_memory(
    config: Any, length: int, *, segment_length: int, itemsize: int, offload: bool, device: torch.device
) -> Need:
    """Refuse a length whose state would not fit.

    Raises:
        ValueError: with the number of bytes needed, the number free, and what to do.
    """
    need = estimate(config, length, segment_length=segment_length, itemsize=itemsize, offload=offload)
    on_device, on_host = free_memory(device)
    rest = f"leave that length out, or shorten segment_length={segment_length}"
    if device.type == "cuda" and need.device > on_device:
        hint = rest if offload or not need.chunks else f"pass task.offload=true for the {_size(need.chunks)} of chunks"
        raise ValueError(
            f"a length of {length:,} needs {_size(need.device)} of memory on {device}, "
            f"{_size(on_device)} are free: {hint}"
        )
    total = need.host + (need.device if device.type != "cuda" else 0)
    if total > on_host:
        raise ValueError(
            f"a length of {length:,} needs {_size(total)} of host memory, {_size(on_host)} are free: {rest}"
        )
    return need


def _host_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
