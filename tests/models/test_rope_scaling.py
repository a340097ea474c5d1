"""NTK, dynamic NTK and YaRN on a finished model: the frequencies of their papers, no memory of earlier prompts."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from models.rope_scaling import check_rope, scale_model_rope, scale_rope

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def make(family="llama"):
    torch.manual_seed(0)
    plain = {"rope_type": "default", "rope_theta": 100.0}
    if family == "gpt_neox":
        config = GPTNeoXConfig(**SIZES, rope_parameters=plain | {"partial_rotary_factor": 0.5})
    else:
        kind = Qwen2Config if family == "qwen2" else LlamaConfig
        config = kind(**SIZES, num_key_value_heads=2, rope_parameters=plain)
    return AutoModelForCausalLM.from_config(config).eval()


def rotary(model):
    return next(module for module in model.modules() if hasattr(module, "inv_freq"))


def logits(model, length):
    with torch.no_grad():
        return model(torch.arange(length).remainder(61)[None]).logits[0]


def frequencies(base, size):
    return [base ** (-2 * i / size) for i in range(size // 2)]


def yarn_frequencies(base, size, factor, trained):
    """Dimension by dimension: turns within the trained length, kept above 32, divided below 1, a ramp between."""

    def place(turns):
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), size - 1)
    found = []
    for i, frequency in enumerate(frequencies(base, size)):
        ramp = min(max((i - low) / max(high - low, 1e-3), 0), 1)
        found.append(frequency / factor * ramp + frequency * (1 - ramp))
    return found


@pytest.mark.parametrize(("family", "size"), [("llama", 12), ("gpt_neox", 6)])
def test_frequencies_are_those_of_the_formulas(family, size):
    ntk, yarn, dynamic = make(family), make(family), make(family)
    scale_model_rope(ntk, {"rope_type": "ntk", "factor": 3})
    scale_model_rope(yarn, {"rope_type": "yarn", "factor": 3.0})
    scale_model_rope(dynamic, {"rope_type": "dynamic", "factor": 3.0})
    assert rotary(ntk).inv_freq.tolist() == pytest.approx(frequencies(100 * 3 ** (size / (size - 2)), size), rel=1e-5)
    assert rotary(yarn).inv_freq.tolist() == pytest.approx(yarn_frequencies(100, size, 3, 32), rel=1e-5)
    assert rotary(yarn).attention_scaling == pytest.approx(0.1 * math.log(3) + 1)
    logits(dynamic, 53)
    grown = 100 * (3 * 53 / 32 - 2) ** (size / (size - 2))
    assert rotary(dynamic).inv_freq.tolist() == pytest.approx(frequencies(grown, size), rel=1e-5)
    assert [model.config.max_position_embeddings for model in (ntk, yarn, dynamic)] == [96, 96, 32]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # positions by name, and by place
def test_dynamic_forgets_the_prompts_before(family):
    model = make(family)
    scale_model_rope(model, {"rope_type": "dynamic", "factor": 4.0})
    first = logits(model, 45)
    assert torch.equal(logits(model, 20), logits(make(family), 20))  # plain within the trained length
    logits(model, 77)
    assert torch.equal(logits(model, 45), first)
    assert (first - logits(make(family), 45)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ntk", "yarn", "dynamic"])
def test_a_batch_of_one_length_is_its_rows(kind):
    model = make()
    scale_model_rope(model, {"rope_type": kind, "factor": 2.0})
    ids = torch.arange(2 * 41).remainder(61).reshape(2, 41)
    with torch.no_grad():
        both = model(ids).logits
        for row in range(2):
            assert (model(ids[row : row + 1]).logits[0] - both[row]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        ({"rope_type": "self_extend", "factor": 2.0}, "one of ntk, dynamic, yarn, got 'self_extend'"),
        ({"factor": 2.0}, "got None"),
        ({"rope_type": "yarn"}, "factor must be a number above 1, got None"),
        ({"rope_type": "ntk", "factor": 1}, "above 1, got 1"),
        ({"rope_type": "ntk", "factor": 2, "beta_fast": 3}, "no option beta_fast with rope_type=ntk"),
    ],
)
def test_settings_that_cannot_be(rope, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_rope(rope)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (GPT2Config(), "model.rope needs a model with rotary positions"),
        (Gemma3TextConfig(), "each kind of layer"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0}), "scaled already"),
    ],
)
def test_models_that_cannot_be_scaled(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        scale_rope(config, {"rope_type": "yarn", "factor": 2.0})
