"""The parts every model here is put together from: norm, MLP, window attention with ALiBi, decoder block.

Legend: B batch, T positions, H heads, G kv heads, D head size, M model width.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.sliding_window import sliding_window_attention
from models.checks import AttentionImplementation
from models.rms_norm import RMSNorm, product_input
from models.window_config import DecoderConfig


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one transformer block."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float

    @classmethod
    def of(cls, config: DecoderConfig) -> Self:
        """Take the sizes of a model's decoder blocks."""
        heads = config.num_attention_heads, config.num_kv_heads
        return cls(config.hidden_size, config.intermediate_size, *heads, config.rms_norm_eps)

    def bidirectional(self, norm_eps: float) -> Self:
        """Return the sizes of an encoder's blocks: every query head has a key/value head of its own."""
        return replace(self, num_kv_heads=self.num_heads, norm_eps=norm_eps)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


class EarlierKeys(Protocol):
    """Keys and values before those of a call: of earlier calls, or of a part of the sequence in another process."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put up to ``W - 1`` earlier positions of a layer in front of keys and values ``[B, T, G, D]``."""
        ...


@dataclass(frozen=True)
class Window:
    """What the self attention of all blocks of one forward call shares.

    Attributes:
        size: Keys a query sees, itself included.
        slopes: ALiBi slopes ``[H]`` float32.
        document_ids: Ids of the keys ``[B, Tk]``, -1 = padding; None if every key counts and there is one document.
        earlier: Keys and values before those of the call; None where it begins the sequence.
        implementation: Passed on to the kernel.
    """

    size: int
    slopes: Tensor
    document_ids: Tensor | None = None
    earlier: EarlierKeys | None = None
    implementation: AttentionImplementation = "auto"


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """Return slope_i = 2 ** (-8 (i + 1) / H), ``[H]`` float32, for any number of heads."""
    steps = torch.arange(1, num_heads + 1, device=device, dtype=torch.float32)
    return torch.exp2(steps * (-8.0 / num_heads))


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., M]`` to ``[..., M]``."""
        x = product_input(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AttentionProjections(nn.Module):
    """The weights of an attention: W_q, W_k, W_v and W_o; subclasses attend.

    Args:
        shape: Sizes.
        num_reads: Attention outputs side by side that W_o takes.
    """

    def __init__(self, shape: BlockShape, *, num_reads: int = 1) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        size, kv_size = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.o_proj = nn.Linear(num_reads * size, size, bias=False)

    def heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Project ``[B, P, M]`` to heads ``[B, P, H or G, D]``."""
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query ``[B, P, H, D]``, key and value ``[B, P, G, D]`` of ``[B, P, M]``."""
        x = product_input(x)
        return self.heads(self.q_proj, x), self.heads(self.k_proj, x), self.heads(self.v_proj, x)


class SelfAttention(AttentionProjections):
    """Causal attention over a window of keys with ALiBi and grouped key/value heads."""

    def __init__(self, shape: BlockShape, layer_index: int) -> None:
        super().__init__(shape)
        self.layer_index = layer_index

    def forward(self, x: Tensor, window: Window) -> Tensor:
        """Attend from ``[B, T, M]`` to itself and to the earlier keys of ``window``."""
        query, key, value = self.project(x)
        if window.earlier is not None:
            key, value = window.earlier.extend(self.layer_index, key, value)
        out = sliding_window_attention(
            query,
            key,
            value,
            window.size,
            alibi_slopes=window.slopes,
            document_ids=window.document_ids,
            implementation=window.implementation,
        )
        return self.o_proj(out.flatten(-2))


class DecoderBlock(GradientCheckpointingLayer):
    """x += SelfAttn(norm x); x += MLP(norm x)."""

    def __init__(self, shape: BlockShape, layer_index: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape, layer_index)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, window: Window) -> Tensor:
        """Map hidden states ``[B, T, M]`` to hidden states of the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), window)
        return x + self.mlp(self.post_attention_layernorm(x))
