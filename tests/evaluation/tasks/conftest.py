"""A byte tokenizer and tiny models that read bytes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preprocess.tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


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


@pytest.fixture(scope="session")
def model():
    return tiny_llama()
