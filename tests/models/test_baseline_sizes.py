"""Parameters of the baselines at full size, and their count of products against those that are computed."""

import pytest
import torch
from model_cases import block_recurrent_config, landmark_config, rpt_config, window_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from models.block_recurrent import BlockRecurrentConfig
from models.landmark import LandmarkConfig
from models.rpt import RPTConfig


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LandmarkConfig(), 123_557_376),  # as the sliding window: landmarks add no matrix
        (LandmarkConfig(num_hidden_layers=15), 144_795_648),
        (BlockRecurrentConfig(intermediate_size=3168), 145_972_352),
        (RPTConfig(), 145_979_904),
    ],
)
def test_parameter_counts_on_the_meta_device(config, count):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == count
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not list(model.buffers())


SIZES = {"vocab_size": 300, "hidden_size": 96, "intermediate_size": 256, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("config", "rel"),
    [
        (window_config(**SIZES, window_size=33), 0.15),
        # Tiles compute the scores up to their last key for every row, the count has those that are visible.
        (landmark_config(**SIZES, chunk_size=15), 0.3),
        (block_recurrent_config(**{**SIZES, "num_key_value_heads": 1}, block_width=32, num_state_vectors=32), 0.15),
        (rpt_config(**SIZES, chunk_size=16, window_size=33), 0.15),
    ],
)
def test_products_of_a_token(config, rel):
    model, ids = AutoModelForCausalLM.from_config(config), torch.randint(60, (1, 480))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    assert 3 * counter.get_total_flops() / 480 == pytest.approx(model.num_flops_per_token(480), rel=rel)
    longer = model.num_flops_per_token(10**6)
    if config.model_type == "landmark":
        assert longer > 100 * model.num_flops_per_token(480)
    else:
        assert longer < 1.6 * model.num_flops_per_token(480)
