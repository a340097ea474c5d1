"""Configurations: derived fields, every error at construction, translation of published ones."""

import inspect
import logging

import pytest
from model_cases import drt_config, window_config

from models.drt import DRTConfig
from models.sliding_window_lm import SlidingWindowLMConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"chunk_num_key_value_heads": 3}, "chunk_num_key_value_heads must divide"),
        ({"landmark_token_id": 64}, "landmark_token_id must lie in"),
        ({"pad_token_id": -1}, "pad_token_id must lie in"),
        ({"landmark_token_id": 61}, "landmark_token_id must be a token of its own"),
        ({"landmark_token_id": 60, "eos_token_id": 60}, "landmark_token_id must be a token of its own"),
        ({"landmark_token_id": 60, "bos_token_id": 60}, "landmark_token_id must be a token of its own"),
        ({"eos_token_id": 400}, "eos_token_id must lie in"),
        ({"window_size": 0}, "window_size must be an integer of at least 1"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"chunk_top_k": 0}, "chunk_top_k must be"),
        ({"layers_per_group": []}, "layers_per_group must name at least one group"),
        ({"layers_per_group": [2, 0]}, r"layers_per_group\[1\] must be"),
        ({"hidden_size": 12}, "even"),
        ({"retrieval_noise": "normal"}, "retrieval_noise must be one of"),
        ({"gca_implementation": "fast"}, "gca_implementation must be one of"),
        ({"attention_implementation": "fast"}, "attention_implementation must be one of"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ({"num_hidden_layers": 7}, "num_hidden_layers follows"),
    ],
)
def test_drt_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        drt_config(**changes)


@pytest.mark.parametrize("changes", [{"window_size": 0}, {"num_hidden_layers": 0}, {"bos_token_id": 64}])
def test_window_config_errors(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        window_config(**changes)


def test_defaults_and_derived_fields():
    config = DRTConfig()
    assert (config.num_key_value_heads, config.chunk_num_key_value_heads, config.num_hidden_layers) == (12, 12, 12)
    assert config.layers_per_group == [6]
    grouped = DRTConfig(num_key_value_heads=4, layers_per_group=(3, 3))
    assert (grouped.chunk_num_key_value_heads, grouped.layers_per_group) == (4, [3, 3])
    for config_class in (DRTConfig, SlidingWindowLMConfig):
        parameters = inspect.signature(config_class).parameters
        fields = [parameter for parameter in parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
        assert all(field.annotation is not inspect.Parameter.empty for field in fields)


REFERENCE = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": [2, 3, 1],
    "enc_chunk_size": 64,
    "chunk_topk": 5,
    "slide_window": 100,
    "chunk_id": 199,
    "pad_id": 198,
    "bos_id": 197,
    "enable_softmax_one": True,
    "enable_alibi": True,
    "rope_theta": 1.0,
    "mask_id": 3,
    "num_hidden_layers": -1,
}


def test_published_drt_config():
    config = DRTConfig.from_reference_config(REFERENCE)
    assert (config.chunk_size, config.chunk_top_k, config.window_size) == (64, 5, 101)
    assert (config.num_lower_layers, config.layers_per_group, config.num_encoder_layers) == (2, [3, 1], 1)
    assert (config.num_key_value_heads, config.chunk_num_key_value_heads) == (2, 4)
    assert (config.landmark_token_id, config.pad_token_id) == (199, 198)
    assert (config.bos_token_id, config.eos_token_id) == (197, 197)
    assert config.softmax_off_by_one is False
    assert DRTConfig.from_reference_config({**REFERENCE, "enc_chunk_size": 127}).softmax_off_by_one is True
    with pytest.raises(ValueError, match="enable_alibi"):
        DRTConfig.from_reference_config({**REFERENCE, "enable_alibi": False})


def test_published_window_config():
    config = SlidingWindowLMConfig.from_reference_config(REFERENCE)
    assert (config.num_hidden_layers, config.window_size, config.pad_token_id) == (6, 101, 198)
    assert SlidingWindowLMConfig.from_reference_config({**REFERENCE, "num_hidden_layers": 4}).num_hidden_layers == 4


def test_unknown_published_keys_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        DRTConfig.from_reference_config(REFERENCE)
        assert not caplog.records
        DRTConfig.from_reference_config({**REFERENCE, "novelty": 1})
    assert "novelty" in caplog.text
