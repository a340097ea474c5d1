"""One task on one model: what its answers are made with, and how a batch of them is made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from evaluation.results import digest
from evaluation.runner.answering import Answer, Answerer
from evaluation.runner.checks import acts_while_decoding
from evaluation.runner.identity import describe_patch, model_entries, tokenizer_entries
from evaluation.runner.prompts import Prompt, PromptMaker, PromptOptions
from evaluation.tasks.base import Example, Task
from patches.parallel_context import ParallelContext

Scoring = Literal["generate", "teacher_forced"]
Batch = list[tuple[int, Prompt]]
"""Numbers of examples with their prompts."""


@dataclass(frozen=True)
class AnswerOptions:
    """How prompts are answered.

    Attributes:
        scoring: ``generate``, or ``teacher_forced``: whether every token of the right answer is the likeliest, and its
            NLL.
        max_new_tokens: instead of the task's own.
        batch_size: examples answered together.

    Raises:
        ValueError: an option out of range.
    """

    scoring: Scoring = "generate"
    max_new_tokens: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.scoring not in get_args(Scoring):
            raise ValueError(f"scoring is generate or teacher_forced, got {self.scoring!r}")
        for name in ("batch_size", "max_new_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")


@dataclass(frozen=True)
class TaskRun:
    """Everything that the answers to one task depend on.

    Attributes:
        task: what is asked.
        patch: how the model reads the context; None: as it is.
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        examples: the questions.
        prompts: how they become tokens.
        answers: how they are answered.
        rope: rotary positions that the model was given for this run, for the protocol.
        described: `model_entries` of the model, where they are known from another run.

    Raises:
        ValueError: no example, or an option that cannot serve this model.
    """

    task: Task
    patch: ParallelContext | None
    model: Any
    tokenizer: Any
    examples: Sequence[Example]
    prompts: PromptOptions = field(default_factory=PromptOptions)
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    rope: Mapping[str, Any] | None = None
    described: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError(f"{self.task.name} has no examples")
        if self.prompts.chat_template and not self._has_chat_template:
            raise ValueError("chat_template=true, but the tokenizer has no chat template: leave it out for base models")
        forced = self.answers.scoring == "teacher_forced"
        if forced and self.patch is not None and acts_while_decoding(self.patch):
            raise ValueError(
                "this patch drops slots after the query, and scoring=teacher_forced reads the answer with the query: "
                "pass scoring=generate"
            )

    @property
    def _has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def chat(self) -> bool:
        """Whether prompts are put into the chat template: as asked for, else as task and tokenizer want it."""
        wanted = self.prompts.chat_template
        return self._has_chat_template and (self.task.chat_template if wanted is None else wanted)

    @cached_property
    def maker(self) -> PromptMaker:
        """What makes the prompts."""
        return PromptMaker(self.tokenizer, self.patch, self.prompts, chat=self.chat)

    def protocol(self) -> dict[str, Any]:
        """Return everything that the answers depend on as plain values; runs that share it may share a folder."""
        asked = [[self.task.prompt(each), [str(answer) for answer in each.answers]] for each in self.examples]
        return {
            "task": self.task.name,
            "patch": None if self.patch is None else describe_patch(self.patch),
            **(model_entries(self.model) if self.described is None else self.described),
            "rope": None if self.rope is None else dict(self.rope),
            "examples": digest(asked),
            "num_examples": len(self.examples),
            **asdict(self.prompts),
            **tokenizer_entries(self.tokenizer, chat=self.chat),
            "scoring": self.answers.scoring,
            "max_new_tokens": self.answers.max_new_tokens or self.task.max_new_tokens,
            "batch_size": self.answers.batch_size if self._is_rough else None,
        }

    @property
    def _is_rough(self) -> bool:
        """Whether padding and the neighbours in a batch can change an answer: not at the precision of float32."""
        weights = (weight.dtype for weight in self.model.parameters())
        return any(dtype not in (torch.float32, torch.float64) for dtype in weights)

    def batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield batches of prompts behind the same prefix and of the same length of answer."""
        batch: Batch = []
        for index in indices:
            prompt = self.maker.make(self.examples[index])
            if batch and (len(batch) == self.answers.batch_size or not self._alike(batch[0], (index, prompt))):
                yield batch
                batch = []
            batch.append((index, prompt))
        if batch:
            yield batch

    def _alike(self, one: tuple[int, Prompt], other: tuple[int, Prompt]) -> bool:
        return (
            one[1].prefix == other[1].prefix
            and (len(one[1].tokens) == 1) == (len(other[1].tokens) == 1)
            and self.new_tokens(one[0]) == self.new_tokens(other[0])
        )

    def new_tokens(self, index: int) -> int:
        """Return how many tokens an answer may have."""
        own = self.examples[index].extra.get("max_new_tokens", self.task.max_new_tokens)
        return self.answers.max_new_tokens or int(own)

    def longest_answer(self, batch: Batch) -> int:
        """Return how many tokens the model reads or writes behind the prompts of a batch."""
        if self.answers.scoring == "teacher_forced":
            return max(len(answer_ids(self.tokenizer, self.examples[index])) for index, _ in batch)
        return max(self.new_tokens(index) for index, _ in batch)

    def answer(self, engine: Answerer, batch: Batch) -> list[dict[str, Any]]:
        """Return a line for each example of a batch: its answer, scores and cost."""
        started = time.perf_counter()
        chosen, prompts = [self.examples[index] for index, _ in batch], [prompt for _, prompt in batch]
        if self.answers.scoring == "generate":
            found = engine.generate(prompts, self.new_tokens(batch[0][0]))
        else:
            found = engine.force(prompts, [answer_ids(self.tokenizer, example) for example in chosen])
        cost = {
            "seconds": (time.perf_counter() - started) / len(batch),
            "prefill_seconds": None if math.isnan(found.prefill_seconds) else found.prefill_seconds / len(batch),
        }
        entries = zip(batch, found.answers, strict=True)
        return [self._line(index, prompt, answer) | cost for (index, prompt), answer in entries]

    def _line(self, index: int, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        example = self.examples[index]
        text = answer.text.split(self.task.stop, 1)[0] if self.task.stop else answer.text
        line = {
            "index": index,
            "id": example.id,
            "task": self.task.name,
            "prediction": text,
            "answers": list(example.answers),
            "scores": self.task.score(text, example) if answer.nll_sum is None else _forced_scores(answer),
            "num_pieces": len(prompt.pieces),
            "num_context_tokens": prompt.num_context_tokens,
            "num_query_tokens": len(prompt.query),
        }
        return line | {key: example.extra[key] for key in ("depth", "length") if key in example.extra}


def answer_ids(tokenizer: Any, example: Example) -> list[int]:
    """Return the tokens of the right answer (all of them where several are asked for) behind the query."""
    text = ", ".join(str(answer) for answer in example.answers)
    space = "" if not example.query or example.query[-1].isspace() else " "
    return list(tokenizer(space + text, add_special_tokens=False)["input_ids"])


def _forced_scores(answer: Answer) -> dict[str, float]:
    assert answer.nll_sum is not None and answer.num_targets is not None
    return {
        "score": float(bool(answer.all_argmax)),
        "answer_nll": answer.nll_sum,
        "answer_tokens": float(answer.num_targets),
    }
