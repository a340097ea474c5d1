"""Generation quality of compression methods over ratios; the work behind ``eval.py recipe=compression_generation``.

Notable: every prefix that was completed is a line of ``predictions.jsonl``, so an interrupted evaluation goes on after
it; lines that other options made are refused, not mixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from evaluation.arithmetic import arithmetic, versions
from evaluation.gathering import gather, joined, share_of
from evaluation.kv_compression.completions import Sampling, Writer
from evaluation.kv_compression.figure import save_generation_figure
from evaluation.kv_compression.models import Models, tokenizer_of
from evaluation.kv_compression.scorers import Scorers
from evaluation.kv_compression.sweep import markdown_table
from evaluation.loading import max_positions, tokenizer_identity
from evaluation.prediction_log import PredictionLog
from evaluation.processes import Process
from evaluation.results import csv_text, digest, json_text, read_json, text_table, write_json, write_text
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
        self.process = Process.current()
        self.device, self.dtype = self.process.device(device, dtype), dtype
        self.models = Models(models, sentinels=sentinels, seed=self.sampling.seed)
        self.models.check(self.plan())
        self.tokenizer, self.make_prefixes = tokenizer, prefixes
        self.scorers = Scorers(
            judge,
            bertscore,
            tokenizer=tokenizer,
            seed=self.sampling.seed,
            dtype=getattr(torch, dtype),
            device=self.device,
        )
        self.prefixes: list[tuple[str, str]] = []

    def plan(self) -> list[tuple[Any, float]]:
        """Return the cells, ratio by ratio."""
        cells: list[tuple[Any, float]] = []
        for ratio in self.ratios:
            cells += [(method, ratio) for method in self.methods] if ratio else [("dense", 0.0)]
        return cells

    def run(self, output: Path) -> dict[str, Any] | None:
        """Complete and score what is missing in ``output``; write table and figure; return them.

        Files: ``prefixes.jsonl``, ``predictions.jsonl`` (a line per method, ratio and prefix; of further processes
        ``predictions.rank<i>.jsonl`` until all are there), ``cells/<method>_<ratio>.json`` (scores), ``metrics.json``,
        ``table.csv``, ``table.md``, ``figure.png``, ``figure.svg``. Under torchrun the processes share the prefixes,
        and only the first writes and returns the metrics.

        Raises:
            ValueError: the folder holds predictions of other options, or a model cannot take the prefixes.
        """
        self.prefixes = [(str(text), str(reference)) for text, reference in self.make_prefixes()]
        identities, protocol = self.models.identities(self.plan()), self.protocol()
        tokenizers = self._tokenizers()
        requests = {
            cell: digest(protocol | {"model": identities[f"{cell[0]} {cell[1]}"], "tokenizer": tokenizers[cell]})
            for cell in self.plan()
        }
        with joined(self.process):
            self._complete(output, requests)
            self.models.release()
            records = read_logs(output)
            rows = self._scores(output / "cells", records, requests)
        if not self.process.is_first:
            return None
        self._keep(records, output)
        described = protocol | self.scorers.identity | {"models": identities, "versions": versions()}
        metrics = {"task": "compression_generation", "protocol": described, "results": rows}
        write_json(output / "metrics.json", metrics)
        write_text(output / "table.csv", csv_text(rows, COLUMNS))
        write_text(output / "table.md", markdown_table(rows, SHOWN))
        save_generation_figure(rows, output)
        return metrics | {"table": text_table(rows, SHOWN)}

    def _tokenizers(self) -> dict[tuple[Any, float], str]:
        """Return what tells the tokenizers of the cells apart."""
        sources = {cell: self.tokenizer or self.models.source(*cell) for cell in self.plan()}
        known = {source: tokenizer_identity(tokenizer_of(source)) for source in set(sources.values())}
        return {cell: known[source] for cell, source in sources.items()}

    def _keep(self, records: dict[tuple[Any, ...], dict[str, Any]], output: Path) -> None:
        """Write prefixes and predictions in their order, whoever made them; those outside of the plan come last."""
        pairs = [{"example": i, "prefix": p, "reference": r} for i, (p, r) in enumerate(self.prefixes)]
        write_text(output / "prefixes.jsonl", "".join(json_text(pair) + "\n" for pair in pairs))
        planned = [(*cell, example) for cell in self.plan() for example in range(len(self.prefixes))]
        ordered = {key: records[key] for key in planned} | records
        write_text(output / "predictions.jsonl", "".join(json_text(record) + "\n" for record in ordered.values()))
        for file in output.glob("predictions.rank*.jsonl"):
            file.unlink()

    def protocol(self) -> dict[str, Any]:
        """Everything that a prediction depends on besides its model."""
        return {
            "prefixes": digest(self.prefixes),
            "num_prefixes": len(self.prefixes),
            "sampler": asdict(self.sampler) | {"compression_ratio": None},
            "sampling": asdict(self.sampling),
            **arithmetic(self.device, self.dtype),
        }

    def _complete(self, output: Path, requests: Mapping[tuple[Any, float], str]) -> None:
        """Complete this process's share of the prefixes that have no line yet."""
        records, missing = read_logs(output), []
        for cell, request in requests.items():
            for example in range(len(self.prefixes)):
                record = records.get((*cell, example))
                if record is None:
                    missing.append((cell, example))
                elif record.get("request") != request:
                    raise ValueError(
                        f"{output} holds completions by {cell[0]} at {cell[1]} of other options, another model, text "
                        "or version: pass another output folder"
                    )
        log, writers = own_log(output, self.process), {}
        for cell, example in share_of(missing, self.process):
            if cell not in writers:
                writers = {cell: self._writer(cell)}
            named = {"method": cell[0], "nominal_ratio": cell[1], "example": example, "request": requests[cell]}
            prefix, options = self.prefixes[example][0], {"method": cell[0], "compression_ratio": cell[1]}
            log.add(named | writers[cell].write(prefix, **options, example=example))
        gather(None, self.process)

    def _writer(self, cell: tuple[Any, float]) -> Writer:
        model, sentinels = self.models.load(*cell, dtype=getattr(torch, self.dtype), device=self.device)
        tokenizer = tokenizer_of(self.tokenizer or self.models.source(*cell))
        limit, longest = max_positions(model.config), max(self.prefixes, key=lambda pair: len(pair[0]))[0]
        needed = len(tokenizer(longest, add_special_tokens=False).input_ids) + self.sampling.max_new_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"the longest prefix and max_new_tokens={self.sampling.max_new_tokens} are {needed} tokens, the model "
                f"of {cell[0]} takes {limit}: lower task.prefixes.prefix_words or task.sampling.max_new_tokens"
            )
        return Writer(model, tokenizer, sentinels, self.sampler, self.sampling)

    def _scores(
        self,
        folder: Path,
        records: Mapping[tuple[Any, ...], dict[str, Any]],
        requests: Mapping[tuple[Any, float], str],
    ) -> list[dict[str, Any]]:
        """Return the scores of all cells, from their files where they are there already."""
        keys = {cell: digest({"request": request} | self.scorers.identity) for cell, request in requests.items()}
        files = {cell: folder / f"{cell[0]}_{cell[1]}.json" for cell in requests}
        missing = [cell for cell, file in files.items() if not file.is_file() or _request(file) != keys[cell]]
        for cell in share_of(missing, self.process):
            made = [records[*cell, example] for example in range(len(self.prefixes))]
            write_json(files[cell], self._row(cell, made) | {"request": keys[cell]})
        gather(None, self.process)
        return [read_json(file) for file in files.values()]

    def _row(self, cell: tuple[Any, float], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the scores of the completions of a cell."""
        texts = [text for record in records for text in record["completions"]]
        references = [reference for _, reference in self.prefixes for _ in range(self.sampling.num_samples)]
        tokens = [count for record in records for count in record["num_tokens"]]
        row: dict[str, Any] = {"method": cell[0], "nominal_ratio": cell[1]}
        row["achieved_ratio"] = math.fsum(record["achieved_ratio"] for record in records) / len(records)
        row |= self.scorers.score(texts, references)
        row |= {"num_texts": len(texts), "tokens_per_text": sum(tokens) / len(tokens)}
        row["peak_entries"] = max(record["peak_entries"] for record in records)
        return row | {name: sum(record[name] for record in records) for name in ("num_dropped", "seconds")}


def own_log(output: Path, process: Process) -> PredictionLog:
    """Return the file that a process appends to."""
    name = "predictions.jsonl" if process.is_first else f"predictions.rank{process.rank}.jsonl"
    return PredictionLog(output / name, KEYS)


def read_logs(output: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the records of all processes."""
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in sorted(output.glob("predictions*.jsonl")):
        records |= PredictionLog(file, KEYS).records
    return records


def _request(file: Path) -> Any:
    return read_json(file).get("request")
