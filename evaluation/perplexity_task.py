"""Perplexity of models over context lengths on one set of targets; the work behind ``eval.py recipe=perplexity``.

Notable: each finished (model, length) is a file named by everything that determines its number, so an interrupted
evaluation continues, a changed one recomputes only what changed, and no number ever appears under another protocol.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers

from evaluation.compatibility import TokenizedCorpus, check_length, check_tokens
from evaluation.figures import save_loss_by_position, save_perplexity_by_length
from evaluation.loading import load_model
from evaluation.perplexity import evaluate_perplexity
from evaluation.results import (
    csv_text,
    digest,
    git_commit,
    json_text,
    model_identity,
    read_json,
    text_table,
    write_json,
    write_text,
)
from evaluation.scoring import choose_device

Dtype = Literal["float32", "bfloat16", "float16", "bfloat16-mixed"]
HUB = "hub:"
COLUMNS = ("model", "length", "stride", "num_targets", "nll_sum", "loss", "perplexity", "bits_per_byte", "seconds")
SHOWN = ("model", "length", "num_targets", "loss", "perplexity", "bits_per_byte")


class PerplexityTask:
    """Evaluate one or several models at several context lengths on identical targets.

    Args:
        models: a model folder (``save_pretrained``), or label -> folder; ``hub:NAME`` is a model of the hub.
        corpus: tokens to score (``datamodules.corpus.open_corpus``).
        lengths: context lengths (windows) to score at.
        stride: distance of the windows' starts, at most the shortest length; None: windows do not overlap.
        max_tokens: score only the first so many tokens.
        batch_tokens: tokens of a forward, at least one window.
        bos_token_id: put before every window and counted in its length.
        dtype: of weights and arithmetic; ``bfloat16-mixed`` keeps float32 weights under autocast.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.
        progress: show a progress bar on the error stream.

    Raises:
        ValueError: an option out of range, fewer tokens than the longest length needs, or a device that is not there.
        FileNotFoundError: a model does not exist.
    """

    def __init__(
        self,
        models: dict[str, str] | str,
        corpus: TokenizedCorpus,
        lengths: list[int],
        *,
        stride: int | None = None,
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
        bos_token_id: int | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        named = {_label(models): models} if isinstance(models, str) else models
        self.models = {label: str(path) for label, path in named.items()}
        self.corpus, self.lengths = corpus, sorted(lengths)
        self.stride, self.max_tokens, self.batch_tokens = stride, max_tokens, batch_tokens
        self.bos_token_id, self.dtype, self.progress = bos_token_id, dtype, progress
        self._check_numbers()
        self._check_text()
        self.device = choose_device(device, dtype)
        for label, path in self.models.items():
            if not path.startswith(HUB) and not (Path(path) / "config.json").is_file():
                raise FileNotFoundError(
                    f"model {label}: {path} is no model folder (it has no config.json); "
                    "make one with export.py, or write hub:NAME for a model of the hub"
                )

    def run(self, output: Path) -> dict[str, Any]:
        """Evaluate what is missing in ``output``; write metrics, table and figures; return the metrics and the table.

        Files: ``results/*.json`` (one per model and length), ``metrics.json``, ``perplexity.csv``,
        ``predictions.jsonl`` (the sum of each window), ``perplexity_by_length.png``, ``loss_by_position.png``.
        """
        compared = {label: self._compare(label, path) for label, path in self.models.items()}
        described, results, protocol = {}, [], self._protocol()
        for label, path in self.models.items():
            described[label] = {"path": path, "identity": _identity(path)}
            request = protocol | {"model": described[label]["identity"]}
            results += self._run_model(label, path, request, output / "results")
        protocol |= {"tokenizers": compared}
        return _publish({"task": "perplexity", "protocol": protocol, "models": described, "results": results}, output)

    def _compare(self, label: str, path: str) -> str:
        try:
            check_length(path.removeprefix(HUB), self.lengths[-1])
            return check_tokens(path.removeprefix(HUB), self.corpus)
        except ValueError as error:
            raise ValueError(f"model {label}: {error}") from error

    def _run_model(self, label: str, path: str, request: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Return the results of a model, from files where they exist; it is loaded only if one is missing."""
        results, model = [], None
        for length in self.lengths:
            key = digest(request | {"length": length})[:12]
            file = folder / f"{re.sub(r'[^A-Za-z0-9._+-]+', '_', label)}-{length}-{key}.json"
            if file.is_file():
                result = read_json(file)
            else:
                model = self._load(path) if model is None else model
                result = self._evaluate(model, length)
                write_json(file, result)
            results.append({"model": label, "length": length} | result)
        return results

    def _evaluate(self, model: Any, length: int) -> dict[str, Any]:
        start = time.perf_counter()
        result = evaluate_perplexity(
            model,
            self.corpus,
            window=length,
            stride=self.stride,
            bos_token_id=self.bos_token_id,
            batch_size=max(1, self.batch_tokens // length),
            max_tokens=self.max_tokens,
            dtype=torch.bfloat16 if self.dtype == "bfloat16-mixed" else None,
            progress=self.progress,
        )
        return result | {"seconds": time.perf_counter() - start}

    def _load(self, path: str) -> Any:
        dtype = torch.float32 if self.dtype == "bfloat16-mixed" else getattr(torch, self.dtype)
        return load_model(path.removeprefix(HUB), dtype=dtype, device=self.device)

    def _protocol(self) -> dict[str, Any]:
        """Everything besides model and length that a number depends on."""
        return {
            "corpus": self.corpus.identity,
            "num_tokens": self._num_tokens(),
            "stride": self.stride,
            "bos_token_id": self.bos_token_id,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "git": git_commit(),
            },
        }

    def _num_tokens(self) -> int:
        return min(self.corpus.num_tokens, self.max_tokens or self.corpus.num_tokens)

    def _check_text(self) -> None:
        # A window has a successor for each of its tokens; a BOS is none of the text's.
        longest, needed = self.lengths[-1], self.lengths[-1] + (self.bos_token_id is None)
        if self._num_tokens() < needed:
            raise ValueError(
                f"a length of {longest} needs {needed} tokens, the text has {self._num_tokens()}: "
                "leave that length out or score more text"
            )

    def _check_numbers(self) -> None:
        if not self.models:
            raise ValueError("models is empty: give a model folder or label: folder pairs")
        shortest = 1 if self.bos_token_id is None else 2
        if not self.lengths or self.lengths[0] < shortest or len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"lengths must be different numbers from {shortest} up, got {self.lengths}")
        if self.stride is not None and not 1 <= self.stride <= self.lengths[0]:
            raise ValueError(
                f"stride must lie between 1 and the shortest length of {self.lengths[0]}, got {self.stride}; "
                "leave it out for windows that do not overlap"
            )
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.bos_token_id is not None and self.bos_token_id < 0:
            raise ValueError(f"bos_token_id must be a token id, got {self.bos_token_id}")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {self.dtype}")


def _publish(metrics: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write everything made of the results; return the metrics with the table as text."""
    lines = []
    for result in metrics["results"]:
        for start, stop, first_target, nll_sum in result.pop("windows"):
            window = {"start": start, "stop": stop, "first_target": first_target, "nll_sum": nll_sum}
            lines.append(json_text({"model": result["model"], "length": result["length"]} | window) + "\n")
    write_text(output / "predictions.jsonl", "".join(lines))
    write_json(output / "metrics.json", metrics)
    write_text(output / "perplexity.csv", csv_text(metrics["results"], COLUMNS))
    curves: dict[str, dict[int, Mapping[str, Any]]] = {label: {} for label in metrics["models"]}
    for result in metrics["results"]:
        curves[result["model"]][result["length"]] = result
    save_perplexity_by_length(curves, output / "perplexity_by_length.png")
    save_loss_by_position(curves, output / "loss_by_position.png")
    return metrics | {"table": text_table(metrics["results"], SHOWN)}


def _label(path: str) -> str:
    """Name a model by its folder, or by the run for ``runs/NAME/model``."""
    place = Path(path.removeprefix(HUB))
    return place.parent.name if place.name == "model" and place.parent.name else place.name


def _identity(path: str) -> str:
    return path if path.startswith(HUB) else model_identity(Path(path))
