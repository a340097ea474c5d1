"""Chunked cross attention: one softmax over the tokens of all neighbours of a chunk.

The neighbours of chunk c are known when its last token is; that token and the first S - 1 of the next chunk read them.
These S rows are query group c.

Legend: B batch, T tokens, S tokens of a chunk, Q query groups of a call, K neighbours, H heads, G kv heads, D head
size, M model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from models.blocks import BlockShape, SelfAttention, SwiGLU, Window
from models.grouped_attention import grouped_attention
from models.rms_norm import RMSNorm, product_input
from models.rows import take


class QueryGroups:
    """Where the query groups of a call lie: row b continues ``past[b]`` tokens with up to ``length`` new ones."""

    def __init__(self, past: list[int], length: int, *, chunk_size: int, device: torch.device) -> None:
        starts = [(count + 1) % chunk_size for count in past]
        self.num_groups = (max(starts) + length - 1) // chunk_size + 1
        # A group alone needs no grid: its rows are the tokens themselves.
        self.width = chunk_size if self.num_groups > 1 else length
        start = torch.tensor(starts, device=device)[:, None] * (self.num_groups > 1)
        cell = torch.arange(self.num_groups * self.width, device=device)
        self._split = (cell - start).clamp(0, length - 1)
        self._join = start + torch.arange(length, device=device)
        first = torch.tensor([(count + 1) // chunk_size - 1 for count in past], device=device)[:, None]
        self.chunks = first + torch.arange(self.num_groups, device=device)
        """The chunk whose neighbours each group reads ``[B, Q]``; -1 = none."""

    def split(self, x: Tensor) -> Tensor:
        """Arrange tokens ``[B, T, ...]`` by group ``[B, Q, rows, ...]``."""
        return take(x, self._split).unflatten(1, (self.num_groups, self.width))

    def join(self, x: Tensor) -> Tensor:
        """Turn ``[B, Q, rows, ...]`` back to ``[B, T, ...]``."""
        return take(x.flatten(1, 2), self._join)


@dataclass(frozen=True)
class Neighbours:
    """What the query groups of a call read, gathered once for all layers.

    Attributes:
        keys: ``[B, Q, K S, G, D]``.
        values: ``[B, Q, K S, G, D]``.
        real: Which of these tokens belong to a neighbour ``[B, Q, K S]`` bool.
    """

    keys: Tensor
    values: Tensor
    real: Tensor

    @classmethod
    def gather(cls, keys: Tensor, values: Tensor, indices: Tensor) -> "Neighbours":
        """Gather chunks ``[B, E, S, G, D]`` by ``[B, Q, K]`` (-1 = none)."""
        size = keys.shape[2]
        place = indices.long().clamp_min(0)
        found, read = (take(x, place).flatten(2, 3) for x in (keys, values))
        return cls(found, read, (indices >= 0).repeat_interleave(size, dim=2))


def chunked_cross_attention(query: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """Attend with one softmax over all neighbours' tokens; rows without neighbours are 0.

    Args:
        query: ``[B, Q, rows, H, D]``.
        keys: ``[B, Q, K S, G, D]``.
        values: ``[B, Q, K S, G, D]``.
        real: ``[B, Q, K S]`` bool.

    Returns:
        ``[B, Q, rows, H, D]``.
    """
    some = real.any(-1, keepdim=True)
    allowed = (real | ~some).flatten(0, 1)[:, None]
    out = grouped_attention(query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), allowed)
    return out.unflatten(0, query.shape[:2]) * some[..., None, None]


class ChunkedCrossAttention(nn.Module):
    """W_o CCA(W_q norm x)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.head_dim = shape.head_dim

    def forward(self, x: Tensor, found: Neighbours, groups: QueryGroups) -> Tensor:
        """Map ``[B, T, M]`` to the same shape."""
        query = self.q_proj(product_input(self.pre_norm(x))).unflatten(-1, (-1, self.head_dim))
        out = chunked_cross_attention(groups.split(query), found.keys, found.values, found.real)
        return self.o_proj(groups.join(out).flatten(-2))


class ReadingBlock(GradientCheckpointingLayer):
    """x += SelfAttn(norm x); x += CCA(norm x); x += MLP(norm x)."""

    def __init__(self, shape: BlockShape, layer_index: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape, layer_index)
        self.cross_attn = ChunkedCrossAttention(shape)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, *found: Tensor, window: Window, groups: QueryGroups) -> Tensor:
        """Map ``[B, T, M]`` to the same shape.

        Args:
            x: Hidden states.
            *found: The tensors of ``Neighbours``, or nothing. Positional, because reentrant checkpointing follows
                gradients through positional tensors only.
            window: Window attention of this call.
            groups: Places of the query groups.
        """
        x = x + self.self_attn(self.input_layernorm(x), window)
        if found:
            x = x + self.cross_attn(x, Neighbours(*found), groups)
        return x + self.mlp(self.post_attention_layernorm(x))
