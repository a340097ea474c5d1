"""What the CPU implementations share: which chunks are in use, and the copies of chunks and rows head by head.

Notable: keys and values are laid out head by head once, in the accumulation type, so low precision inputs are upcast
exactly once. An empty slot points at one extra chunk of zeros, so that nothing branches on it and NaN in dead memory is
never read.

Legend: B batch, N query groups, R = B N, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size, E stored
chunks, C keys of a chunk, K retrieved chunks, U chunks in use, h heads of a block, n query groups of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gca.arguments import Arguments


@dataclass(frozen=True)
class Plan:
    """What forward and backward share: which chunks are in use, and which of them each slot reads."""

    used: tuple[Tensor, Tensor] | None
    """``([U], [U])`` batch row and chunk number of each chunk in use; None: all, U = B E."""
    slots: Tensor
    """``[R, K]`` number among those in use; U (the chunk of zeros) for an empty slot."""
    weights: Tensor
    """``[R, K]`` in the accumulation type, 0 at empty slots."""
    num_used: int
    lengths: Tensor | None
    """``[U + 1]`` valid keys, or None if all are."""
    dtype: torch.dtype


def make_plan(arguments: Arguments) -> Plan:
    """Number the chunks in use: all of them, or, if few are chosen (decoding), those alone."""
    q, k, _, indices, weights, kv_lengths = arguments.tensors()
    num_chunks, chunk_size = k.shape[1:3]
    acc = torch.promote_types(q.dtype, torch.float32)
    empty = indices < 0
    slots = indices.long().clamp(min=0)
    slots = slots + torch.arange(k.shape[0], device=q.device)[:, None, None] * num_chunks
    lengths = None if kv_lengths is None else kv_lengths.flatten().long()
    if lengths is not None:
        empty = empty | (lengths[slots] == 0)
    used, num_used = None, k.shape[0] * num_chunks
    if slots.numel() < num_used // 2:
        chosen, slots = torch.unique(slots, return_inverse=True)
        used, num_used = (chosen // num_chunks, chosen % num_chunks), chosen.numel()
        lengths = None if lengths is None else lengths[chosen]
    if lengths is not None:
        lengths = torch.nn.functional.pad(lengths, (0, 1), value=chunk_size)
    slots = slots.masked_fill(empty, num_used).flatten(0, 1)
    return Plan(used, slots, weights.to(acc).masked_fill(empty, 0.0).flatten(0, 1), num_used, lengths, acc)


def copy_chunks(x: Tensor, plan: Plan, heads: slice, target: Tensor | None = None) -> Tensor:
    """Copy the chunks in use, ``[B, E, C, Hk, D]`` to ``[h, U + 1, C, D]``; dead keys and the last chunk are 0.

    The copy has the accumulation type, or the dtype of a ``target``, which is filled in place and whose rows may be
    longer than D.
    """
    heads_of_x = x[:, :, :, heads]
    chosen = heads_of_x if plan.used is None else heads_of_x[plan.used][None]  # [B, E, C, h, D] or [1, U, C, h, D]
    if target is None:
        shape = (chosen.shape[3], plan.num_used + 1, x.shape[2], x.shape[4])
        target = torch.empty(shape, dtype=plan.dtype, device=x.device)
    chunks = target[..., : x.shape[4]]
    chunks[:, -1] = 0.0
    chunks[:, :-1].unflatten(1, chosen.shape[:2]).copy_(chosen.permute(3, 0, 1, 2, 4))
    if plan.lengths is not None:
        dead = torch.arange(x.shape[2], device=x.device) >= plan.lengths[:, None]
        chunks.masked_fill_(dead[..., None], 0.0)
    return target


def write_chunks(x: Tensor, chunks: Tensor, plan: Plan, heads: slice) -> None:
    """Undo `copy_chunks`: ``[h, U + 1, C, D]`` (rows may be longer) into ``x`` ``[B, E, C, Hk, D]``, in its dtype."""
    part = x[:, :, :, heads]
    source = chunks[:, :-1, :, : x.shape[4]].permute(1, 2, 0, 3)  # [U, C, h, D]
    if plan.used is None:
        part.copy_(source.unflatten(0, x.shape[:2]))
    else:
        part[plan.used] = source.to(x.dtype)


def view_rows(x: Tensor, tile: slice, heads: slice, num_kv_heads: int) -> Tensor:
    """View the rows of a tile head by head: ``[B, N, S, H, D]`` as ``[h, n, S, G, D]``, any dtype."""
    return x.flatten(0, 1)[tile].unflatten(2, (num_kv_heads, -1))[:, :, heads].permute(2, 0, 1, 3, 4)
