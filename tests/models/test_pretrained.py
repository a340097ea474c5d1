"""Another rotary base reaches the frequencies, from a folder, for an instance, and after save and load."""

import logging
from importlib.util import find_spec

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

from models.pretrained import load_causal_lm, load_config, override_model_rope, override_rope

SIZES = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": lambda **kw: LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, **kw),
    "llama3": lambda **kw: LlamaConfig(**SIZES, intermediate_size=64, **({"rope_parameters": LLAMA3} | kw)),
    "gpt_neox": lambda **kw: GPTNeoXConfig(**SIZES, intermediate_size=64, **kw),
    "qwen2": lambda **kw: Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2, **kw),
    "phi3": lambda **kw: Phi3Config(
        **SIZES, intermediate_size=64, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **kw
    ),
}


def make(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model):
    ids = torch.arange(48).remainder(61).reshape(1, 48)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_override_equals_a_model_built_with_it(family, tmp_path):
    base = FAMILIES[family]()
    partial = base.rope_parameters.get("partial_rotary_factor")
    parameters = {"rope_type": "default", "rope_theta": 3e6} | (
        {"partial_rotary_factor": partial} if partial is not None else {}
    )
    want = logits(make(FAMILIES[family](rope_parameters=parameters, max_position_embeddings=4096)))
    model = make(base)
    assert (logits(model) - want).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "plain")
    override_model_rope(model, theta=3e6, context_length=4096)
    model.save_pretrained(tmp_path / "edited")
    from_folder = load_causal_lm(str(tmp_path / "plain"), rope_theta=3e6, context_length=4096).eval()
    again = load_causal_lm(str(tmp_path / "edited")).eval()
    for got in (model, from_folder, again):
        assert torch.equal(logits(got), want)
        assert got.config.max_position_embeddings == 4096
        assert got.config.rope_parameters["rope_theta"] == 3e6


def test_scaling_is_dropped_with_a_warning_or_kept(caplog):
    config = FAMILIES["llama3"]()
    with caplog.at_level(logging.WARNING):
        override_rope(config, theta=1e6, context_length=None)
    assert "llama3" in caplog.text
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    config = FAMILIES["llama3"]()
    override_rope(config, theta=1e6, context_length=None, keep_scaling=True)
    assert config.rope_parameters == LLAMA3 | {"rope_theta": 1e6}


def test_dtype_of_the_frequencies_stays_float32():
    model = make(FAMILIES["llama"]()).to(torch.bfloat16)
    override_model_rope(model, theta=1e6, context_length=None)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        (GPT2Config(), {"theta": 1e6}, "rotary positions"),
        (Gemma3TextConfig(), {"theta": 1e6}, "each kind of layer"),
        (LlamaConfig(), {"theta": 0.0}, "rope_theta must be above 0"),
        (LlamaConfig(), {"theta": None, "keep_scaling": True}, "keep_rope_scaling"),
        (LlamaConfig(), {"theta": None, "context_length": 0}, "context_length"),
    ],
)
def test_refusals(config, options, match):
    with pytest.raises(ValueError, match=match):
        override_rope(config, **({"context_length": None} | options))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_that_is_not_installed_is_named(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, intermediate_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attn_implementation=flash_attention_2 is not there .*: choose sdpa"):
        load_causal_lm(str(tmp_path), attn_implementation="flash_attention_2")


def test_a_model_that_is_nowhere_is_named(monkeypatch, tmp_path):
    def unreachable(name):
        raise OSError("no connection.\nLook there.")

    monkeypatch.setattr("models.pretrained.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match="no model some/model: neither a folder nor a name"):
        load_causal_lm("some/model")
    with pytest.raises(OSError, match="no connection"):  # the library knows more about a folder
        load_config(str(tmp_path))
