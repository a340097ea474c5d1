"""LongPPL of models over documents; the work behind ``eval.py recipe=long_ppl``.

Notable: key tokens are found once per document, as intervals of characters, so models of any tokenizer are compared on
the same text; each finished (model, document) is a file, so an interrupted evaluation continues.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from evaluation.arithmetic import arithmetic, versions
from evaluation.compatibility import check_length
from evaluation.figures import save_loss_by_position
from evaluation.gathering import joined
from evaluation.long_ppl.documents import TextModel, document_files
from evaluation.long_ppl.scoring import (
    Interval,
    encode_text,
    find_key_intervals,
    read_key_file,
    score_document,
    write_key_file,
)
from evaluation.model_paths import HUB, check_model, named_models
from evaluation.positions import position_edges
from evaluation.processes import Process
from evaluation.results import csv_text, digest, json_text, text_table, write_json, write_text
from evaluation.scoring import perplexity_of

Dtype = Literal["float32", "bfloat16", "float16"]
COLUMNS = ("model", "long_ppl", "num_key_tokens", "perplexity", "num_targets", "key_nll_sum", "nll_sum", "seconds")
SHOWN = COLUMNS[:5]
SUMS = ("key_nll_sum", "num_key_tokens", "nll_sum", "num_targets", "seconds")


class Texts(Protocol):
    """Documents in a fixed order; `preprocess.sources.open_source` returns such."""

    def describe(self) -> dict[str, Any]:
        """Return plain values that change whenever the documents do."""

    def documents(self) -> Iterable[Any]:
        """Yield objects with a ``text``."""


class LongPplTask:
    """Perplexity of one or several models over the tokens that need the far context (ICLR 2025, arXiv 2410.23771).

    Args:
        models: a model folder, or label -> folder; ``hub:NAME`` is a model of the hub. Each needs its fast tokenizer.
        texts: the documents.
        evaluator: folder or hub name (``hub:NAME``) of the model that chooses key tokens.
        key_file: stored key characters instead of an evaluator, a line for each document.
        max_documents: use only so many documents; None: all.
        max_tokens: cut each document to its first so many tokens, for evaluator and models alike.
        context_length: K, tokens that the short context has at least.
        stride: targets that share a window of the short context.
        alpha: a key token gains more than this (nats) from the full context.
        beta: and its log probability with it is above this.
        dtype: of weights and arithmetic; losses are float32.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: an option out of range, or not exactly one of evaluator and key_file.
        FileNotFoundError: a model or the key file does not exist.
    """

    def __init__(
        self,
        models: dict[str, str] | str,
        texts: Texts,
        *,
        evaluator: str | None = None,
        key_file: str | None = None,
        max_documents: int | None = None,
        max_tokens: int = 32768,
        context_length: int = 4096,
        stride: int = 1024,
        alpha: float = 2.0,
        beta: float = -2.0,
        dtype: Dtype = "float32",
        device: str = "auto",
    ) -> None:
        if (evaluator is None) == (key_file is None):
            raise ValueError("give either an evaluator (a model that chooses the key tokens) or a key_file, not both")
        if min(context_length, stride) < 1 or max_tokens <= context_length + stride:
            raise ValueError(
                f"context_length ({context_length}) and stride ({stride}) must be at least 1, and max_tokens above "
                f"their sum, got {max_tokens}: up to there short and full context are the same"
            )
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, got {max_documents}")
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {dtype}")
        self.models, self.texts = named_models(models), texts
        if evaluator is not None:
            check_model(evaluator, "evaluator")
        self.evaluator, self.key_file = evaluator, Path(key_file) if key_file is not None else None
        if self.key_file is not None and not self.key_file.is_file():
            raise FileNotFoundError(f"no key file at {self.key_file}: give an evaluator to make one")
        self.max_documents, self.max_tokens = max_documents, max_tokens
        self.windows = {"context_length": context_length, "stride": stride}
        self.thresholds = {"alpha": alpha, "beta": beta}
        self.process = Process.current()
        self.dtype, self.device = dtype, self.process.device(device, dtype)

    def run(self, output: Path) -> dict[str, Any] | None:
        """Compute what is missing in ``output``; write metrics, table and figure; return the metrics and the table.

        Files: ``keys/*.json``, ``key_intervals.txt`` (can be given as a key_file), ``results/*.json``,
        ``predictions.jsonl`` (a line for each model and document), ``metrics.json``, ``long_ppl.csv``,
        ``loss_by_position.png``. Under torchrun the processes share the documents, and only the first writes the
        metrics and returns them.

        Raises:
            ValueError: the key file has another number of documents, a tokenizer is missing or slow.
        """
        self._check_lengths()
        texts = self._read()
        with joined(self.process):
            keys = self._keys(texts, output)
            scored = {label: self._score(label, path, texts, keys, output) for label, path in self.models.items()}
        if not self.process.is_first:
            return None
        write_key_file(output / "key_intervals.txt", keys)
        return self._publish(scored, self._protocol(len(texts)), output)

    def _publish(
        self, scored: Mapping[str, list[dict[str, Any]]], protocol: dict[str, Any], output: Path
    ) -> dict[str, Any]:
        rows, curves, lines = [], {}, []
        for label, documents in scored.items():
            rows.append({"model": label} | _summary(documents))
            curves[label] = {self.max_tokens: _position_curve(documents, self.max_tokens)}
            lines += [
                json_text({"model": label, "document": index} | {name: document[name] for name in SUMS}) + "\n"
                for index, document in enumerate(documents)
            ]
        write_text(output / "predictions.jsonl", "".join(lines))
        metrics = {"task": "long_ppl", "protocol": protocol, "results": rows}
        write_json(output / "metrics.json", metrics)
        write_text(output / "long_ppl.csv", csv_text(rows, COLUMNS))
        save_loss_by_position(curves, output / "loss_by_position.png")
        return metrics | {"table": text_table(rows, SHOWN)}

    def _check_lengths(self) -> None:
        chooser = {} if self.evaluator is None else {"evaluator": self.evaluator}
        for label, path in (self.models | chooser).items():
            try:
                check_length(path.removeprefix(HUB), self.max_tokens)
            except ValueError as error:
                raise ValueError(f"model {label}: {error}, or lower task.max_tokens") from error

    def _read(self) -> list[str]:
        texts = []
        for document in self.texts.documents():
            texts.append(str(document.text))
            if len(texts) == self.max_documents:
                break
        if not texts:
            raise ValueError("there is no document to score: give another text or another split")
        return texts

    def _keys(self, texts: Sequence[str], output: Path) -> list[list[Interval]]:
        if self.key_file is not None:
            keys = read_key_file(self.key_file)
            if len(keys) < len(texts):
                raise ValueError(f"{self.key_file} has {len(keys)} lines, but there are {len(texts)} documents")
            return keys[: len(texts)]
        assert self.evaluator is not None
        request = self._request(self.evaluator) | self.windows | self.thresholds
        evaluator = self._model(self.evaluator)
        names = [f"{index}-{digest(request | {'text': text})[:12]}.json" for index, text in enumerate(texts)]

        def find(index: int) -> dict[str, Any]:
            encoded = encode_text(evaluator.tokenizer, texts[index], max_tokens=self.max_tokens)
            return {"intervals": find_key_intervals(evaluator.model, encoded, **self.thresholds, **self.windows)}

        found = document_files([output / "keys" / name for name in names], find, self.process)
        return [[(int(start), int(end)) for start, end in document["intervals"]] for document in found]

    def _score(
        self, label: str, path: str, texts: Sequence[str], keys: Sequence[Sequence[Interval]], output: Path
    ) -> list[dict[str, Any]]:
        request, model = self._request(path), self._model(path)
        edges = position_edges(self.max_tokens)
        name, files = re.sub(r"[^A-Za-z0-9._+-]+", "_", label), []
        for index, (text, found) in enumerate(zip(texts, keys, strict=True)):
            key = digest(request | {"text": text, "key": [list(interval) for interval in found]})[:12]
            files.append(output / "results" / f"{name}-{index}-{key}.json")

        def score(index: int) -> dict[str, Any]:
            start = time.perf_counter()
            encoded = encode_text(model.tokenizer, texts[index], max_tokens=self.max_tokens)
            scored = score_document(model.model, encoded, keys[index], edges=edges)
            return scored | {"seconds": time.perf_counter() - start}

        return document_files(files, score, self.process)

    def _model(self, path: str) -> TextModel:
        return TextModel(path, getattr(torch, self.dtype), self.device)

    @cached_property
    def _identities(self) -> dict[str, str]:
        """What tells the models apart by path; hashing large ones takes a while."""
        paths = {*self.models.values(), *filter(None, [self.evaluator])}
        return {path: self._model(path).identity for path in sorted(paths)}

    def _request(self, path: str) -> dict[str, Any]:
        return {"model": self._identities[path], "max_tokens": self.max_tokens, **arithmetic(self.device, self.dtype)}

    def _protocol(self, num_documents: int) -> dict[str, Any]:
        """Everything besides the models that a number depends on."""
        known, chooser = self._identities, {"evaluator": self.evaluator}
        if self.key_file is not None:
            content = hashlib.sha256(self.key_file.read_bytes()).hexdigest()
            chooser = {"key_file": str(self.key_file), "key_file_identity": f"sha256:{content}"}
        elif self.evaluator is not None:
            chooser |= {"evaluator_identity": known[self.evaluator]}
        return {
            "texts": self.texts.describe(),
            "num_documents": num_documents,
            "max_tokens": self.max_tokens,
            "special_tokens": "as each tokenizer adds them",
            **chooser,
            **self.windows,
            **self.thresholds,
            **arithmetic(self.device, self.dtype),
            "models": {
                label: {"path": path, "identity": self._identities[path]} for label, path in self.models.items()
            },
            "versions": versions(),
        }


def _summary(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    listed = list(documents)
    total = {name: math.fsum(document[name] for document in listed) for name in SUMS}
    total |= {name: int(total[name]) for name in ("num_key_tokens", "num_targets")}
    return total | {
        "long_ppl": _perplexity(total["key_nll_sum"], total["num_key_tokens"]),
        "perplexity": _perplexity(total["nll_sum"], total["num_targets"]),
    }


def _perplexity(nll_sum: float, count: float) -> float | None:
    return perplexity_of(nll_sum / count) if count else None


def _position_curve(documents: Sequence[Mapping[str, Any]], length: int) -> dict[str, Any]:
    """Add the documents' losses by position up, as `evaluation.positions.position_report` does within windows."""
    columns = {
        name: [math.fsum(values) for values in zip(*(document[name] for document in documents), strict=True)]
        for name in ("position_nll_sum", "position_counts")
    }
    return {"position_edges": position_edges(length), **columns}
