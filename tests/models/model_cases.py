"""Small random models and fixtures shared by the tests of this folder."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from models.drt import DRTConfig, DRTForCausalLM
from models.landmark import LandmarkConfig, LandmarkForCausalLM
from models.rpt import RPTConfig, RPTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "drt"
TEXT_IDS = 60


def fixture(name: str) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        metadata = {key: json.loads(text) if text[0] in "{[" else text for key, text in file.metadata().items()}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def drt_config(**changes) -> DRTConfig:
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_lower_layers": 1,
        "layers_per_group": [1, 1],
        "num_encoder_layers": 1,
        "chunk_size": 5,
        "chunk_top_k": 3,
        "window_size": 9,
        "landmark_token_id": 63,
        "pad_token_id": 61,
        "bos_token_id": 62,
        "eos_token_id": 62,
    }
    return DRTConfig(**{**fields, **changes})


def window_config(**changes) -> SlidingWindowLMConfig:
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "window_size": 9,
        "pad_token_id": 61,
        "bos_token_id": 62,
        "eos_token_id": 62,
    }
    return SlidingWindowLMConfig(**{**fields, **changes})


def landmark_config(**changes) -> LandmarkConfig:
    """Reads all blocks, so that a cache changes nothing."""
    sizes = {"num_hidden_layers": 2, "chunk_size": 5, "chunk_top_k": None, "landmark_token_id": 63}
    return LandmarkConfig(**{**_shared_fields(), **sizes, **changes})


def block_recurrent_config(**changes) -> BlockRecurrentConfig:
    sizes = {
        "num_hidden_layers": 3,
        "recurrent_layers": [2],
        "block_width": 6,
        "num_state_vectors": 4,
        "memory_dropout": 0.0,
        "num_key_value_heads": 1,
    }
    return BlockRecurrentConfig(**{**_shared_fields(), **sizes, **changes})


def rpt_config(**changes) -> RPTConfig:
    sizes = {
        "num_lower_layers": 1,
        "num_upper_layers": 2,
        "num_encoder_layers": 1,
        "chunk_size": 5,
        "chunk_top_k": 2,
        "window_size": 9,
    }
    return RPTConfig(**{**_shared_fields(), **sizes, **changes})


def _shared_fields() -> dict:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 61,
        "bos_token_id": 62,
        "eos_token_id": 62,
    }


def scaled_up(model: nn.Module, factor: float = 12.0) -> nn.Module:
    """Scale the matrices, so that every part of the model has a say in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(factor)
    return model.eval()


def small_drt(**changes) -> DRTForCausalLM:
    torch.manual_seed(1)
    return scaled_up(DRTForCausalLM(drt_config(**changes)))


def small_window_lm(**changes) -> SlidingWindowLMForCausalLM:
    torch.manual_seed(2)
    return scaled_up(SlidingWindowLMForCausalLM(window_config(**changes)))


def small_landmark(**changes) -> LandmarkForCausalLM:
    torch.manual_seed(3)
    return scaled_up(LandmarkForCausalLM(landmark_config(**changes)))


def small_block_recurrent(**changes) -> BlockRecurrentForCausalLM:
    torch.manual_seed(4)
    return scaled_up(BlockRecurrentForCausalLM(block_recurrent_config(**changes)))


def small_rpt(retriever=None, /, **changes) -> RPTForCausalLM:
    torch.manual_seed(5)
    return scaled_up(RPTForCausalLM(rpt_config(**changes), retriever))


# Every test of the common contract runs over these.
SMALL_MODELS = {
    "drt": small_drt,
    "window": small_window_lm,
    "landmark": small_landmark,
    "block_recurrent": small_block_recurrent,
    "rpt": small_rpt,
}
BASELINES = ("landmark", "block_recurrent", "rpt")


def token_ids(batch_size: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TEXT_IDS, (batch_size, length), generator=torch.Generator().manual_seed(seed))
