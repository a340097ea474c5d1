"""The exchanges in one process, over a list with every part: what autograd makes of them is what processes must get.

Legend: B batch, N entries of a part along the sequence.
"""

import torch
from torch import Tensor


def before_reference(parts: list[Tensor], count: int) -> list[Tensor]:
    """``y_r = x_{r-1}[:, -count:]``, ``y_0`` empty; parts ``[B, N_r, ...]``."""
    return [parts[0][:, :0], *(part[:, part.shape[1] - count :] for part in parts[:-1])]


def up_to_here_reference(parts: list[Tensor]) -> list[Tensor]:
    """``y_r = cat(x_0 ... x_r)``; parts ``[B, N_r, ...]``."""
    return [torch.cat(parts[: last + 1], dim=1) for last in range(len(parts))]
