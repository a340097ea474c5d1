"""The baseline without retrieval: window attention in every layer."""

from models.sliding_window_lm.cache import SlidingWindowCache
from models.sliding_window_lm.configuration_sliding_window_lm import SlidingWindowLMConfig
from models.sliding_window_lm.modeling_sliding_window_lm import SlidingWindowLMForCausalLM

__all__ = ["SlidingWindowCache", "SlidingWindowLMConfig", "SlidingWindowLMForCausalLM"]
