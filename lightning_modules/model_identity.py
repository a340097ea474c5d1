"""Whether a checkpoint belongs to the model that wants to load it."""

from __future__ import annotations

import inspect
import json
from typing import Any

import lightning.pytorch as pl
from transformers import PreTrainedConfig

# Options that change no number a model computes beyond rounding.
_FREE = ("use_cache", "offload_chunk_memory")


def refuse_other_model(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Compare the configuration and the shapes of all tensors with those of ``module.model``.

    Raises:
        ValueError: something differs; the first difference is named.
    """
    mine: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    # Strategies that shard the weights load them themselves, and compare their shapes.
    if checkpoint.get("state_dict"):
        mine = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    options = _options(type(module.model.config))
    mine |= _chosen(options, module.model.config.to_json_string(use_diff=False))
    theirs |= _chosen(options, checkpoint["model_config"])
    different = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"the checkpoint belongs to another model: {len(different)} entries differ, first {name}: "
            f"{theirs.get(name, 'absent')} in the checkpoint, {mine.get(name, 'absent')} in this recipe; "
            "choose the recipe it was trained with, or another output="
        )


def _options(config: type[PreTrainedConfig]) -> dict[str, Any]:
    """Options of this kind of model that matter, with their defaults.

    What every configuration of transformers has changes with its version; how a kernel is implemented changes rounding.
    """
    generic = inspect.signature(PreTrainedConfig.__init__).parameters
    named = inspect.signature(config.__init__).parameters.items()
    own = {name: parameter.default for name, parameter in named if name not in generic and name not in _FREE}
    return {name: default for name, default in own.items() if not name.endswith("_implementation")}


def _chosen(options: dict[str, Any], config: str) -> dict[str, Any]:
    """The options of a stored configuration; one that it does not know had what is the default today."""
    return options | {name: value for name, value in json.loads(config).items() if name in options}
