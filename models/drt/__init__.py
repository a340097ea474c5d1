"""DRT: causal retrieval with grouped cross attention."""

from models.drt.cache import DRTCache
from models.drt.configuration_drt import DRTConfig
from models.drt.modeling_drt import DRTForCausalLM, DRTOutput

__all__ = ["DRTCache", "DRTConfig", "DRTForCausalLM", "DRTOutput"]
