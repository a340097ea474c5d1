"""Chunk memory, its retrieval, and the blocks that read what was retrieved.

Legend: B batch, P positions, R complete chunks of the call, E chunks of the memory, S text tokens of a chunk, G query
groups, K retrieved chunks, H heads, Hk chunk key/value heads, D head size, M model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.gca import grouped_cross_attention
from models.blocks import BlockShape, SelfAttention, SwiGLU, Window
from models.checks import GCAImplementation
from models.drt.layout import Layout
from models.rms_norm import RMSNorm


class ChunkMemory(NamedTuple):
    """What a sequence remembers of its chunks."""

    landmarks: Tensor
    """``[B, E, M]``."""
    keys: Tensor
    """``[B, E, S, Hk, D]``."""
    values: Tensor
    """``[B, E, S, Hk, D]``."""


class Retrieved(NamedTuple):
    """What the query groups of a call read."""

    keys: Tensor
    """Chunk keys ``[B, E, S, Hk, D]``."""
    values: Tensor
    """Chunk values ``[B, E, S, Hk, D]``."""
    weights: Tensor
    """Fusion weights ``[B, G, K]`` float32."""
    indices: Tensor
    """Numbers of the chunks ``[B, G, K]`` int32, -1 = empty."""
    reverse: Tensor | None = None
    """The indices sorted by chunk, once for all layers that share them; None: each backward sorts them itself."""


def of_real_chunks(indices: Tensor, weights: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Put -1 and 0 where rows of the batch have fewer chunks than others.

    Args:
        indices: int32 ``[B, R, K]``.
        weights: float32 ``[B, R, K]``.
        counts: Chunks of each row, at most R.

    Returns:
        Both, ``[B, max(counts), K]``.
    """
    longest = max(counts)
    number = torch.arange(longest, device=indices.device)[:, None]
    absent = number >= torch.tensor(counts, device=indices.device)[:, None, None]
    return indices[:, :longest].masked_fill(absent, -1), weights[:, :longest].masked_fill(absent, 0.0)


class GroupedCrossAttention(nn.Module):
    """W_o GCA(W_q norm x): every position reads the chunks retrieved for its query group."""

    def __init__(self, shape: BlockShape, *, softmax_off_by_one: bool, implementation: GCAImplementation) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.head_dim = shape.head_dim
        self.softmax_off_by_one = softmax_off_by_one
        self.implementation = implementation

    def forward(self, x: Tensor, found: Retrieved, layout: Layout) -> Tensor:
        """Map ``[B, P, M]`` to the same shape."""
        query = layout.split(self.q_proj(self.pre_norm(x)).unflatten(-1, (-1, self.head_dim)))
        out = grouped_cross_attention(
            query,
            found.keys,
            found.values,
            found.indices,
            found.weights,
            softmax_off_by_one=self.softmax_off_by_one,
            implementation=self.implementation,
            reverse=found.reverse,
        )
        return self.o_proj(layout.join(out).flatten(-2))


class RetrievalBlock(GradientCheckpointingLayer):
    """r = x + SelfAttn(norm x); y = r + MLP(norm(r + GCA(r))): what is retrieved enters the MLP, not the residual."""

    def __init__(
        self, shape: BlockShape, layer_index: int, *, softmax_off_by_one: bool, implementation: GCAImplementation
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape, layer_index)
        self.gca = GroupedCrossAttention(shape, softmax_off_by_one=softmax_off_by_one, implementation=implementation)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, *found: Tensor | None, window: Window, layout: Layout) -> Tensor:
        """Map ``[B, P, M]`` to the same shape.

        Args:
            x: Hidden states.
            *found: The tensors of a ``Retrieved``, or nothing. Positional, because reentrant checkpointing follows
                gradients through positional tensors only.
            window: Window attention of this call.
            layout: Places of the query groups.
        """
        x = x + self.self_attn(self.input_layernorm(x), window)
        read = x + self.gca(x, Retrieved(*found), layout) if found else x
        return x + self.mlp(self.post_attention_layernorm(read))
