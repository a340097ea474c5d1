"""The landmark-attention baseline: full attention in which landmarks open the blocks they end."""

from models.landmark.cache import LandmarkCache
from models.landmark.configuration_landmark import LandmarkConfig
from models.landmark.modeling_landmark import LandmarkForCausalLM

__all__ = ["LandmarkCache", "LandmarkConfig", "LandmarkForCausalLM"]
