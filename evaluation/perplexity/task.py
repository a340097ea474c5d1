"""Perplexity of models over context lengths on one set of targets; the work behind ``eval.py recipe=perplexity``.

Notable: each finished (model, length) is a file named by everything that determines its number, and its batches are
noted on the way, so a killed evaluation continues, a changed one recomputes only what changed, and no number ever
appears under another protocol. Under torchrun the processes share the batches and the numbers stay the same.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig

from evaluation.arithmetic import device_name, versions
from evaluation.cache_memory import check_memory
from evaluation.compatibility import TokenizedCorpus, check_length, check_tokens
from evaluation.gathering import gather, joined
from evaluation.loading import load_model
from evaluation.model_paths import HUB, identity_of, named_models
from evaluation.peak_memory import PeakMemory
from evaluation.perplexity.journal import Journal
from evaluation.perplexity.reading import Reading
from evaluation.perplexity.report import publish
from evaluation.perplexity.stream import score_stream
from evaluation.processes import Process
from evaluation.results import digest, read_json, write_json

Dtype = Literal["float32", "bfloat16", "float16", "bfloat16-mixed"]


class PerplexityTask:
    """Evaluate one or several models at several context lengths on identical targets.

    Args:
        models: a model folder (``save_pretrained``), or label -> folder; ``hub:NAME`` is a model of the hub.
        corpus: tokens to score (``datamodules.corpus.open_corpus``).
        lengths: context lengths (windows) to score at.
        stride: distance of the windows' starts, at most the shortest length; None: windows do not overlap.
        max_tokens: score only the first so many tokens.
        batch_tokens: tokens of a forward, at least one window.
        segment_length: longer windows are read in pieces of so many tokens through the model's cache, where it has
            one, so that memory does not grow with the logits; null: one forward for every window.
        offload: keep the chunk memory of models that have one in host memory.
        parity: ``published`` adds ``published_mean_loss``, the mean loss that published scripts print as perplexity.
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
        segment_length: int | None = 16384,
        offload: bool = False,
        parity: Literal["published"] | None = None,
        bos_token_id: int | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        self.models = named_models(models)
        self.corpus, self.lengths = corpus, sorted(lengths)
        self.stride, self.max_tokens, self.batch_tokens = stride, max_tokens, batch_tokens
        self.segment_length, self.offload, self.parity = segment_length, offload, parity
        self.bos_token_id, self.dtype = bos_token_id, dtype
        self._check_numbers()
        self._check_text()
        self.process = Process.current()
        self.device = self.process.device(device, dtype)
        self.progress = progress and self.process.is_first

    def run(self, output: Path) -> dict[str, Any] | None:
        """Evaluate what is missing in ``output``; write metrics, table and figures; return the metrics and the table.

        Files: ``results/*.json`` (one per model and length), ``metrics.json``, ``perplexity.csv``,
        ``predictions.jsonl`` (the sum of each window), ``perplexity_by_length.png``, ``loss_by_position.png``, of
        several models both in ``comparison.png``.
        Under torchrun only the first process writes and returns them.
        """
        with joined(self.process):
            compared = {label: self._compare(label, path) for label, path in self.models.items()}
            self._check_offload()
            described, results, protocol = {}, [], self._protocol()
            for label, path in self.models.items():
                described[label] = {"path": path, "identity": identity_of(path)}
                request = protocol | {"model": described[label]["identity"]}
                results += self._run_model(label, path, request, output / "results")
        if not self.process.is_first:
            return None
        protocol |= {"tokenizers": compared, "processes": self.process.world_size}
        return publish({"task": "perplexity", "protocol": protocol, "models": described, "results": results}, output)

    def _compare(self, label: str, path: str) -> str:
        try:
            check_length(path.removeprefix(HUB), self.lengths[-1])
            self._check_memory(AutoConfig.from_pretrained(path.removeprefix(HUB)).get_text_config())
            return check_tokens(path.removeprefix(HUB), self.corpus)
        except ValueError as error:
            raise ValueError(f"model {label}: {error}") from error

    def _run_model(self, label: str, path: str, request: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Return the results of a model, from files where they exist; it is loaded only if one is missing."""
        results, model = [], None
        for length in self.lengths:
            key = digest(request | {"length": length})[:12]
            file = folder / f"{re.sub(r'[^A-Za-z0-9._+-]+', '_', label)}-{length}-{key}.json"
            # All processes must agree on what is missing: the first one says.
            result = gather(read_json(file) if file.is_file() else None, self.process)[0]
            if result is None:
                model = self._load(path) if model is None else model
                parts = file.with_suffix(".parts")
                result = self._evaluate(model, length, Journal(parts, self.process.rank))
                if self.process.is_first:
                    write_json(file, result)
                    shutil.rmtree(parts, ignore_errors=True)
            results.append({"model": label, "length": length} | result)
        return results

    def _evaluate(self, model: Any, length: int, journal: Journal) -> dict[str, Any]:
        with PeakMemory(self.device) as memory:
            result = self._score(model, length, journal)
            return result | {"peak_memory_bytes": memory.bytes()}

    def _score(self, model: Any, length: int, journal: Journal) -> dict[str, Any]:
        reading = Reading(
            window=length,
            stride=self.stride,
            bos_token_id=self.bos_token_id,
            batch_size=max(1, self.batch_tokens // length),
            max_tokens=self.max_tokens,
            segment_length=self.segment_length,
            parity=self.parity,
        )
        return score_stream(
            model,
            self.corpus,
            reading,
            dtype=torch.bfloat16 if self.dtype == "bfloat16-mixed" else None,
            progress=self.progress,
            journal=journal,
            process=self.process,
        )

    def _load(self, path: str) -> Any:
        dtype = torch.float32 if self.dtype == "bfloat16-mixed" else getattr(torch, self.dtype)
        model = load_model(path.removeprefix(HUB), dtype=dtype, device=self.device)
        if self.offload and hasattr(model.config, "offload_chunk_memory"):
            model.config.offload_chunk_memory = True
        return model

    def _check_memory(self, config: Any) -> None:
        """Refuse a longest length whose cache would not fit; a length in one piece needs about what training does."""
        if self.segment_length is not None and self.lengths[-1] > self.segment_length:
            check_memory(
                config,
                self.lengths[-1],
                segment_length=self.segment_length,
                itemsize=4 if self.dtype.startswith(("float32", "bfloat16-")) else 2,
                offload=self.offload,
                device=self.device,
            )

    def _check_offload(self) -> None:
        paths = [path.removeprefix(HUB) for path in self.models.values()]
        if self.offload and not any(hasattr(AutoConfig.from_pretrained(p), "offload_chunk_memory") for p in paths):
            raise ValueError("offload=true has no effect: none of the models keeps a chunk memory; leave it out")

    def _protocol(self) -> dict[str, Any]:
        """Everything besides model and length that a number depends on."""
        return {
            "corpus": self.corpus.identity,
            "num_tokens": self._num_tokens(),
            "stride": self.stride,
            "bos_token_id": self.bos_token_id,
            "dtype": self.dtype,
            "batch_tokens": self.batch_tokens,
            "segment_length": self.segment_length,
            "offload": self.offload,
            "parity": self.parity,
            "device": device_name(self.device),
            # The commit among them: a killed evaluation goes on under the same code only.
            "versions": versions(),
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
        for name in ("batch_tokens", "segment_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.parity not in (None, "published"):
            raise ValueError(f"parity is published or null, got {self.parity}")
        if self.parity and (self.stride is not None or self.bos_token_id is not None):
            raise ValueError("parity=published means windows that do not overlap and no BOS: leave both options out")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {self.dtype}")
