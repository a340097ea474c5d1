"""Continue a query token by token: greedy or sampled, every row up to its own end.

Legend: B batch, V vocabulary, M model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.parallel_context.checks import check_count, check_positive
from patches.parallel_context.dispatch import last_valid
from patches.parallel_context.query_pass import QueryPass


@dataclass(frozen=True)
class GenerateResult:
    """Generated tokens of a batch."""

    token_ids: list[list[int]]
    """Per row, up to and including an end token."""
    text: list[str] | None
    """Per row, without special tokens; None without a tokenizer."""
    meters: dict[str, Tensor]
    live_slots: list[int]
    """Context slots that each layer stores at the end, per row and kv head."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        check_count("seed", self.seed, 0)
        changed = (self.temperature, self.top_k, self.top_p, self.seed) != (1.0, None, None, 0)
        if changed and not self.do_sample:
            raise ValueError("temperature, top_k, top_p and seed have an effect with do_sample=True only")

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """Choose one token per row of ``[B, V]`` float logits; every row draws from its own generator."""
        if not self.do_sample:
            return logits.argmax(-1).tolist()
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = torch.softmax(logits, -1)
        if self.top_p is not None:
            ordered, index = torch.sort(probabilities, dim=-1, descending=True, stable=True)
            # The token that crosses top_p stays.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
        return [
            int(torch.multinomial(row, 1, generator=generator))
            for row, generator in zip(probabilities.cpu(), generators, strict=True)
        ]


def end_tokens(eos_token_id: Any, model: Any) -> frozenset[int]:
    """Return the ids that end a row: "model" reads the generation config, None never ends."""
    if eos_token_id == "model":
        config = getattr(model, "generation_config", None)
        eos_token_id = getattr(config, "eos_token_id", None)
    if eos_token_id is None:
        return frozenset()
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if not all(isinstance(value, int) for value in ids):
        raise ValueError(f'eos_token_id must be "model", None, an id or a list of ids, got {eos_token_id!r}')
    return frozenset(ids)


def continue_query(
    query: QueryPass,
    tokens: Tensor,
    lengths: list[int],
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    ends: frozenset[int],
    sampling: Sampling,
) -> list[list[int]]:
    """Read the query ``[B, T]`` and generate; returns the new tokens of every row."""
    hidden = last_valid(query.forward(tokens, lengths), lengths)
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in lengths]
    rows: list[list[int]] = [[] for _ in lengths]
    alive = [True] * len(lengths)
    for step in range(max_new_tokens):
        logits = query.hook.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if step < min_new_tokens and ends:
            logits[:, [token for token in ends if token < logits.shape[-1]]] = float("-inf")
        chosen = sampling.choose(logits, generators)
        for row, token in enumerate(chosen):
            if alive[row]:
                rows[row].append(token)
                alive[row] = token not in ends
        if not any(alive) or step == max_new_tokens - 1:
            break
        hidden = query.forward(torch.tensor(chosen)[:, None], [int(flag) for flag in alive])[:, 0]
    return rows
