"""What the answers to a task depend on: runs that agree in all of it may share a folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from evaluation.arithmetic import arithmetic
from evaluation.loading import tokenizer_identity
from evaluation.results import digest
from patches.parallel_context import ParallelContext

SAMPLES = 16
SUMMED = 1 << 24
# These change the cost of an answer, not the answer.
_COST_ONLY = ("workspace_mb", "micro_batch_tokens", "implementation")
# What a configuration says of its own origin; dtype and versions have entries of their own.
_ORIGIN = ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype")
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_entries(model: Any) -> dict[str, Any]:
    """Return what tells a model apart: weights, configuration, defaults of generation, arithmetic."""
    weight = next(model.parameters())
    found = {
        "model": model_fingerprint(model),
        "model_config": _described(getattr(model, "config", None)),
        "generation_config": _described(getattr(model, "generation_config", None)),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        **arithmetic(weight.device, str(weight.dtype).removeprefix("torch.")),
    }
    package = _quantization_package(model)
    if package is not None:
        found["versions"] |= {package: importlib.metadata.version(package)}
    return found


def tokenizer_entries(tokenizer: Any, *, chat: bool) -> dict[str, Any]:
    """Return what tells a tokenizer apart, and the chat template where prompts are put into it."""
    template = digest(tokenizer.chat_template) if chat else None
    return {"tokenizer": tokenizer_identity(tokenizer), "chat_template": template}


def describe_patch(patch: ParallelContext) -> dict[str, Any]:
    """Return the options of a patch that answers depend on."""
    plain = {name: value for name, value in asdict(patch).items() if name not in _COST_ONLY}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in _listed(plain).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value


def _described(config: Any) -> str | None:
    """Return the digest of a configuration of transformers."""
    if config is None:
        return None
    values = json.loads(config.to_json_string(use_diff=False))
    return digest(_without_origin(values))


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_origin(item) for key, item in value.items() if key not in _ORIGIN}
    return [_without_origin(item) for item in value] if isinstance(value, list) else value


def _quantization_package(model: Any) -> str | None:
    """Return the package that computes with quantised weights, None where they are not."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method))
    return name if name in ("bitsandbytes", "torchao") else None


def model_fingerprint(model: Any) -> str:
    """Return ``sha256:`` over names, shapes, sums of the bits and a few values of every weight."""
    hasher = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        count = min(SAMPLES, len(flat))
        # In whole numbers: float32 rounds the last place of a large weight to one behind its end.
        picked = flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(1, count - 1)]
        hasher.update(f"{name}{tuple(weight.shape)}{_sum_of_bits(flat)}{picked.float().cpu().tolist()}".encode())
    return "sha256:" + hasher.hexdigest()


def _sum_of_bits(flat: Tensor) -> int | None:
    """Add up the bits of values as whole numbers, exactly; None for tensors of a package's own kind."""
    if type(flat) not in (Tensor, torch.nn.Parameter):
        return None
    whole = flat.contiguous().view(_WHOLE[flat.element_size()])
    # In blocks: the sum of all would hold a copy in 8 bytes a value.
    return int(
        sum((block.sum(dtype=torch.int64) for block in whole.split(SUMMED)), whole.new_zeros((), dtype=torch.int64))
    )
