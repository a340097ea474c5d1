"""Needles over lengths and depths; the work behind ``eval.py recipe=passkey``.

Notable: every answer is a line on disk as soon as it is there, under a name made of all that it depends on, so a killed
evaluation continues, longer lists of lengths and more samples keep what is done, and no answer ever appears under
another protocol. Under torchrun the processes share the samples.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig

from evaluation.arithmetic import arithmetic, versions
from evaluation.cache_memory import check_memory
from evaluation.compatibility import TokenizedCorpus, check_length, check_tokens
from evaluation.gathering import gather, joined
from evaluation.loading import load_model
from evaluation.model_paths import HUB, identity_of, named_models
from evaluation.passkey.haystack import answer_sample, chunk_memory, read_haystack
from evaluation.passkey.report import length_rows, publish
from evaluation.peak_memory import PeakMemory
from evaluation.prediction_log import PredictionLog
from evaluation.processes import Process
from evaluation.results import digest
from evaluation.scoring import TokenStream, scoring_mode
from evaluation.token_progress import TokenProgress

Dtype = Literal["float32", "bfloat16", "float16"]


class PasskeyTask:
    """Ask models for needles in haystacks of several lengths.

    Args:
        models: a model folder, or label -> folder; ``hub:NAME`` is a model of the hub. They must retrieve.
        corpus: text of the haystacks; one shorter than a length is repeated.
        needles: builds the task for a model path (`datamodules.needle_task.model_needle_task`); all models get the
            samples of the first.
        lengths: tokens of the haystacks, cut to whole chunks where the question is aligned.
        baselines: label -> folder of models without retrieval to compare with.
        depths: grid of depths of a single needle; None draws places.
        num_samples: samples for each length (and depth of the grid).
        seed: of values and places.
        segment_length: tokens of a forward call.
        offload: keep the chunk memory in host memory.
        dtype: of weights and arithmetic.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.
        progress: show a progress bar on the error stream.

    Raises:
        ValueError: an option out of range, needles that do not fit, a length that does not fit the memory, or a model
            that does not retrieve.
        FileNotFoundError: a model does not exist.
    """

    def __init__(
        self,
        models: dict[str, str] | str,
        corpus: TokenizedCorpus,
        needles: Callable[..., Any],
        lengths: list[int],
        *,
        baselines: dict[str, str] | None = None,
        depths: list[float] | None = None,
        num_samples: int = 10,
        seed: int = 0,
        segment_length: int = 16384,
        offload: bool = True,
        dtype: Dtype = "float32",
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        retrieving = named_models(models)
        others = named_models(baselines) if baselines else {}
        self.models = retrieving | others
        if len(self.models) < len(retrieving) + len(others):
            raise ValueError(f"models and baselines share a label: {sorted(retrieving.keys() & others.keys())}")
        self.corpus, self.stream = corpus, TokenStream.open(corpus)
        self.depths, self.num_samples, self.seed = depths, num_samples, seed
        self.segment_length, self.offload, self.dtype = segment_length, offload, dtype
        self._check_options(lengths)
        self.configs = {label: _config(path) for label, path in self.models.items()}
        check_retrieval({label: self.configs[label] for label in retrieving})
        self.task = needles(model_path=next(iter(retrieving.values())))
        self.lengths = self._whole_chunks(lengths)
        self.process = Process.current()
        self.device = self.process.device(device, dtype)
        self.progress = progress and self.process.is_first
        self._check_models()

    def run(self, output: Path) -> dict[str, Any] | None:
        """Answer what is missing in ``output``; write metrics, table and figure; return the metrics and the table.

        Files: ``answers/<model>-<protocol>/rank<i>.jsonl`` (one line per sample), ``metrics.json``, ``passkey.csv``,
        ``predictions.jsonl``, ``passkey.png``. Under torchrun only the first process writes and returns the metrics.
        """
        rows, described, answers = [], {}, []
        with joined(self.process):
            for label, path in self.models.items():
                described[label] = {
                    "path": path,
                    "identity": identity_of(path),
                    "tokenizer": self._compare(path, label),
                }
                request = digest(self._protocol() | {"model": described[label]["identity"]})[:12]
                folder = output / "answers" / f"{re.sub(r'[^A-Za-z0-9._+-]+', '_', label)}-{request}"
                found = self._answers(path, folder)
                if self.process.is_first:
                    rows += [
                        {"model": label} | row for row in length_rows(found, self.lengths, self.depths, self._wanted())
                    ]
                    answers += [{"model": label} | found[key] for key in sorted(found) if key in self._wanted()]
        if not self.process.is_first:
            return None
        return self._publish(rows, described, answers, output)

    def _answers(self, path: str, folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return the answers of a model by (length, index), computing those that are missing."""
        log = PredictionLog(folder / f"rank{self.process.rank}.jsonl", ("length", "index"))
        done = set().union(*gather(set(_read_all(folder)), self.process))
        missing = [key for key in self._wanted() if key not in done]
        mine = missing[self.process.rank :: self.process.world_size]
        if mine:
            dtype = getattr(torch, self.dtype)
            model = load_model(path.removeprefix(HUB), dtype=dtype, device=self.device)
            total = sum(self.lengths[length] for length, _ in mine)
            bar = TokenProgress(Path(path).parent.name or path, total, show=self.progress)
            with scoring_mode(model, None), chunk_memory(model, offload=self.offload), bar as report:
                for length, index in mine:
                    log.add(self._answer(model, length, index, report))
        gather(None, self.process)
        return _read_all(folder)

    def _answer(self, model: Any, length: int, index: int, report: Callable[[int], None]) -> dict[str, Any]:
        num_tokens = self.lengths[length]
        depth = None if self.depths is None else self.depths[index % len(self.depths)]
        haystack = read_haystack(self.stream, index, num_tokens)
        sample = self.task.build(haystack, seed=self.seed, index=index, depth=depth)
        start = time.perf_counter()
        with PeakMemory(self.device) as memory:
            found = answer_sample(model, sample, segment_length=self.segment_length, report=report)
            peak = memory.bytes()
        place = {"length": length, "num_tokens": num_tokens, "index": index, "depth": depth}
        return place | found | {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}

    def _wanted(self) -> list[tuple[int, int]]:
        count = self.num_samples * len(self.depths or [None])
        return [(length, index) for length in self.lengths for index in range(count)]

    def _publish(
        self, rows: list[dict[str, Any]], described: dict[str, Any], answers: list[dict[str, Any]], output: Path
    ) -> dict[str, Any]:
        protocol = self._protocol() | self._circumstances()
        metrics = {"task": "passkey", "protocol": protocol, "models": described, "results": rows}
        return publish(metrics, answers, output, kind=str(self.task.kind), remarks=self._remarks())

    def _remarks(self) -> list[str]:
        longest = max(self.lengths.values())
        if longest <= self.stream.num_tokens:
            return []
        times = longest / self.stream.num_tokens
        return [
            f"the text has {self.stream.num_tokens:,} tokens: haystacks up to {longest:,} repeat it up to {times:.1f} "
            "times, from a different place for each sample"
        ]

    def _protocol(self) -> dict[str, Any]:
        """Everything besides model, length and sample that an answer depends on."""
        return {
            "corpus": self.corpus.identity,
            "task": self.task.identity(),
            "depths": self.depths,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "offload": self.offload,
            **arithmetic(self.device, self.dtype),
        }

    def _circumstances(self) -> dict[str, Any]:
        return {
            "num_samples": self.num_samples,
            "haystack_tokens": self.stream.num_tokens,
            "repeated": max(1.0, max(self.lengths.values()) / self.stream.num_tokens),
            "versions": versions(),
        }

    def _whole_chunks(self, lengths: Sequence[int]) -> dict[int, int]:
        """Return the tokens used for each length: whole chunks, or the last one would not begin with the question."""
        size = self.task.chunk_size if self.task.align_question else 1
        used = {length: length - length % size for length in sorted(lengths)}
        for num_tokens in used.values():
            self.task.room(num_tokens)
        return used

    def _check_models(self) -> None:
        size, longest = torch.empty(0, dtype=getattr(torch, self.dtype)).element_size(), max(self.lengths.values())
        for label, config in self.configs.items():
            chunk = getattr(config, "chunk_size", None) if retrieves(config) else None
            if chunk not in (None, self.task.chunk_size) and self.task.align_question:
                raise ValueError(
                    f"model {label} has chunks of {chunk}, the samples are made for {self.task.chunk_size}: "
                    "evaluate it by itself"
                )
            try:
                check_length(self.models[label].removeprefix(HUB), longest)
                check_memory(
                    config,
                    longest,
                    segment_length=self.segment_length,
                    itemsize=size,
                    offload=self.offload,
                    device=self.device,
                )
            except ValueError as error:
                raise ValueError(f"model {label}: {error}") from error

    def _compare(self, path: str, label: str) -> str:
        try:
            return check_tokens(path.removeprefix(HUB), self.corpus)
        except ValueError as error:
            raise ValueError(f"model {label}: {error}") from error

    def _check_options(self, lengths: Sequence[int]) -> None:
        if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
            raise ValueError(f"lengths must be different numbers from 1 up, got {lengths}")
        for name in ("num_samples", "segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depths is not None and (not self.depths or len(set(self.depths)) != len(self.depths)):
            raise ValueError(f"depths must be different numbers between 0 and 1, or null, got {self.depths}")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {self.dtype}")


def retrieves(config: Any) -> bool:
    """Whether models of this configuration look far back by retrieval."""
    return hasattr(config, "chunk_top_k")


def check_retrieval(configs: Mapping[str, Any]) -> None:
    """Refuse models that cannot retrieve where retrieval is asked for.

    Raises:
        ValueError: naming the model, and how to compare with it.
    """
    for label, config in configs.items():
        if not retrieves(config):
            raise ValueError(
                f"model {label} ({config.model_type}) retrieves nothing, so it cannot find what left its window: "
                f"compare with it as task.baselines={{{label}: FOLDER}}, or name a model with chunks"
            )


def _config(path: str) -> Any:
    return AutoConfig.from_pretrained(path.removeprefix(HUB)).get_text_config()


def _read_all(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in sorted(folder.glob("rank*.jsonl")):
        found |= PredictionLog(file, ("length", "index")).records
    return found
