"""Tiny random models of every supported family, float64, with peaked attention."""

import functools
import json
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = Path(__file__).parents[2] / "fixtures" / "parallel_context"
VOCABULARY = 61
WINDOW = 9
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_window": {"model_type": "qwen2", "use_sliding_window": True, **MIXED},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_window": {"model_type": "mistral", "sliding_window": WINDOW},
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, **GEMMA},
    "gemma3": {"model_type": "gemma3_text", **GEMMA},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "phi3": {"model_type": "phi3"},
}


@functools.cache
def _model(family, dtype, layers):
    options = dict(FAMILIES[family])
    sizes = SIZES | {"num_hidden_layers": layers}
    if "layer_types" in options:
        options["layer_types"] = (options["layer_types"] * layers)[:layers]
    config = AutoConfig.for_model(**(sizes | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
    return model.eval()


def tiny_model(family="llama", dtype=torch.float64, layers=3):
    """A model shared by all tests: leave it as found."""
    return _model(family, dtype, layers)


def fixture(name):
    return json.loads((FIXTURES / name).read_text())


def text(length, seed=0):
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pieces_of(lengths, seed=0):
    return [text(length, 100 * seed + number) for number, length in enumerate(lengths)]


class Largest(TorchDispatchMode):
    """Watches the sizes of all tensors that operations make, views left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor) and 0 not in x.stride():
                self.elements = max(self.elements, x.numel())
        return found
