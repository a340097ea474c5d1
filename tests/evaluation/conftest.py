"""Tiny models for the evaluation tests."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preprocess.tokenizers import byte_tokenizer

# The importlib mode of pytest does not put test folders on the path.
sys.path.insert(0, str(Path(__file__).parent))

from byte_llama import tiny_llama


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def stream():
    return np.random.default_rng(0).integers(61, size=150)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model():
    return tiny_llama()
