"""Tiny random causal language models of many families, with weights large enough for every part to matter."""

import torch
import transformers
from torch import Tensor, nn

import models

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": None,
}
GPT2_SIZES = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}
SUITE_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
    "window_size": 9,
    "pad_token_id": 61,
    "bos_token_id": 62,
    "eos_token_id": 62,
}
DRT_SIZES = {
    "num_lower_layers": 1,
    "layers_per_group": [1],
    "num_encoder_layers": 1,
    "chunk_size": 4,
    "chunk_top_k": 2,
    "landmark_token_id": 63,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 12,
}
DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}

# Name: configuration class, its options, attention implementation.
FAMILIES = {
    "llama_sdpa": ("LlamaConfig", SIZES, "sdpa"),
    "llama_eager": ("LlamaConfig", SIZES, "eager"),
    "llama_tied": ("LlamaConfig", SIZES | {"tie_word_embeddings": True}, "sdpa"),
    "llama3_rotary": ("LlamaConfig", SIZES | {"rope_parameters": LLAMA3}, "sdpa"),
    "dynamic_rotary": ("LlamaConfig", SIZES | {"rope_parameters": DYNAMIC, "max_position_embeddings": 10}, "sdpa"),
    "gemma2": ("Gemma2Config", SIZES | {"head_dim": 8, "final_logit_softcapping": 3.0}, "eager"),
    "gpt2_dropout": ("GPT2Config", GPT2_SIZES | DROPOUT, "sdpa"),
    "granite": ("GraniteConfig", SIZES | {"logits_scaling": 6.0}, "sdpa"),
    "cohere": ("CohereConfig", SIZES | {"logit_scale": 0.3}, "sdpa"),
    "gpt_neox": ("GPTNeoXConfig", SIZES, "sdpa"),
    "qwen2": ("Qwen2Config", SIZES, "sdpa"),
    "mistral_window": ("MistralConfig", SIZES | {"sliding_window": 6}, "sdpa"),
    "phi3_longrope": ("Phi3Config", SIZES | {"rope_parameters": LONGROPE}, "sdpa"),
    "phi_bias": ("PhiConfig", SIZES, "sdpa"),
    "drt": ("DRTConfig", SUITE_SIZES | DRT_SIZES, None),
    "sliding_window_lm": ("SlidingWindowLMConfig", SUITE_SIZES | {"num_hidden_layers": 2}, None),
}


def build(name: str, **changes) -> nn.Module:
    """Return the model of a family in evaluation mode, the same at every call."""
    config_name, options, attention = FAMILIES[name]
    config_class = getattr(transformers, config_name, None) or getattr(models, config_name)
    torch.manual_seed(0)
    extra = {} if attention is None else {"attn_implementation": attention}
    model = transformers.AutoModelForCausalLM.from_config(config_class(**(options | changes)), **extra)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def token_ids(batch_size: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def dense_nll(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the losses ``[B, T]`` of the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits.double()
    return -logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
