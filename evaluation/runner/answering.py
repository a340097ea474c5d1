"""How a model answers a batch of prompts, patched or as it is: by generating, or by scoring the right answer.

Legend: B batch, T query tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evaluation.context_patch import check_fit, check_pieces
from evaluation.loading import has_position_table, max_positions
from evaluation.runner.prompts import Prompt
from patches.parallel_context import ParallelContext


@dataclass(frozen=True)
class Answer:
    """What a model said, or how likely it found the right answer."""

    text: str
    nll_sum: float | None = None
    """Negative log-likelihood of the right answer in nats, teacher-forced."""
    num_targets: int | None = None
    all_argmax: bool | None = None
    """Whether every token of the right answer was the likeliest."""


@dataclass(frozen=True)
class Answers:
    """The answers to a batch and what they took."""

    answers: list[Answer]
    prefill_seconds: float
    """Reading the contexts; of a model without patch, nan: it reads context and query at once."""


class Answerer(Protocol):
    """Answers batches of prompts of one prefix."""

    def check(self, prompts: Sequence[Prompt], num_new: int) -> None:
        """Refuse what the model cannot take: windows longer than it was made for, positions beyond a table.

        Args:
            prompts: a batch.
            num_new: tokens of the longest answer.

        Raises:
            ValueError: with the number of tokens and what to do.
        """

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Answers:
        """Continue each prompt greedily."""

    def force(self, prompts: Sequence[Prompt], targets: Sequence[list[int]]) -> Answers:
        """Score the right answers behind the prompts."""


@contextmanager
def answerer(model: Any, tokenizer: Any, patch: ParallelContext | None) -> Iterator[Answerer]:
    """Yield what answers with a model under a patch; None: the model as it is."""
    with ExitStack() as stack:
        if patch is None:
            yield PlainAnswerer(model, tokenizer)
        else:
            bound = stack.enter_context(patch.bind(model, tokenizer))
            yield PatchedAnswerer(bound, tokenizer, PlainAnswerer(model, tokenizer))


class PatchedAnswerer:
    """Answers through the engine of parallel contexts; a prompt of one token, which has no context, plainly."""

    def __init__(self, bound: Any, tokenizer: Any, plain: PlainAnswerer) -> None:
        self._bound, self._tokenizer, self._plain = bound, tokenizer, plain

    def check(self, prompts: Sequence[Prompt], num_new: int) -> None:
        """Refuse what the model cannot take, see `Answerer`."""
        if self._bare(prompts):
            return self._plain.check(prompts, num_new)
        front, config = len(self._prefix(prompts)), self._plain.model.config
        table = max_positions(config) if has_position_table(config) else None
        for prompt in prompts:
            if len(prompt.pieces) > 1:  # one piece is the ordinary context, which may be too long for rotary positions
                check_pieces(prompt.pieces, prefix=front, limit=max_positions(config), where="a prompt")
            pieces, behind = prompt.pieces or [[]], len(prompt.query) + num_new - 1
            check_fit(self._bound.options, pieces, prefix=front, query=behind, limit=table)

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Answers:
        """Continue each prompt greedily."""
        if self._bare(prompts):
            return self._plain.generate(prompts, max_new_tokens)
        state, queries, seconds = self._encode(prompts)
        found = self._bound.generate(state, queries, max_new_tokens=max_new_tokens)
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in found.token_ids]
        return Answers([Answer(text) for text in texts], seconds)

    def force(self, prompts: Sequence[Prompt], targets: Sequence[list[int]]) -> Answers:
        """Score the right answers behind the prompts."""
        if self._bare(prompts):
            return self._plain.force(prompts, targets)
        state, queries, seconds = self._encode(prompts)
        inputs = [[*query, *target[:-1]] for query, target in zip(queries, targets, strict=True)]
        wanted = [[-100] * (len(query) - 1) + target for query, target in zip(queries, targets, strict=True)]
        found = self._bound.score(state, inputs, _padded(wanted, -100), return_logits=True)
        answers = []
        for row, target in enumerate(targets):
            stop = len(inputs[row])
            logits = found.logits[row, stop - len(target) : stop]
            answers.append(_forced(logits, target, float(found.nll_sum[row])))
        return Answers(answers, seconds)

    def _prefix(self, prompts: Sequence[Prompt]) -> list[int]:
        return join_prefix(self._bound.prefix_ids(), prompts[0].prefix, self._tokenizer)

    def _bare(self, prompts: Sequence[Prompt]) -> bool:
        """Whether no prompt has more than one token."""
        return not self._prefix(prompts) and all(not p.pieces and len(p.query) == 1 for p in prompts)

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[Any, list[list[int]], float]:
        pieces, queries = [list(p.pieces) for p in prompts], [list(p.query) for p in prompts]
        prefix = self._prefix(prompts)
        for row in range(len(prompts)):
            # Neither context nor query may be empty: one token moves over.
            if not queries[row]:
                *kept, last = pieces[row]
                pieces[row], queries[row] = [*kept, *([last[:-1]] if len(last) > 1 else [])], last[-1:]
            if not pieces[row] and not prefix:
                pieces[row], queries[row] = [queries[row][:1]], queries[row][1:]
        started = _now(self._plain.device)
        state = self._bound.encode(pieces, prefix, query_ids=queries)
        return state, queries, _now(self._plain.device) - started


class PlainAnswerer:
    """Answers through the model's own ``generate`` and ``forward``, rows padded at the left."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self._tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        # Models of the suite neither cut their logits to the last rows nor take positions.
        self._takes = inspect.signature(model.forward).parameters

    def check(self, prompts: Sequence[Prompt], num_new: int) -> None:
        """Refuse what the model cannot take, see `Answerer`."""
        limit, config = max_positions(self.model.config), self.model.config
        used = max(map(len, self._rows([prompt.tokens for prompt in prompts]))) + num_new - 1
        if limit is not None and used > limit and has_position_table(config):
            raise ValueError(
                f"prompt and answer take {used} positions, but the model has a table of {limit}: "
                "pass truncation=middle and a lower max_prompt_tokens"
            )

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Answers:
        """Continue each prompt greedily."""
        inputs, mask = self._padded([prompt.tokens for prompt in prompts])
        ends = self.model.generation_config.eos_token_id
        padding = ends[0] if isinstance(ends, list) else ends or 0
        with torch.inference_mode():
            out = self.model.generate(
                inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding
            )
        rows = out[:, inputs.shape[1] :].tolist()
        return Answers([Answer(self._tokenizer.decode(row, skip_special_tokens=True)) for row in rows], float("nan"))

    def force(self, prompts: Sequence[Prompt], targets: Sequence[list[int]]) -> Answers:
        """Score the right answers behind the prompts."""
        inputs, mask = self._padded([p.tokens + t[:-1] for p, t in zip(prompts, targets, strict=True)])
        # Embedded positions, unlike rotary ones, count the padding in front unless they are given.
        known = {"logits_to_keep": max(map(len, targets)), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        options = {name: value for name, value in known.items() if name in self._takes}
        with torch.inference_mode():
            logits = self.model(inputs, attention_mask=mask, **options).logits
        return Answers([_forced(logits[row, -len(t) :], t) for row, t in enumerate(targets)], float("nan"))

    def _rows(self, rows: list[list[int]]) -> list[list[int]]:
        """Put in front what the tokenizer puts in front of every text."""
        front = join_prefix([], self._tokenizer("")["input_ids"][:1], self._tokenizer)
        return [join_prefix(front, row, self._tokenizer) for row in rows]

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        rows = self._rows(rows)
        width = max(map(len, rows))
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return inputs.to(self.device), mask.to(self.device)


def join_prefix(front: list[int], ids: list[int], tokenizer: Any) -> list[int]:
    """Put ids behind what stands in front of all, without a second BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return front + (ids[1:] if front[:1] == ids[:1] == [bos] else ids)


def _forced(logits: Tensor, target: list[int], nll_sum: float | None = None) -> Answer:
    wanted = torch.tensor(target, device=logits.device)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if nll_sum is None:
        nll_sum = float(torch.nn.functional.cross_entropy(exact, wanted, reduction="none").double().sum())
    return Answer("", nll_sum, len(target), bool((exact.argmax(-1) == wanted).all()))


def _padded(rows: list[list[int]], value: int) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [value] * (width - len(row)) for row in rows]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
