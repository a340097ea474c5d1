"""The models of a sweep: folders, names of the hub, or functions that build one; each with tokenizer and identity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig

from evaluation.loading import load_model, load_tokenizer, max_positions
from evaluation.model_paths import HUB, check_model, identity_of, label_of


@dataclass
class SweepModel:
    """A model, loaded when it is first needed.

    Attributes:
        label: what reports call it.
        source: folder, ``hub:NAME``, or a function that builds the model (with seed 0).
        given_tokenizer: its tokenizer, where the folder has none.
    """

    label: str
    source: str | Callable[[], Any]
    given_tokenizer: Any = None

    def __post_init__(self) -> None:
        """Look for the folder.

        Raises:
            FileNotFoundError: it holds no model.
        """
        if isinstance(self.source, str):
            check_model(self.source, self.label)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            ValueError: it has none.
        """
        found = self.given_tokenizer
        if found is None and isinstance(self.source, str):
            found = load_tokenizer(self.source.removeprefix(HUB))
        if found is None:
            raise ValueError(f"model {self.label} has no tokenizer (tokenizer.json): put that of its text there")
        return found

    @cached_property
    def config(self) -> Any:
        """Its configuration."""
        if isinstance(self.source, str):
            return AutoConfig.from_pretrained(self.source.removeprefix(HUB))
        return self._built.config

    @property
    def limit(self) -> int | None:
        """Positions it was made for; None if it sets no limit."""
        return max_positions(self.config)

    @cached_property
    def identity(self) -> str:
        """Digest of its weights; of a hub model, its name."""
        if isinstance(self.source, str):
            return identity_of(self.source)
        hasher = hashlib.sha256()
        for name, tensor in self._built.state_dict().items():
            hasher.update(name.encode() + tensor.float().numpy().tobytes())
        return "sha256:" + hasher.hexdigest()

    def load(self, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Return the model in evaluation mode."""
        if isinstance(self.source, str):
            return load_model(self.source.removeprefix(HUB), dtype=dtype, device=device)
        return self._built.to(device, dtype).eval()

    @cached_property
    def _built(self) -> Any:
        assert callable(self.source)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.source()


def single_model(model: Any, tokenizer: Any = None) -> SweepModel:
    """Return the one model that is named, as `sweep_models`.

    Raises:
        ValueError: none, or several.
    """
    found = sweep_models(model or (), tokenizer)
    if len(found) > 1:
        labels = ", ".join(each.label for each in found)
        raise ValueError(
            f"one model at a time, got {labels}: pass model.path=FOLDER, a run for each with its own label"
        )
    return found[0]


def sweep_models(
    models: str | Sequence[str] | Mapping[str, Any] | Callable[[], Any], tokenizer: Any = None
) -> list[SweepModel]:
    """Return the models that are named: a folder, several, label -> folder, or a function that builds one.

    Raises:
        FileNotFoundError: a folder that is none.
        ValueError: no model, or two of one label.
    """
    named: list[tuple[str, Any]]
    if isinstance(models, Mapping):
        named = list(models.items())
    elif isinstance(models, str) or callable(models):
        named = [(label_of(models) if isinstance(models, str) else "random", models)]
    else:
        named = [(label_of(path), path) for path in models]
    if not named:
        raise ValueError("model.path is required: pass model.path=FOLDER, a list of folders, or hub:NAME")
    labels = [label for label, _ in named]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the models need different names, got {', '.join(labels)}: pass task.models={{name: folder}}")
    return [SweepModel(label, source, tokenizer) for label, source in named]
