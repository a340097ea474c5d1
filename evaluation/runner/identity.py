"""What the answers to a task depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from evaluation.results import digest
from evaluation.runner.prompts import PromptOptions
from evaluation.tasks.base import Example, Task
from patches.parallel_context import ParallelContext

SAMPLES = 16
# These change the cost of an answer, not the answer.
_COST_ONLY = ("workspace_mb", "micro_batch_tokens", "implementation")


def run_identity(
    task: Task,
    patch: ParallelContext | None,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    options: PromptOptions,
    scoring: str,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """Return the protocol as plain values; runs that share it may share a folder."""
    prompts = [[task.prompt(example), [str(answer) for answer in example.answers]] for example in examples]
    return {
        "task": task.name,
        "patch": None if patch is None else describe_patch(patch),
        "model": model_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "examples": digest(prompts),
        "num_examples": len(examples),
        "max_new_tokens": max_new_tokens or task.max_new_tokens,
        "scoring": scoring,
        **asdict(options),
    }


def describe_patch(patch: ParallelContext) -> dict[str, Any]:
    """Return the options of a patch that answers depend on."""
    plain = {name: value for name, value in asdict(patch).items() if name not in _COST_ONLY}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in _listed(plain).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value


def model_fingerprint(model: Any) -> str:
    """Return ``sha256:`` over names, shapes and a few values of every weight."""
    hasher = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        count = min(SAMPLES, len(flat))
        # In whole numbers: float32 rounds the last place of a large weight to one behind its end.
        picked = flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(1, count - 1)]
        hasher.update(f"{name}{tuple(weight.shape)}{picked.float().cpu().tolist()}".encode())
    return "sha256:" + hasher.hexdigest()
