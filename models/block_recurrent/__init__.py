"""The block-recurrent baseline: window attention, and layers whose state vectors are passed from block to block."""

from models.block_recurrent.cache import BlockRecurrentCache
from models.block_recurrent.configuration_block_recurrent import BlockRecurrentConfig
from models.block_recurrent.modeling_block_recurrent import BlockRecurrentForCausalLM

__all__ = ["BlockRecurrentCache", "BlockRecurrentConfig", "BlockRecurrentForCausalLM"]
