"""Completions of a prefix by a model that keeps a shortened past of it, all samples of a prefix in one batch.

Notable: the samples of a prefix are a function of (seed, prefix), so that an interrupted evaluation goes on where it
stopped. Every method decodes over the same evicting cache, and what it holds is counted, not assumed.

Letters: P tokens of the prefix, N samples.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from patches.compressed_rows import Method
from patches.rules import causal, local
from patches.rules_dense import Rule
from patches.sentinel.context import compress
from patches.sentinel.decoding import ForgettingDecoding
from patches.sentinel.generation import SentinelGenerator
from patches.sentinel.rule_generation import RuleGenerator, read_under, scattered_share, sinks_and_share
from patches.sentinel.sampler import SpanSampler, max_compression_ratio
from patches.sentinel.sentinels import Sentinels


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn and shortened.

    Attributes:
        num_samples: completions of a prefix.
        words: words of a completion; blank-separated.
        max_new_tokens: tokens that may be drawn for them.
        top_p: nucleus.
        temperature: of the distribution.
        seed: of all draws.
        span_length: tokens folded at once while decoding.
        recent_tokens: newest tokens that are not folded.
        num_sinks: first tokens that streaming keeps.

    Raises:
        ValueError: a number out of range.
    """

    num_samples: int = 8
    words: int = 64
    max_new_tokens: int = 480
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0
    span_length: int = 16
    recent_tokens: int = 4
    num_sinks: int = 4

    def __post_init__(self) -> None:
        if min(self.num_samples, self.words, self.max_new_tokens) < 1:
            raise ValueError(
                "num_samples, words and max_new_tokens must be at least 1, "
                f"got {self.num_samples}, {self.words} and {self.max_new_tokens}"
            )
        if not 0 < self.top_p <= 1 or not self.temperature > 0:
            raise ValueError(f"top_p lies in (0, 1] and temperature above 0, got {self.top_p} and {self.temperature}")
        if self.span_length < 2 or self.recent_tokens < 0 or self.num_sinks < 0 or self.seed < 0:
            raise ValueError(
                "span_length must be at least 2, recent_tokens, num_sinks and seed at least 0, "
                f"got {self.span_length}, {self.recent_tokens}, {self.num_sinks} and {self.seed}"
            )


@dataclass
class Writer:
    """A model that continues prefixes under a compression method.

    Attributes:
        model: causal LM in evaluation mode.
        tokenizer: of its text.
        sentinels: the model's, None for none.
        sampler: chooses the spans of a prefix, its ratio aside.
        sampling: how completions are drawn.
    """

    model: Any
    tokenizer: Any
    sentinels: Sentinels | None
    sampler: SpanSampler
    sampling: Sampling

    def write(self, prefix: str, *, method: Method, compression_ratio: float, example: int) -> dict[str, Any]:
        """Complete a prefix.

        Args:
            prefix: text.
            method: how its past is shortened.
            compression_ratio: fraction of entries removed, of the prefix and while writing.
            example: its number, by which draws differ.

        Returns:
            ``completions``, ``num_tokens`` (drawn, of each), ``achieved_ratio`` (mean over steps of the fraction of
            tokens so far that is not in the cache), ``peak_entries``, ``num_dropped``, ``seconds``.

        Raises:
            ValueError: fewer than two tokens, or a sentinel method without sentinels.
        """
        ids = torch.tensor([self.tokenizer(prefix, add_special_tokens=False).input_ids], device=self.model.device)
        if ids.shape[1] < 2:
            raise ValueError(f"prefix {example} has {ids.shape[1]} tokens: two are needed")
        sampling, num_rows = self.sampling, self.model.get_input_embeddings().weight.shape[0]
        started = time.perf_counter()
        limit = WordLimit(self.tokenizer, sampling.words)
        with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []), torch.no_grad():
            generator = self.read(ids[:, :-1], method, compression_ratio, example=example)
            torch.manual_seed(_seed(sampling.seed, example))
            # The last token of the prefix is the prompt: its logits are the first to draw from.
            prompt = ids[:, -1:].expand(sampling.num_samples, -1)
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                custom_generate=generator,
                stopping_criteria=StoppingCriteriaList([limit]),
                generation_config=GenerationConfig(
                    do_sample=True,
                    top_p=sampling.top_p,
                    top_k=0,
                    temperature=sampling.temperature,
                    max_new_tokens=sampling.max_new_tokens,
                    pad_token_id=0,
                    suppress_tokens=self.banned(num_rows) or None,
                ),
            )
        tokens = ids.shape[1] + np.arange(len(generator.history))
        return {
            "completions": limit.completions,
            "num_tokens": limit.num_tokens,
            "achieved_ratio": float(np.mean(1 - np.array(generator.history) / tokens)),
            "peak_entries": max(generator.history),
            "num_dropped": generator.num_dropped,
            "seconds": time.perf_counter() - started,
        }

    def read(self, ids: Tensor, method: Method, compression_ratio: float, *, example: int) -> ForgettingDecoding:
        """Read a prefix ``[1, P]`` under a method; returns what continues it."""
        if method == "sentinel":
            if self.sentinels is None:
                raise ValueError(
                    "method sentinel needs a model with sentinels.json: export one that recipe=wikitext2_sentinel_lora "
                    "trained, or leave the method out"
                )
            sampler = replace(self.sampler, compression_ratio=compression_ratio)
            self._check_reach(sampler, ids.shape[1], example)
            draw = random.Random(f"{self.sampling.seed} {example}")
            spans = sampler(ids.shape[1], slots=self.sentinels.slots, generator=draw)
            return SentinelGenerator(
                self.sentinels,
                compression_ratio=compression_ratio,
                span_length=max(self.sampling.span_length, self.sentinels.slots + 1),
                num_sinks=0,
                recent_tokens=self.sampling.recent_tokens,
                context=compress(self.model, ids, self.sentinels, spans=[spans]),
            )
        rule = self.rule(method, compression_ratio, num_tokens=ids.shape[1], example=example)
        return RuleGenerator(rule, context=read_under(self.model, ids, rule, sentinels=self.sentinels))

    def _check_reach(self, sampler: SpanSampler, num_tokens: int, example: int) -> None:
        assert self.sentinels is not None
        options = {"min_length": sampler.min_length, "max_length": sampler.max_length, "slots": self.sentinels.slots}
        reached = max_compression_ratio(num_tokens, **options)
        if int(sampler.compression_ratio * num_tokens + 0.5) > round(reached * num_tokens):
            raise ValueError(
                f"compression_ratio={sampler.compression_ratio} is out of reach: spans of at most {sampler.max_length} "
                f"tokens remove at most {reached:.4f} of the {num_tokens} tokens of prefix {example}; lower it, or "
                "raise task.sampler.max_length"
            )

    def rule(self, method: Method, compression_ratio: float, *, num_tokens: int, example: int) -> Rule:
        """Return the rule of a baseline; all of them keep the same share at every length."""
        if method == "local":
            return local(compression_ratio)
        if method == "streaming":
            return sinks_and_share(self.sampling.num_sinks, compression_ratio)
        if method == "scattered":
            draw = torch.Generator().manual_seed(_seed(self.sampling.seed, example))
            more = self.sampling.max_new_tokens + 2
            device = self.model.device
            return scattered_share(num_tokens, more, compression_ratio, generator=draw, device=device)
        return causal()

    def banned(self, num_rows: int) -> list[int]:
        """Return the ids that are no text: special ones, and rows of the embedding without a token."""
        return sorted({*self.tokenizer.all_special_ids, *range(len(self.tokenizer), num_rows)})


class WordLimit(StoppingCriteria):
    """Stop each row after its words, and keep what it has written until then."""

    def __init__(self, tokenizer: Any, num_words: int):
        self.tokenizer, self.num_words = tokenizer, num_words
        self.completions: list[str] = []
        self.num_tokens: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Return which rows ``[N]`` have all their words; the first column is the prompt."""
        texts = self.tokenizer.batch_decode(input_ids[:, 1:], skip_special_tokens=True)
        if not self.completions:
            self.completions, self.num_tokens, self.done = [""] * len(texts), [0] * len(texts), [False] * len(texts)
        for row, text in enumerate(texts):
            if not self.done[row]:
                words = text.split()
                self.done[row] = len(words) > self.num_words or (len(words) == self.num_words and text[-1:].isspace())
                self.completions[row] = first_words(text, self.num_words)
                self.num_tokens[row] = input_ids.shape[1] - 1
        return torch.tensor(self.done, device=input_ids.device)


def first_words(text: str, num_words: int) -> str:
    """Return a text up to the end of its first words, blanks between them as they stand."""
    words = text.split()
    if len(words) <= num_words:
        return text.rstrip()
    rest = text.split(maxsplit=num_words)[-1]
    return text[: len(text) - len(rest)].rstrip()


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> 1)
