"""The chunk encoder: bidirectional blocks with rotary positions over the positions of one chunk.

Legend: B batch (of chunks), C positions of a chunk, H heads, D head size, M model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from models.blocks import BlockShape, SwiGLU
from models.rms_norm import RMSNorm, product_input


def rotary_table(length: int, head_dim: int, *, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta ** (-2 i / D), both ``[C, 1, D / 2]`` float32."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None, None] * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of ``[B, C, H, D]`` by the angles of ``table``."""
    cos, sin = table
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class EncoderAttention(nn.Module):
    """Full attention among the positions of a chunk, one key/value head per query head."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Attend within each of ``[B, C, M]``."""
        x = product_input(x)
        query = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), table)
        key = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), table)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
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
        table = rotary_table(x.shape[1], self.head_dim, theta=self.rope_theta, device=x.device)
        for layer in self.layers:
            x = layer(x, table)
        return self.norm(x)
