"""LongPPL of models over documents; the work behind ``eval.py recipe=long_ppl``.

Notable: key tokens are found once per document, as intervals of characters, so models of any tokenizer are compared on
the same text; each finished (model, document) is a file, so an interrupted evaluation continues.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from evaluation.compatibility import check_length
from evaluation.figures import save_loss_by_position
from evaluation.loading import load_model, load_tokenizer
from evaluation.long_ppl.scoring import (
    Interval,
    encode_text,
    find_key_intervals,
    read_key_file,
    score_document,
    write_key_file,
)
from evaluation.model_paths import HUB, check_model, identity_of, named_models
from evaluation.positions import position_edges
from evaluation.results import csv_text, digest, git_commit, json_text, read_json, text_table, write_json, write_text
from evaluation.scoring import choose_device, perplexity_of

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
        self.dtype, self.device = dtype, choose_device(device, dtype)

    def run(self, output: Path) -> dict[str, Any]:
        """Compute what is missing in ``output``; write metrics, table and figure; return the metrics and the table.

        Files: ``keys/*.json``, ``key_intervals.txt`` (can be given as a key_file), ``results/*.json``,
        ``predictions.jsonl`` (a line for each model and document), ``metrics.json``, ``long_ppl.csv``,
        ``loss_by_position.png``.

        Raises:
            ValueError: the key file has another number of documents, a tokenizer is missing or slow.
        """
        self._check_lengths()
        texts = self._read()
        keys, protocol = self._keys(texts, output), self._protocol(len(texts))
        write_key_file(output / "key_intervals.txt", keys)
        rows, curves, lines = [], {}, []
        for label, path in self.models.items():
            documents = self._score(label, path, texts, keys, output / "results")
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
        request = self._request(identity_of(self.evaluator)) | self.windows | self.thresholds
        evaluator = _Lazy(self.evaluator, self._load)
        keys = []
        for index, text in enumerate(texts):
            file = output / "keys" / f"{index}-{digest(request | {'text': text})[:12]}.json"
            if not file.is_file():
                model, tokenizer = evaluator.get()
                encoded = encode_text(tokenizer, text, max_tokens=self.max_tokens)
                write_json(file, {"intervals": find_key_intervals(model, encoded, **self.thresholds, **self.windows)})
            keys.append([(int(start), int(end)) for start, end in read_json(file)["intervals"]])
        return keys

    def _score(
        self, label: str, path: str, texts: Sequence[str], keys: Sequence[Sequence[Interval]], folder: Path
    ) -> list[dict[str, Any]]:
        request, model, documents = self._request(identity_of(path)), _Lazy(path, self._load), []
        edges = position_edges(self.max_tokens)
        for index, (text, found) in enumerate(zip(texts, keys, strict=True)):
            key = digest(request | {"text": text, "key": [list(interval) for interval in found]})[:12]
            file = folder / f"{re.sub(r'[^A-Za-z0-9._+-]+', '_', label)}-{index}-{key}.json"
            if not file.is_file():
                start, (loaded, tokenizer) = time.perf_counter(), model.get()
                scored = score_document(
                    loaded, encode_text(tokenizer, text, max_tokens=self.max_tokens), found, edges=edges
                )
                write_json(file, scored | {"seconds": time.perf_counter() - start})
            documents.append(read_json(file))
        return documents

    def _load(self, path: str) -> tuple[Any, Any]:
        name = path.removeprefix(HUB)
        tokenizer = load_tokenizer(name)
        if tokenizer is None:
            raise ValueError(f"{path} has no tokenizer: LongPPL reads text; put the model's tokenizer into its folder")
        return load_model(name, dtype=getattr(torch, self.dtype), device=self.device), tokenizer

    def _request(self, identity: str) -> dict[str, Any]:
        return {"model": identity, "max_tokens": self.max_tokens, "dtype": self.dtype, "torch": torch.__version__}

    def _protocol(self, num_documents: int) -> dict[str, Any]:
        """Everything besides the models that a number depends on."""
        chooser = {"key_file": str(self.key_file)} if self.key_file else {"evaluator": self.evaluator}
        return {
            "texts": self.texts.describe(),
            "num_documents": num_documents,
            "max_tokens": self.max_tokens,
            "special_tokens": "as each tokenizer adds them",
            **chooser,
            **self.windows,
            **self.thresholds,
            "dtype": self.dtype,
            "device": self.device.type,
            "versions": {"torch": torch.__version__, "git": git_commit()},
        }


class _Lazy:
    """A model that is loaded when a first document needs it."""

    def __init__(self, path: str, load: Callable[[str], tuple[Any, Any]]) -> None:
        self._load = partial(load, path)
        self._pair: tuple[Any, Any] | None = None

    def get(self) -> tuple[Any, Any]:
        if self._pair is None:
            self._pair = self._load()
        return self._pair


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
