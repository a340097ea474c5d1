"""Language models in the Hugging Face format; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from models.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from models.drt import DRTConfig, DRTForCausalLM
from models.landmark import LandmarkConfig, LandmarkForCausalLM
from models.rpt import RPTConfig, RPTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

for _config, _model in (
    (BlockRecurrentConfig, BlockRecurrentForCausalLM),
    (DRTConfig, DRTForCausalLM),
    (LandmarkConfig, LandmarkForCausalLM),
    (RPTConfig, RPTForCausalLM),
    (SlidingWindowLMConfig, SlidingWindowLMForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)

__all__ = [
    "BlockRecurrentConfig",
    "BlockRecurrentForCausalLM",
    "DRTConfig",
    "DRTForCausalLM",
    "LandmarkConfig",
    "LandmarkForCausalLM",
    "RPTConfig",
    "RPTForCausalLM",
    "SlidingWindowLMConfig",
    "SlidingWindowLMForCausalLM",
]
