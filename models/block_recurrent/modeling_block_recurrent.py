"""The block-recurrent transformer: Hutchins et al., Block-Recurrent Transformers (2022).

Every way to compute it is one walk over blocks: a forward over T tokens takes T / W steps of all layers, and a cache
continues the walk anywhere in a block. A block's tokens read the state as it was before the block.

Legend: B batch, T tokens, U tokens of a step, W block width, M model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from models.block_recurrent.attention import RecurrentAttention, Step, WindowAttention
from models.block_recurrent.cache import BlockRecurrentCache, LayerMemory
from models.block_recurrent.configuration_block_recurrent import BlockRecurrentConfig
from models.block_recurrent.steps import rejoined, stretches
from models.blocks import BlockShape, SwiGLU
from models.flops import FORWARD_AND_BACKWARD, attention_flops, block_flops, mean_window_keys
from models.rms_norm import RMSNorm, product_input
from models.row_lm import RowCall, RowLanguageModel


class GEGLU(SwiGLU):
    """W_down (gelu(W_gate x) * W_up x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., M]`` to ``[..., M]``."""
        x = product_input(x)
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class BlockRecurrentLayer(GradientCheckpointingLayer):
    """x += Attn(norm x); x += MLP(norm x), with a state beside it in recurrent layers."""

    def __init__(self, config: BlockRecurrentConfig, shape: BlockShape, *, recurrent: bool) -> None:
        super().__init__()
        options = {"block_width": config.block_width, "xpos_base": config.xpos_scale_base}
        self.self_attn: WindowAttention = (
            RecurrentAttention(shape, num_states=config.num_states, **options)
            if recurrent
            else WindowAttention(shape, **options)
        )
        self.mlp = GEGLU(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(
        self, x: Tensor, keys: Tensor | None, values: Tensor | None, state: Tensor | None, *, step: Step
    ) -> tuple[Tensor | None, ...]:
        """Return hidden states ``[B, U, M]`` and the memory (keys, values, state) for the next step."""
        memory = None if keys is None or values is None else (keys, values)
        normed = self.input_layernorm(x)
        if isinstance(self.self_attn, RecurrentAttention):
            state = self.self_attn.begin(x.shape[0]) if state is None else state
            out, *kept = self.self_attn(normed, memory, step, state)
        else:
            out, *kept = self.self_attn(normed, memory, step)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), *kept


class BlockRecurrentModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        self.config = config
        shape = BlockShape.of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(
            BlockRecurrentLayer(config, shape, recurrent=number in config.recurrent_layers)
            for number in range(1, config.num_hidden_layers + 1)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, call: RowCall) -> Tensor:
        """Return normed hidden states ``[B, T, M]``."""
        embedded, cache = self.embed_tokens(input_ids), call.cache
        memory = [LayerMemory() for _ in self.layers]
        if cache is not None and cache.memory:
            memory = list(cache.memory)
        begun = torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        walked = list(stretches(call.past, call.new, self.config.block_width))
        outputs: list[list[Tensor]] = [[] for _ in range(len(self.layers) + 1)]
        for stretch in walked:
            block = stretch.begins_block
            if self.training and cache is None and block and block % self.config.segment_blocks == 0:
                memory, begun = self.begin_segment(memory, begun, stretch.places[0])
            step = stretch.step(begun, input_ids.device)
            x = stretch.cut(embedded)
            outputs[0].append(x)
            for index, layer in enumerate(self.layers):
                x, *kept = layer(x, *memory[index], step=step)
                memory[index] = LayerMemory(*kept)
                outputs[index + 1].append(x)
        if cache is not None:
            cache.memory = [layer.detached() for layer in memory]
        if not walked:  # rows of nothing but padding
            outputs = [[embedded]] * len(outputs)
        if call.hidden_states is not None:
            call.hidden_states.extend(rejoined(parts, walked, input_ids.shape[1]) for parts in outputs)
        return self.norm(rejoined(outputs[-1], walked, input_ids.shape[1]))

    def begin_segment(self, memory: list[LayerMemory], begun: Tensor, place: int) -> tuple[list[LayerMemory], Tensor]:
        """Cut the history of gradients; let some rows begin anew at token ``place``."""
        anew = torch.rand(begun.shape, device=begun.device) < self.config.memory_dropout
        cut = []
        for layer, held in zip(self.layers, memory, strict=True):
            keys, values, state = held.detached()
            if state is not None:
                state = torch.where(anew[:, None, None], layer.self_attn.begin(len(anew)).to(state.dtype), state)
            cut.append(LayerMemory(keys, values, state))
        return cut, torch.where(anew, place, begun)


class BlockRecurrentForCausalLM(RowLanguageModel):
    """Block-recurrent transformer with a head tied to the embedding."""

    config_class = BlockRecurrentConfig
    cache_class = BlockRecurrentCache
    _no_split_modules = ["BlockRecurrentLayer"]  # noqa: RUF012

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__(config)
        self.model = BlockRecurrentModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def num_flops_per_token(self, context_length: int) -> float:
        """Return matrix-product FLOPs of forward and backward per token of a sequence of ``context_length``.

        3 x forward; forward = layers x (projections and MLP + 4 M x mean keys in the window) + 2 M V + for each
        recurrent layer 2 x 2 M^2 (queries to the state, wider output) + 4 M Z, and per block of W tokens
        Z x (2 (4 M^2 + 2 M^2 G / H) + 4 M (Z + W)) for the state.
        """
        config, size = self.config, self.config.hidden_size
        kv_share = config.num_kv_heads / config.num_attention_heads
        keys = mean_window_keys(context_length, config.block_width + 1)
        plain = block_flops(size, config.intermediate_size, kv_share) + attention_flops(size, keys)
        states = config.num_states
        of_state = 2 * size**2 * (4 + 2 * kv_share) + attention_flops(size, states + config.block_width)
        recurrent = 4 * size**2 + attention_flops(size, states) + of_state * states / config.block_width
        layers = config.num_hidden_layers * plain + len(config.recurrent_layers) * recurrent
        return FORWARD_AND_BACKWARD * (layers + 2 * size * config.vocab_size)
