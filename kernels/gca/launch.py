"""Tile sizes and resources of the Triton kernels: a deterministic default, and what autotuning may choose instead.

Notable: the tables list what compiles for sm_80 and sm_90 without spills and within their shared memory; the offline
compile test keeps them so.

Legend: S rows of a query group, G heads a kv head, C keys of a chunk, D head size.
"""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
import triton

Kind = Literal["forward", "query", "key"]
Choice: TypeAlias = tuple[int, int, int]
"""The most rows of a tile, warps, stages of the software pipeline."""


@dataclass(frozen=True)
class Shape:
    """What decides how a kernel is best launched."""

    kind: Kind
    rows: int
    """G S rows of a program's query group."""
    chunk_size: int
    head_dim: int
    dtype: torch.dtype
    descriptors: bool = False
    """Whether keys and values can be read through tensor descriptors."""


@dataclass(frozen=True)
class Launch:
    """Tile sizes and resources of one kernel."""

    block_m: int
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int = 2
    descriptors: bool = False


# For D <= 32, 64, 128 and 256; the first is the default. One warp group (4 warps) multiplies 64 rows at once on sm_90.
CHOICES: dict[Kind, tuple[list[Choice], list[Choice], list[Choice], list[Choice]]] = {
    "forward": (
        [(64, 4, 2), (64, 8, 2), (32, 4, 2)],
        [(64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 4, 3), (128, 8, 2), (128, 8, 3)],
        [(64, 8, 2), (64, 4, 2), (64, 4, 3), (32, 4, 2)],
        [(64, 8, 2), (32, 8, 3)],
    ),
    "query": (
        [(64, 8, 2), (32, 4, 2)],
        [(64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 8, 2)],
        [(64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 4, 3)],
        [(32, 8, 2), (32, 8, 3)],
    ),
    "key": (
        [(64, 8, 2)],
        [(64, 4, 2), (64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 4, 3)],
        [(64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 8, 2)],
        [(32, 8, 2), (64, 8, 2), (32, 8, 3)],
    ),
}
# Keys and values by tensor descriptors (sm_90); the key kernel reads each tile once, it would gain nothing.
DESCRIBED: dict[Kind, tuple[list[Choice], list[Choice], list[Choice], list[Choice]]] = {
    "forward": (
        [(64, 4, 2)],
        [(64, 4, 2), (64, 4, 3), (128, 8, 2)],
        [(64, 8, 2), (64, 4, 2), (64, 4, 3)],
        [(32, 8, 2)],
    ),
    "query": ([(64, 8, 2)], [(64, 4, 2), (64, 4, 3)], [(64, 8, 2), (32, 4, 2)], [(32, 8, 2)]),
    "key": ([], [], [], []),
}
# The most keys of a tile.
MOST_KEYS: dict[Kind, tuple[int, int, int, int]] = {
    "forward": (128, 128, 128, 64),
    "query": (128, 128, 64, 64),
    "key": (64, 64, 64, 32),
}
# Float32 products use no tensor cores and many registers: the most rows and keys of a tile, and warps.
FLOAT32: dict[Kind, tuple[Choice, Choice, Choice, Choice]] = {
    "forward": ((16, 32, 4), (16, 32, 4), (16, 16, 4), (16, 16, 8)),
    "query": ((32, 32, 8), (32, 32, 8), (16, 16, 2), (16, 16, 4)),
    "key": ((32, 32, 8), (32, 32, 8), (16, 16, 4), (16, 32, 8)),
}


def candidates(shape: Shape, capability: int) -> list[Launch]:
    """List at most 12 launches, the default first.

    Args:
        shape: what is to be launched.
        capability: major compute capability of the device; 0 = unknown.
    """
    block_d = max(16, triton.next_power_of_2(shape.head_dim))
    column = [32, 64, 128, 256].index(max(32, block_d))
    if shape.dtype.itemsize == 4:
        most_rows, most_keys, num_warps = FLOAT32[shape.kind][column]
        return [Launch(_rows(shape, most_rows), min(most_keys, _keys(shape)), block_d, num_warps)]
    # An accumulator that is scaled between the tiles of a chunk leaves few registers: only the defaults do not spill.
    most = 1 if _keys(shape) > MOST_KEYS[shape.kind][column] else None
    chosen = [_launch(shape, choice, column, block_d) for choice in CHOICES[shape.kind][column][:most]]
    if shape.descriptors and capability >= 9:
        described = [_launch(shape, choice, column, block_d) for choice in DESCRIBED[shape.kind][column][:most]]
        chosen += [replace(launch, descriptors=True) for launch in described]
    return list(dict.fromkeys(chosen))


def _launch(shape: Shape, choice: Choice, column: int, block_d: int) -> Launch:
    most_rows, num_warps, num_stages = choice
    block_m, block_c, most_keys = _rows(shape, most_rows), _keys(shape), MOST_KEYS[shape.kind][column]
    if block_c > most_keys:  # several tiles a chunk
        block_c = min(most_keys, 32 if shape.kind == "query" or block_m == 16 else 64)
        if block_d == 256 and shape.kind != "key":
            block_m, block_c = min(block_m, 32), block_c // 2
    if shape.kind == "query" and block_c == 128:  # two products of all keys are held at once
        block_m = min(block_m, 32)
    return Launch(block_m, block_c, block_d, num_warps, num_stages)


def _rows(shape: Shape, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(shape.rows)))


def _keys(shape: Shape) -> int:
    return max(16, triton.next_power_of_2(shape.chunk_size))
