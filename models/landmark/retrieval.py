"""Landmark attention to the best earlier blocks of each query and head, at positions that never grow.

Each query sees its own block as block K of a frame of K + 1. The K latest blocks are scored at their places in the
frame, all older ones at the place before it. The best K are read (of equals the later ones); in the frame they stand in
their order right before the own block. With at most K earlier blocks this is landmark attention as it is. What a query
reads depends on nothing but its own row, so the pieces in which a sequence arrives change nothing.

Legend: B batch, R queries of a tile, L keys, N blocks, C positions of a block, K blocks read, H heads, G kv heads, s
heads of a kv head, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.landmark import landmark_grouped_softmax
from models.rotary import rotary_at, rotate

# Gathered key elements of a tile.
TILE = 2**23
# In the first layer all landmarks are one vector, so that far blocks tie but for rounding: scores this close are equal.
TIE = 2**-10


@dataclass(frozen=True)
class Frame:
    """Sizes of the frame a query reads."""

    block_size: int
    top_k: int
    rope_theta: float

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[..., P, H, D]`` to ``[..., P]``."""
        return rotate(x, rotary_at(positions, x.shape[-1], theta=self.rope_theta))


def top_k_attention(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, frame: Frame) -> Tensor:
    """Attend to the own block and the best K earlier ones.

    Args:
        query: ``[B, T, H, D]``, not rotated.
        key: ``[B, L, G, D]``, not rotated.
        value: ``[B, L, G, D]``.
        positions: Place of each query among the keys ``[B, T]``; anything behind a row's end.
        frame: Sizes.

    Returns:
        ``[B, T, H, D]`` in the dtype of the query.
    """
    missing = -key.shape[1] % frame.block_size
    keys, values = (
        F.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, frame.block_size)) for x in (key, value)
    )  # [B, N, C, G, D]
    # Queries of shorter rows may point behind the last block; their outputs are nobody's.
    positions = positions.clamp_max(keys.shape[1] * frame.block_size - 1)
    read = (frame.top_k + 1) * frame.block_size * query.shape[0] * query.shape[2] * query.shape[3]
    rows = max(1, TILE // read)
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            _attend(query[:, start : start + rows], keys, values, positions[:, start : start + rows], frame=frame)
            for start in range(0, query.shape[1], rows)
        ]
    return torch.cat(parts, dim=1).to(query.dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, frame: Frame) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    query = query.to(exact) * query.shape[-1] ** -0.5
    own, cell = positions // frame.block_size, positions % frame.block_size
    landmarks = keys[:, :, -1].to(exact)
    chosen = best_blocks(_block_scores(query, landmarks, own, cell, frame=frame), own, frame.top_k)
    numbers = torch.cat([chosen, own[:, :, None, None].expand(*chosen.shape[:3], 1)], dim=-1)  # [B, R, H, K + 1]
    share = query.shape[2] // keys.shape[3]
    row = torch.arange(query.shape[0], device=query.device)[:, None, None, None]
    head = (torch.arange(query.shape[2], device=query.device) // share)[:, None]
    read, seen = (x.transpose(2, 3)[row, numbers.clamp_min(0), head].to(exact).flatten(3, 4) for x in (keys, values))
    places = torch.arange(read.shape[3], device=query.device)
    query = frame.rotate(query, frame.top_k * frame.block_size + cell)
    # Cells of the frame take the place of positions, heads stay where they are: [B, R, H, (K + 1) C, 1, D].
    read = frame.rotate(read.unsqueeze(-2), places).squeeze(-2)
    scores = torch.einsum("brhd,brhcd->brhc", query, read)
    empty = F.pad(chosen < 0, (0, 1)).repeat_interleave(frame.block_size, dim=-1)
    empty = empty & (places % frame.block_size == frame.block_size - 1)
    scores = scores.masked_fill(empty, float("-inf"))
    at = (frame.top_k * frame.block_size + cell)[:, :, None, None]
    probs = landmark_grouped_softmax(scores[..., None, :], frame.block_size, positions=at)
    return torch.einsum("brhc,brhcd->brhd", probs[..., 0, :], seen)


def _block_scores(query: Tensor, landmarks: Tensor, own: Tensor, cell: Tensor, *, frame: Frame) -> Tensor:
    """Score the landmarks of all blocks ``[B, N, G, D]`` for ``[B, R, H, D]``: ``[B, R, H, N]``."""
    groups = (landmarks.shape[2], -1)
    # Rotating by the distance to the query leaves the landmark itself as it is.
    before = frame.rotate(query, (frame.top_k + 1) * frame.block_size + cell - (frame.block_size - 1))
    scores = torch.einsum("brgsd,bngd->brgsn", before.unflatten(2, groups), landmarks).flatten(2, 3)
    far = torch.arange(scores.shape[-1], device=own.device) < (own - frame.top_k)[:, :, None, None]
    best = scores.masked_fill(~far, float("-inf")).amax(-1, keepdim=True)
    scores = torch.where(far, best - ((best - scores) / TIE).round() * TIE, scores)
    for back in range(1, min(frame.top_k, landmarks.shape[1]) + 1):
        near = frame.rotate(query, back * frame.block_size + cell - (frame.block_size - 1))
        number = (own - back).clamp_min(0)
        row = torch.arange(number.shape[0], device=number.device)[:, None]
        exact = torch.einsum("brgsd,brgd->brgs", near.unflatten(2, groups), landmarks[row, number]).flatten(2, 3)
        place = number[:, :, None, None].expand(*exact.shape, 1)
        kept = torch.where((own >= back)[:, :, None, None], exact[..., None], scores.gather(-1, place))
        scores = scores.scatter(-1, place, kept)
    return scores


def best_blocks(scores: Tensor, own: Tensor, top_k: int) -> Tensor:
    """Return the best blocks before ``own`` [B, R] by ``[B, R, H, N]``, in ascending order.

    Returns:
        ``[B, R, H, K]`` int64; -1, in front, where there are fewer; ties go to the later block.
    """
    number = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(number >= own[:, :, None, None], float("-inf"))
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    chosen = torch.where(order.values > float("-inf"), len(number) - 1 - order.indices, -1)[..., :top_k]
    return F.pad(chosen, (0, top_k - chosen.shape[-1]), value=-1).sort(dim=-1).values
