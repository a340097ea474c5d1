"""What is computed for each document once, by whichever process, and kept in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evaluation.gathering import gather, share_of
from evaluation.loading import load_model, load_tokenizer
from evaluation.model_paths import HUB
from evaluation.processes import Process
from evaluation.results import read_json, write_json


@dataclass
class TextModel:
    """A model with its tokenizer, loaded when a first document needs them.

    Attributes:
        path: folder or ``hub:NAME``.
        dtype: of weights and arithmetic.
        device: where it stands.
    """

    path: str
    dtype: torch.dtype
    device: torch.device
    _pair: tuple[Any, Any] | None = field(default=None, init=False)

    def get(self) -> tuple[Any, Any]:
        """Return model and tokenizer.

        Raises:
            ValueError: there is no tokenizer, or the files are damaged.
        """
        if self._pair is None:
            name = self.path.removeprefix(HUB)
            tokenizer = load_tokenizer(name)
            if tokenizer is None:
                raise ValueError(
                    f"{self.path} has no tokenizer: LongPPL reads text; put the model's tokenizer into its folder"
                )
            self._pair = load_model(name, dtype=self.dtype, device=self.device), tokenizer
        return self._pair


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
