"""A tiny model that reads bytes."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(max_positions=4096):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_positions,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()
