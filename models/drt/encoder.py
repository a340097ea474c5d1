"""The chunk encoder: bidirectional blocks with rotary positions over the positions of one chunk.

Legend: B batch (of chunks), C positions of a chunk, H heads, D head size, M model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from models.blocks import AttentionProjections, BlockShape, SwiGLU
from models.rms_norm import RMSNorm
from models.rotary import rotary_at, rotate


class EncoderAttention(AttentionProjections):
    """Full attention among the positions of a chunk, one key/value head per query head."""

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Attend within each of ``[B, C, M]``."""
        query, key, value = self.project(x)
        query, key = rotate(query, table), rotate(key, table)
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class EncoderBlock(GradientCheckpointingLayer):
    """x += Attn(norm x); x += MLP(norm x), over single chunks."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(shape)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Map ``[B, C, M]`` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), table)
        return x + self.mlp(self.post_attention_layernorm(x))


class ChunkEncoder(nn.Module):
    """Encoder blocks and a final norm."""

    def __init__(self, shape: BlockShape, num_layers: int, *, rope_theta: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderBlock(shape) for _ in range(num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head_dim = shape.head_dim
        self.rope_theta = rope_theta

    def forward(self, x: Tensor) -> Tensor:
        """Encode every chunk of ``[B, C, M]`` by itself."""
        table = rotary_at(torch.arange(x.shape[1], device=x.device), self.head_dim, theta=self.rope_theta)
        for layer in self.layers:
            x = layer(x, table)
        return self.norm(x)
