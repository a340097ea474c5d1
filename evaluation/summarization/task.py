"""Summaries that a model writes, scored by ROUGE; the work behind ``eval.py recipe=summarization``.

Notable: which prompts share a batch is fixed by the data, each finished batch is noted at once, and under torchrun the
processes share the batches, so killed, resumed and distributed evaluations write the same summaries.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from transformers import AutoConfig

from evaluation.arithmetic import device_name, versions
from evaluation.compatibility import check_length
from evaluation.gathering import joined
from evaluation.loading import load_model, load_tokenizer
from evaluation.model_paths import HUB, check_model, label_of, writer_identity_of
from evaluation.processes import Process
from evaluation.rank_journal import RankJournal
from evaluation.results import digest, json_text, text_table, write_json, write_text
from evaluation.rouge import NAMES, pair_scores
from evaluation.summarization.decoding import Decoding, generate_batch
from evaluation.token_progress import TokenProgress

Dtype = Literal["float32", "bfloat16", "float16"]
PUBLISHED = tuple(f"{name}_published_bpe" for name in NAMES)
SHOWN = ("model", "num_pairs", *NAMES, "ended", "new_tokens")


class Pairs(Protocol):
    """Documents with their summaries; ``datamodules.summary_store.SummaryStore`` has what is needed."""

    path: Path

    @property
    def identity(self) -> str:
        """Hash of content and options."""

    @property
    def eos_token_id(self) -> int:
        """Ends a summary."""

    def __len__(self) -> int: ...

    def made_by(self, tokenizer: Any) -> bool:
        """Say whether a tokenizer made the pairs."""

    def prompts(self, count: int, **options: Any) -> list[np.ndarray]:
        """Return the first so many prompts, laid out as the options say."""

    def texts(self) -> list[dict[str, str]]:
        """Return ``{"id", "summary"}`` of every pair."""

    def reference(self, number: int) -> list[int]:
        """Return the tokens of a summary."""


class SummarizationTask:
    """Write a summary of every document of a split and compare it with the reference.

    Args:
        model_path: model folder, or ``hub:NAME``; its tokenizer must be that of the pairs.
        pairs: documents with their summaries.
        max_length: tokens of prompt and summary together; documents are cut at their end.
        max_new_tokens: tokens of a summary at most.
        alignment: how the end of a prompt comes to open a chunk: ``pad`` in front, ``trim`` the document, or ``none``;
            None: ``pad`` for models with chunks, else ``none``.
        batch_size: prompts of a batch.
        max_pairs: only the first so many pairs; None: all.
        temperature: 0 takes the likeliest token, above tokens are drawn.
        top_k: draw among so many of the likeliest.
        seed: of the draws.
        stemmer: compare stems of words instead of words.
        parity: ``published`` adds the published scores over byte-pair tokens.
        dtype: of weights and arithmetic.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.
        progress: show a progress bar on the error stream.

    Raises:
        ValueError: an option out of range.
        FileNotFoundError: there is no such model.
    """

    def __init__(
        self,
        model_path: str,
        pairs: Pairs,
        *,
        max_length: int = 4096,
        max_new_tokens: int = 128,
        alignment: Literal["pad", "trim", "none"] | None = None,
        batch_size: int = 8,
        max_pairs: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 1,
        stemmer: bool = False,
        parity: Literal["published"] | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_pairs", max_pairs), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if parity not in (None, "published"):
            raise ValueError(f"parity is published or null, got {parity}")
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {dtype}")
        check_model(model_path, "to be evaluated")
        self.model_path, self.pairs, self.max_length = model_path, pairs, max_length
        self.decoding = Decoding(max_new_tokens, temperature, top_k, seed)
        self.alignment, self.batch_size, self.max_pairs = alignment, batch_size, max_pairs
        self.stemmer, self.parity, self.dtype = stemmer, parity, dtype
        self.process = Process.current()
        self.device = self.process.device(device, dtype)
        self.progress = progress and self.process.is_first

    def run(self, output: Path) -> dict[str, Any] | None:
        """Write what is missing in ``output``; score; return the metrics and a table.

        Files: ``predictions.jsonl`` (summary, reference and scores of every pair), ``metrics.json``, and
        ``generated/`` with the tokens of finished batches. Under torchrun only the first process writes and returns.

        Raises:
            ValueError: model and pairs have different tokenizers, or the rows leave no room for a document.
        """
        name = self.model_path.removeprefix(HUB)
        tokenizer = load_tokenizer(name)
        if tokenizer is None or not self.pairs.made_by(tokenizer):
            raise ValueError(
                f"the pairs in {self.pairs.path} were made with another tokenizer than the model's: make them with "
                f"python -m preprocess.summarization --tokenizer {name}"
            )
        check_length(name, self.max_length)
        config = AutoConfig.from_pretrained(name).get_text_config()
        protocol = self._protocol(getattr(config, "chunk_size", None), config.pad_token_id)
        journal = RankJournal(output / "generated" / digest(protocol)[:12], self.process.rank)
        with joined(self.process):
            self._generate(protocol, tokenizer, journal)
            if self.process.world_size > 1:
                torch.distributed.barrier()
        if not self.process.is_first:
            return None
        tokens = dict(journal.read())
        return self._publish([tokens[index] for index in range(self._num_pairs())], tokenizer, protocol, output=output)

    def batches(self, prompts: list[Any]) -> list[list[int]]:
        """Return the numbers of the pairs of every batch: the longest prompts first, neighbours of like length."""
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _generate(self, protocol: dict[str, Any], tokenizer: Any, journal: RankJournal) -> None:
        """Write the summaries of this process's batches that nobody has written yet."""
        names = ("max_length", "chunk_size", "alignment", "pad_token_id")
        layout = {name: protocol[name] for name in names} | {"max_new_tokens": self.decoding.max_new_tokens}
        prompts = self.pairs.prompts(self._num_pairs(), **layout)
        done = {index for index, _ in journal.read()}
        batches = self.batches(prompts)
        mine = [b for b in range(self.process.rank, len(batches), self.process.world_size) if set(batches[b]) - done]
        if not mine:
            return
        model = load_model(self.model_path.removeprefix(HUB), dtype=getattr(torch, self.dtype), device=self.device)
        forbidden = _forbidden(model.config.get_text_config(), len(tokenizer))
        total = sum(len(prompts[index]) for number in mine for index in batches[number])
        with TokenProgress("summarising", total, show=self.progress) as advance:
            for number in mine:
                written = generate_batch(
                    model,
                    [prompts[index] for index in batches[number]],
                    self.decoding,
                    number=number,
                    eos_token_id=self.pairs.eos_token_id,
                    forbidden=forbidden,
                )
                journal.append(list(entry) for entry in zip(batches[number], written, strict=True))
                advance(sum(len(prompts[index]) for index in batches[number]))

    def _protocol(self, chunk_size: int | None, pad_token_id: int | None) -> dict[str, Any]:
        """Everything that the summaries depend on."""
        return {
            "model": writer_identity_of(self.model_path),
            "pairs": self.pairs.identity,
            "num_pairs": self._num_pairs(),
            "max_length": self.max_length,
            "chunk_size": chunk_size,
            "alignment": self.alignment or ("none" if chunk_size is None else "pad"),
            "pad_token_id": self.pairs.eos_token_id if pad_token_id is None else pad_token_id,
            "decoding": asdict(self.decoding),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "device": device_name(self.device),
            "versions": versions(),
        }

    def _num_pairs(self) -> int:
        return min(len(self.pairs), self.max_pairs or len(self.pairs))

    def _publish(
        self, written: list[list[int]], tokenizer: Any, protocol: dict[str, Any], *, output: Path
    ) -> dict[str, Any]:
        texts = self.pairs.texts()[: len(written)]
        rows = [self._row(i, tokens, texts[i], tokenizer) for i, tokens in enumerate(written)]
        names = (*NAMES, *(PUBLISHED if self.parity else ()), "ended", "new_tokens")
        means = {name: sum(float(row[name]) for row in rows) / len(rows) for name in names}
        write_text(output / "predictions.jsonl", "".join(json_text(row) + "\n" for row in rows))
        protocol = protocol | {
            "rouge": "mean F1 of runs of [a-z0-9] in lower case, counts clipped, rougeL over the whole text",
            "stemmer": self.stemmer,
            "parity": self.parity,
            "processes": self.process.world_size,
        }
        metrics = {"task": "summarization", "model": self.model_path, "protocol": protocol}
        metrics |= {"results": {"num_pairs": len(rows), **means}}
        write_json(output / "metrics.json", metrics)
        shown = (*SHOWN, *PUBLISHED) if self.parity else SHOWN
        row = {"model": label_of(self.model_path), "num_pairs": len(rows), **means}
        return metrics | {"table": text_table([row], shown)}

    def _row(self, index: int, tokens: list[int], text: dict[str, str], tokenizer: Any) -> dict[str, Any]:
        ended = bool(tokens) and tokens[-1] == self.pairs.eos_token_id
        kept = tokens[: len(tokens) - ended]
        prediction = tokenizer.decode(kept, skip_special_tokens=True).strip()
        row = {"index": index, "id": text["id"], "prediction": prediction, "reference": text["summary"]}
        row |= {"new_tokens": len(tokens), "ended": ended}
        row |= pair_scores(prediction, text["summary"], stemmer=self.stemmer)
        if self.parity:
            wanted = self.pairs.reference(index)
            pieces = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (kept, wanted)]
            row |= dict(zip(PUBLISHED, pair_scores(*pieces, variant="published_bpe").values(), strict=True))
        return row


def _forbidden(config: Any, num_text_ids: int) -> list[int]:
    """Ids that are no text: padding, landmarks, rows of the embedding behind the tokenizer's last token."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = [getattr(config, name, None) for name in ("pad_token_id", "landmark_token_id")]
    named = {int(token) for token in special if token is not None and token not in ends}
    return sorted(named | set(range(num_text_ids, config.vocab_size)))
