"""The landmark-attention baseline: every token sees all earlier ones through the landmarks of their blocks.

Mohtashami and Jaggi, Landmark Attention: Random-Access Infinite Context Length for Transformers (2023).

Legend: B batch, T text tokens, P positions (text and landmarks), H heads, G kv heads, D head size, M model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.landmark import landmark_attention
from models.blocks import AttentionProjections, BlockShape, SwiGLU
from models.drt.layout import GridLayout
from models.flops import FORWARD_AND_BACKWARD, attention_flops, block_flops, mean_window_keys
from models.landmark.cache import LandmarkCache
from models.landmark.configuration_landmark import LandmarkConfig
from models.landmark.retrieval import Frame, top_k_attention
from models.rms_norm import RMSNorm
from models.rotary import rotary_at, rotate
from models.row_lm import RowCall, RowLanguageModel


@dataclass(frozen=True)
class Reading:
    """What the self attention of all blocks of one forward call shares.

    Attributes:
        block_size: Positions of a block, landmark included.
        rope_theta: Base of the rotary positions.
        top_k: Earlier blocks a head reads with a cache; None = all.
        cache: Keys and values of earlier calls, extended in place.
        positions: Place of each position in its row ``[B, P]``; None = the rows begin here.
    """

    block_size: int
    rope_theta: float
    top_k: int | None
    cache: LandmarkCache | None = None
    positions: Tensor | None = None


class LandmarkAttention(AttentionProjections):
    """Landmark attention over all earlier positions, or over the best blocks of a cache."""

    def __init__(self, shape: BlockShape, layer_index: int) -> None:
        super().__init__(shape)
        self.layer_index = layer_index

    def forward(self, x: Tensor, reading: Reading) -> Tensor:
        """Attend from ``[B, P, M]`` to itself and to what the cache holds."""
        query, key, value = self.project(x)
        if reading.cache is not None and reading.positions is not None:
            key, value = reading.cache.extend(self.layer_index, key, value)
            if reading.top_k is not None:
                frame = Frame(reading.block_size, reading.top_k, reading.rope_theta)
                return self.o_proj(top_k_attention(query, key, value, reading.positions, frame).flatten(-2))
        everywhere = torch.arange(key.shape[1], device=x.device)
        places = everywhere if reading.positions is None else reading.positions
        query, key = (
            rotate(tensor, rotary_at(where, self.head_dim, theta=reading.rope_theta))
            for tensor, where in ((query, places), (key, everywhere))
        )
        out = landmark_attention(query, key, value, reading.block_size, positions=reading.positions)
        return self.o_proj(out.flatten(-2))


class LandmarkBlock(GradientCheckpointingLayer):
    """x += LandmarkAttn(norm x); x += MLP(norm x)."""

    def __init__(self, shape: BlockShape, layer_index: int) -> None:
        super().__init__()
        self.self_attn = LandmarkAttention(shape, layer_index)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, reading: Reading) -> Tensor:
        """Map hidden states ``[B, P, M]`` to hidden states of the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), reading)
        return x + self.mlp(self.post_attention_layernorm(x))


class LandmarkModel(nn.Module):
    """Embedding, landmarks after every block, blocks, final norm."""

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__()
        self.config = config
        shape = BlockShape.of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(LandmarkBlock(shape, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, call: RowCall) -> Tensor:
        """Return normed hidden states of the text ``[B, T, M]``."""
        config, cache = self.config, call.cache
        options = (config.chunk_size + 1, config.rope_theta, config.chunk_top_k)
        if cache is None:
            layout, reading = GridLayout(input_ids.shape[1], config.chunk_size), Reading(*options)
        else:
            layout, positions = cache.begin(input_ids, call)
            reading = Reading(*options, cache, positions)
        text = self.embed_tokens(input_ids)
        landmark = self.embed_tokens(torch.full((1,), config.landmark_token_id, device=input_ids.device))[0]
        x = layout.insert(text, landmark)
        call.record(layout.text(x))
        for layer in self.layers:
            x = layer(x, reading)
            call.record(layout.text(x))
        return self.norm(layout.text(x))


class LandmarkForCausalLM(RowLanguageModel):
    """Landmark-attention language model with a head tied to the embedding.

    Without a cache (training, scoring) every head sees all blocks. With one it reads ``config.chunk_top_k`` of them,
    the inference of the paper, which keeps to trained distances at any length.
    """

    config_class = LandmarkConfig
    cache_class = LandmarkCache
    _no_split_modules = ["LandmarkBlock"]  # noqa: RUF012

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__(config)
        self.model = LandmarkModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def num_flops_per_token(self, context_length: int) -> float:
        """Return matrix-product FLOPs of forward and backward per text token of a sequence of ``context_length``.

        3 x forward; forward = (C / S) x layers x (projections and MLP + 4 M x mean earlier positions) + 2 M V.
        """
        config = self.config
        per_text = (config.chunk_size + 1) / config.chunk_size
        length = context_length * per_text
        kv_share = config.num_kv_heads / config.num_attention_heads
        keys = mean_window_keys(length, int(length) + 1)
        block = block_flops(config.hidden_size, config.intermediate_size, kv_share)
        layers = config.num_hidden_layers * (block + attention_flops(config.hidden_size, keys))
        return FORWARD_AND_BACKWARD * (per_text * layers + 2 * config.hidden_size * config.vocab_size)
