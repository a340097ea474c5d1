"""Differentiable exchanges between the processes of a sequence.

Notable: an exchange is one node of autograd in every process, also where nothing is sent or received, so that all
processes meet again in the backward pass.

Legend: B batch, N entries of a part along the sequence, E entries of all parts up to this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

# The name since torch 2.12.
gather_whole = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

if TYPE_CHECKING:
    from kernels.context_parallel import SequenceGroup


def shift(sent: Tensor, like: Tensor, group: SequenceGroup, step: int) -> Tensor | None:
    """Send entries to the part ``step`` (1 or -1) further; return what came the same way, None if no part lies there.

    Args:
        sent: ``[B, n, ...]``, contiguous.
        like: ``[B, m, ...]``, of the shape and type of what comes.
        group: The processes of the sequence.
        step: 1 towards its end, -1 towards its beginning.
    """
    target, source = group.rank + step, group.rank - step
    received = torch.empty_like(like) if 0 <= source < group.size else None
    transfers = []
    if 0 <= target < group.size:
        transfers.append(dist.P2POp(dist.isend, sent, group.ranks[target], group.process_group))
    if received is not None:
        transfers.append(dist.P2POp(dist.irecv, received, group.ranks[source], group.process_group))
        group.received_bytes += received.nbytes
    for transfer in dist.batch_isend_irecv(transfers):
        transfer.wait()
    return received


def before(x: Tensor, count: int, group: SequenceGroup) -> Tensor:
    """Return the last ``count`` of ``[B, N, ...]`` of the part before, ``[B, count, ...]``; the first part gets 0."""
    return _Before.apply(x, count, group)


def up_to_here(x: Tensor, counts: list[int], group: SequenceGroup) -> Tensor:
    """Return ``[B, N, ...]`` of all parts to this one, ``[B, E, ...]``; ``counts`` are the N of all parts."""
    return _UpToHere.apply(x, counts, group)


class _Before(torch.autograd.Function):
    """``y_r = x_{r-1}[:, -count:]``; backward ``dx_r[:, -count:] = dy_{r+1}``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, group: SequenceGroup) -> Tensor:
        if x.shape[1] < count and group.rank < group.size - 1:
            raise ValueError(
                f"a part of {x.shape[1]} entries is too short to hand {count} on: let fewer processes share it"
            )
        ctx.group, ctx.count, ctx.shape = group, count, x.shape
        sent = x[:, x.shape[1] - count :].contiguous() if group.rank < group.size - 1 else x
        received = shift(sent, x.new_empty(x.shape[0], count, *x.shape[2:]), group, 1)
        return x.new_empty(x.shape[0], 0, *x.shape[2:]) if received is None else received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        batch, _, *rest = ctx.shape
        received = shift(grad.contiguous(), grad.new_empty(batch, ctx.count, *rest), ctx.group, -1)
        total = grad.new_zeros(ctx.shape)
        if received is not None:
            total[:, total.shape[1] - ctx.count :] = received
        return total, None, None


class _UpToHere(torch.autograd.Function):
    """``y_r = cat(x_0 ... x_r)``; backward ``dx_r = sum over s >= r of dy_s`` at the entries of part r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: SequenceGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        rows = x.transpose(0, 1)
        mine = rows.contiguous()
        if len(mine) < counts[0]:  # collectives take equal parts
            mine = torch.cat([mine, mine.new_zeros(counts[0] - len(mine), *mine.shape[1:])])
        gathered = mine.new_empty(group.size * counts[0], *mine.shape[1:])
        gather_whole(gathered, mine, group=group.process_group)
        group.received_bytes += gathered.nbytes - mine.nbytes
        wanted = counts[: group.rank + 1]
        if wanted[:-1] == [counts[0]] * group.rank:
            return gathered[: sum(wanted)].transpose(0, 1)
        parts = gathered.split(counts[0])
        return torch.cat([part[:count] for part, count in zip(parts, wanted, strict=False)]).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        group, counts = ctx.group, ctx.counts
        rank = group.rank
        sent = grad.transpose(0, 1).contiguous()
        later = group.size - rank
        received = sent.new_empty(later * counts[rank], *sent.shape[1:])
        dist.all_to_all_single(
            received,
            sent,
            [0] * rank + [counts[rank]] * later,
            counts[: rank + 1] + [0] * (later - 1),
            group=group.process_group,
        )
        group.received_bytes += (later - 1) * counts[rank] * sent[:1].nbytes
        total = received.unflatten(0, (later, counts[rank])).sum(
            0, dtype=torch.promote_types(grad.dtype, torch.float32)
        )
        return total.to(grad.dtype).transpose(0, 1), None, None
