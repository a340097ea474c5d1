"""Generation quality of compression methods over ratios; the work behind ``eval.py recipe=compression_generation``.

Notable: every prefix that was completed is a line of ``predictions.jsonl``, so an interrupted evaluation goes on after
it; lines that other options made are refused, not mixed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from evaluation.generation_quality.bert_score import BertScore
from evaluation.generation_quality.scores import judge_perplexity, score_generations
from evaluation.kv_compression.completions import Sampling, Writer
from evaluation.kv_compression.figure import save_generation_figure
from evaluation.kv_compression.models import Model, Models, built, identity
from evaluation.kv_compression.sweep import markdown_table
from evaluation.loading import load_model, load_tokenizer, max_positions
from evaluation.model_paths import HUB
from evaluation.prediction_log import PredictionLog
from evaluation.results import (
    csv_text,
    digest,
    git_commit,
    json_text,
    read_json,
    text_table,
    write_json,
    write_text,
)
from evaluation.scoring import choose_device
from patches.compressed_rows import METHODS
from patches.sentinel.sampler import SpanSampler
from patches.sentinel.sentinels import Sentinels

KEYS = ("method", "nominal_ratio", "example")
COLUMNS = (
    "method",
    "nominal_ratio",
    "achieved_ratio",
    "rougeL",
    "bertscore_f1",
    "judge_perplexity_mean_text",
    "judge_perplexity_corpus",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "distinct_4",
    "repetition",
    "num_texts",
    "tokens_per_text",
    "peak_entries",
    "num_dropped",
    "seconds",
)
SHOWN = tuple(
    name for name in COLUMNS if name not in ("judge_perplexity_corpus", "distinct_1", "distinct_3", "seconds")
)


class CompressionGeneration:
    """Complete prefixes under compression methods and score what was written.

    Args:
        models: a model folder, or folders by method (``default`` for those not named); ``RATIO`` in a path stands for
            the ratio, as in ``runs/sentinel_RATIO/model``. A function that builds a model takes a path's place.
        prefixes: makes pairs of a prefix and what follows it, see `preprocess.prefixes.document_prefixes`.
        tokenizer: folder, or a function that returns a tokenizer; None: the model folder's.
        sentinels: of a model that is built; folders have their own.
        ratios: fractions removed; 0 is one dense cell for all methods.
        methods: methods to compare.
        sampler: chooses the spans of a prefix, its ratio aside.
        sampling: how completions are drawn.
        judge: causal LM that scores completions: folder, ``hub:NAME`` or function; None: no judge.
        bertscore: options of `evaluation.generation_quality.bert_score.BertScore`; None: no BERTScore.
        dtype: of weights and arithmetic.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: a ratio outside [0, 1), an unknown method, or nothing to do.
        FileNotFoundError: a model does not exist.
    """

    def __init__(
        self,
        models: Any,
        prefixes: Callable[[], Sequence[tuple[str, str]]],
        *,
        tokenizer: str | Callable[[], Any] | None = None,
        sentinels: Sentinels | None = None,
        ratios: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        methods: Sequence[str] = ("sentinel", "local", "scattered", "streaming"),
        sampler: SpanSampler | None = None,
        sampling: Sampling | None = None,
        judge: str | Callable[[], Any] | None = None,
        bertscore: Mapping[str, Any] | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
    ):
        if not (ratios and methods) or len(set(ratios)) != len(ratios) or len(set(methods)) != len(methods):
            raise ValueError(f"ratios and methods need different entries, got {list(ratios)} and {list(methods)}")
        if not all(0 <= ratio < 1 for ratio in ratios):
            raise ValueError(f"ratios are fractions removed, in [0, 1), got {list(ratios)}")
        if not set(methods) <= set(METHODS[:-1]):
            raise ValueError(f"methods are of {', '.join(METHODS[:-1])}, got {list(methods)}; dense is ratio 0")
        self.ratios, self.methods = sorted(ratios), list(methods)
        self.sampler, self.sampling = sampler or SpanSampler(), sampling or Sampling()
        self.device, self.dtype = choose_device(device, dtype), dtype
        self.models = Models(models, sentinels=sentinels, seed=self.sampling.seed)
        self.models.check(self.plan())
        self.tokenizer, self.make_prefixes, self.judge = tokenizer, prefixes, judge
        self.bertscore = dict(bertscore) if bertscore else None
        self._judging: Callable[[Sequence[str]], dict[str, Any]] | None = None
        self._bertscore: BertScore | None = None
        self.prefixes: list[tuple[str, str]] = []

    def plan(self) -> list[tuple[Any, float]]:
        """Return the cells, ratio by ratio."""
        cells: list[tuple[Any, float]] = []
        for ratio in self.ratios:
            cells += [(method, ratio) for method in self.methods] if ratio else [("dense", 0.0)]
        return cells

    def run(self, output: Path) -> dict[str, Any]:
        """Complete and score what is missing in ``output``; write table and figure; return them.

        Files: ``prefixes.jsonl``, ``predictions.jsonl`` (a line per method, ratio and prefix),
        ``cells/<method>_<ratio>.json`` (scores), ``metrics.json``, ``table.csv``, ``table.md``, ``figure.png``,
        ``figure.svg``.

        Raises:
            ValueError: the folder holds predictions of other options, or a model cannot take the prefixes.
        """
        self.prefixes = [(str(text), str(reference)) for text, reference in self.make_prefixes()]
        identities, log = self.models.identities(self.plan()), PredictionLog(output / "predictions.jsonl", KEYS)
        protocol = self.protocol()
        requests = {cell: digest(protocol | {"model": identities[f"{cell[0]} {cell[1]}"]}) for cell in self.plan()}
        pairs = [{"example": i, "prefix": p, "reference": r} for i, (p, r) in enumerate(self.prefixes)]
        write_text(output / "prefixes.jsonl", "".join(json_text(pair) + "\n" for pair in pairs))
        for cell in self.plan():
            self._complete(log, cell, requests[cell])
        self.models.release()
        rows = [self._scores(output / "cells", log, cell, requests[cell]) for cell in self.plan()]
        scorers = {"judge": self.judge and identity(self.judge, self.sampling.seed), "bertscore": self.bertscore}
        described = protocol | scorers | {"models": identities, "versions": versions()}
        metrics = {"task": "compression_generation", "protocol": described, "results": rows}
        write_json(output / "metrics.json", metrics)
        write_text(output / "table.csv", csv_text(rows, COLUMNS))
        write_text(output / "table.md", markdown_table(rows, SHOWN))
        save_generation_figure(rows, output)
        return metrics | {"table": text_table(rows, SHOWN)}

    def protocol(self) -> dict[str, Any]:
        """Everything that a prediction depends on besides its model."""
        return {
            "prefixes": digest(self.prefixes),
            "num_prefixes": len(self.prefixes),
            "sampler": asdict(self.sampler) | {"compression_ratio": None},
            "sampling": asdict(self.sampling),
            "dtype": self.dtype,
            "device": self.device.type,
        }

    def _complete(self, log: PredictionLog, cell: tuple[Any, float], request: str) -> None:
        """Complete the prefixes that have no line yet; the model is loaded only if there are any."""
        method, ratio = cell
        writer = None
        for example, (prefix, _) in enumerate(self.prefixes):
            record = log.get(method, ratio, example)
            if record is None:
                writer = self._writer(cell) if writer is None else writer
                written = writer.write(prefix, method=method, compression_ratio=ratio, example=example)
                named = {"method": method, "nominal_ratio": ratio, "example": example, "request": request}
                log.add(named | written)
            elif record.get("request") != request:
                raise ValueError(
                    f"{log.path} holds completions by {method} at {ratio} of other options, another model or text: "
                    "pass another output folder"
                )

    def _writer(self, cell: tuple[Any, float]) -> Writer:
        model, sentinels = self.models.load(*cell, dtype=getattr(torch, self.dtype), device=self.device)
        tokenizer = self._tokenizer(self.tokenizer or self.models.source(*cell))
        limit, longest = max_positions(model.config), max(self.prefixes, key=lambda pair: len(pair[0]))[0]
        needed = len(tokenizer(longest, add_special_tokens=False).input_ids) + self.sampling.max_new_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"the longest prefix and max_new_tokens={self.sampling.max_new_tokens} are {needed} tokens, the model "
                f"of {cell[0]} takes {limit}: lower task.prefixes.prefix_words or task.sampling.max_new_tokens"
            )
        return Writer(model, tokenizer, sentinels, self.sampler, self.sampling)

    def _tokenizer(self, source: Model) -> Any:
        """Return the tokenizer of a folder, or what a function returns.

        Raises:
            ValueError: there is none.
        """
        found = load_tokenizer(source.removeprefix(HUB)) if isinstance(source, str) else source()
        if not callable(getattr(found, "batch_decode", None)):
            raise ValueError(f"{source} has no tokenizer (tokenizer.json): name one with task.tokenizer=FOLDER")
        return found

    def _scores(self, folder: Path, log: PredictionLog, cell: tuple[Any, float], request: str) -> dict[str, Any]:
        """Return the scores of a cell, from its file where they are there already."""
        method, ratio = cell
        scorers = {"judge": self.judge and identity(self.judge, self.sampling.seed), "bertscore": self.bertscore}
        file, key = folder / f"{method}_{ratio}.json", digest({"request": request} | scorers)
        if file.is_file() and (row := read_json(file)).get("request") == key:
            return row
        records = [log.records[method, ratio, example] for example in range(len(self.prefixes))]
        texts = [text for record in records for text in record["completions"]]
        references = [reference for _, reference in self.prefixes for _ in range(self.sampling.num_samples)]
        tokens = [count for record in records for count in record["num_tokens"]]
        row = {"method": method, "nominal_ratio": ratio}
        row["achieved_ratio"] = sum(record["achieved_ratio"] for record in records) / len(records)
        row |= score_generations(texts, references, judge=self._judge(), bertscore=self._likeness())
        row |= {"num_texts": len(texts), "tokens_per_text": sum(tokens) / len(tokens)}
        row["peak_entries"] = max(record["peak_entries"] for record in records)
        row |= {name: sum(record[name] for record in records) for name in ("num_dropped", "seconds")}
        write_json(file, row | {"request": key})
        return row | {"request": key}

    def _judge(self) -> Callable[[Sequence[str]], dict[str, Any]] | None:
        """Return the judge, loaded when it is first asked for."""
        if self.judge is None:
            return None
        if self._judging is None:
            judge = self.judge
            if isinstance(judge, str):
                model = load_model(judge.removeprefix(HUB), dtype=getattr(torch, self.dtype), device=self.device)
            else:
                model = built(judge, self.sampling.seed).to(self.device).eval()
            named = judge if isinstance(judge, str) else self.tokenizer
            if named is None:
                raise ValueError("a judge that is built needs task.tokenizer")
            tokenizer = self._tokenizer(named)
            self._judging = lambda texts: judge_perplexity(
                model, [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            )
        return self._judging

    def _likeness(self) -> BertScore | None:
        if self.bertscore is not None and self._bertscore is None:
            self._bertscore = BertScore(**{"device": str(self.device)} | self.bertscore)
        return self._bertscore


def versions() -> dict[str, str | None]:
    """Return versions of what computed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git_commit(),
    }
