"""Language models in the Hugging Face format; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from models.drt import DRTConfig, DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

for _config, _model in (
    (DRTConfig, DRTForCausalLM),
    (SlidingWindowLMConfig, SlidingWindowLMForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)

__all__ = ["DRTConfig", "DRTForCausalLM", "SlidingWindowLMConfig", "SlidingWindowLMForCausalLM"]
