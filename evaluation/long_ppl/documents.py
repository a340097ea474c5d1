"""What is computed for each document once, by whichever process, and kept in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evaluation.gathering import gather, share_of
from evaluation.loading import load_model, load_tokenizer, tokenizer_identity
from evaluation.model_paths import HUB, identity_of
from evaluation.processes import Process
from evaluation.results import digest, read_json, write_json


@dataclass
class TextModel:
    """A model with its tokenizer, each loaded when it is first needed.

    Attributes:
        path: folder or ``hub:NAME``.
        dtype: of weights and arithmetic.
        device: where it stands.
    """

    path: str
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            ValueError: there is none, or its files are damaged.
        """
        found = load_tokenizer(self.path.removeprefix(HUB))
        if found is None:
            raise ValueError(
                f"{self.path} has no tokenizer: LongPPL reads text; put the model's tokenizer into its folder"
            )
        return found

    @cached_property
    def model(self) -> Any:
        """The model."""
        return load_model(self.path.removeprefix(HUB), dtype=self.dtype, device=self.device)

    @property
    def identity(self) -> str:
        """What its losses of a text depend on: weights, configuration and tokenizer."""
        return digest([identity_of(self.path), tokenizer_identity(self.tokenizer)])


def document_files(
    files: Sequence[Path], compute: Callable[[int], dict[str, Any]], process: Process
) -> list[dict[str, Any]]:
    """Return what the files of documents hold; those that are missing are computed, each by one process.

    Args:
        files: of every document, named by all that its content depends on.
        compute: makes the content for a document's number.
        process: one of several that have joined, or the only one.
    """
    for index in share_of([index for index, file in enumerate(files) if not file.is_file()], process):
        write_json(files[index], compute(index))
    gather(None, process)
    return [read_json(file) for file in files]
