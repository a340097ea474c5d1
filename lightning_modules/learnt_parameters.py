"""What a fine-tuned model has learnt, as one file: its trainable parameters and the run they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


@dataclass(frozen=True)
class LearntParameters:
    """The parameters with gradients of a model, in a file.

    Attributes:
        file: a safetensors file.
        request: digest of all that they depend on.
    """

    file: Path
    request: str

    def save(self, model: nn.Module) -> nn.Module:
        """Write the parameters; returns the model."""
        tensors = {name: value.detach().cpu() for name, value in model.named_parameters() if value.requires_grad}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"request": self.request})
        partial.replace(self.file)
        return model

    @torch.no_grad()
    def load(self, model: nn.Module) -> nn.Module:
        """Put the parameters of the file in place; returns the model.

        Raises:
            ValueError: the file was made with other options, model or text.
        """
        with safe_open(self.file, "pt") as stored:
            if (stored.metadata() or {}).get("request") != self.request:
                raise ValueError(f"{self.file} was made with other options, model or text: pass another output folder")
            for name, value in model.named_parameters():
                if value.requires_grad:
                    value.copy_(stored.get_tensor(name))
        return model
