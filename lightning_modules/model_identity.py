"""Whether a checkpoint belongs to the model that wants to load it."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl

# Configuration entries that change no number a model computes beyond rounding, or that transformers adds by itself.
_FREE = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "offload_chunk_memory")


def refuse_other_model(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Compare the configuration and the shapes of all tensors with those of ``module.model``.

    Raises:
        ValueError: something differs; the first difference is named.
    """
    mine = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    mine |= _settings(module.model.config.to_json_string(use_diff=False))
    theirs |= _settings(checkpoint["model_config"])
    different = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"the checkpoint belongs to another model: {len(different)} entries differ, first {name}: "
            f"{theirs.get(name, 'absent')} in the checkpoint, {mine.get(name, 'absent')} in this recipe; "
            "choose the recipe it was trained with, or another output="
        )


def _settings(config: str) -> dict[str, Any]:
    """Configuration entries that matter, without how a kernel is implemented."""
    entries = json.loads(config)
    return {k: v for k, v in entries.items() if k not in _FREE and not k.endswith("_implementation")}
