"""Gumbel noise from counters: the value at (seed, batch row, row, column) does not depend on what else is drawn.

So the noise of a retrieval is the same however its scores are cut into blocks, and only what is looked at is drawn.
With a seed for every batch row it is also the same however samples are dealt to batches and processes.

Legend: B batch, R rows, E columns.
"""

import torch
from torch import Tensor

# Odd multipliers of two well-tested mixing functions: splitmix64 and a 32 bit finalizer.
GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
SHORT_1, SHORT_2 = 0x21F0AAAD, 0x735A2D97


def draw_seed(device: torch.device, generator: torch.Generator | Tensor | None) -> Tensor:
    """Draw an int64 scalar ``[]`` from a generator (None = the default one), on the device; pass on seeds ``[B]``."""
    if isinstance(generator, Tensor):
        return generator
    return torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)


def row_seeds(seed: int, numbers: Tensor) -> Tensor:
    """Return well mixed seeds int64 ``[B]`` of (seed, number), for numbers int64 ``[B]``, on their device."""
    return _mix(_mix(numbers * GOLDEN + GOLDEN) + seed)


def gumbel(seed: Tensor, batch: int, rows: slice, columns: slice) -> Tensor:
    """Compute ``-log(Exp(1))`` of the counters in ``[0, batch) x rows x columns``.

    Args:
        seed: int64 scalar; or ``[B]``, one for each batch row, whose number then does not enter.
        batch: B.
        rows: first and last row number.
        columns: first and last column number.

    Returns:
        float32 ``[B, R, E]`` on the device of the seed.
    """
    row = torch.arange(rows.start, rows.stop, device=seed.device)
    number = torch.arange(batch, device=seed.device)[:, None] << 32 if seed.dim() == 0 else 0
    key = _mix(seed[..., None] + (number + row + 1) * GOLDEN)[..., None]
    column = torch.arange(columns.start, columns.stop, device=seed.device, dtype=torch.int32) * SHORT_2
    # Both halves of a row's key enter, so that no two rows are shifted copies of each other.
    bits = (key.int() + column).contiguous()
    bits ^= (bits >> 16) & 0xFFFF
    bits *= SHORT_1
    bits ^= (key >> 32).int()
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= SHORT_2
    bits ^= (bits >> 15) & 0x1FFFF
    uniform = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Scramble 64 bit integers (splitmix64)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))
