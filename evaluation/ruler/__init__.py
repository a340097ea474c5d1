"""Synthetic long-context tasks of any length, offline, for any tokenizer: the same examples in every process."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from evaluation.ruler.draft import Draft, fit
from evaluation.ruler.frequency import common_words_draft, frequent_words_draft
from evaluation.ruler.needles import needle_draft, needle_tasks
from evaluation.ruler.passages import make_qa_examples
from evaluation.ruler.retrieval import hidden_number_draft, key_value_draft
from evaluation.ruler.tracking import tracking_draft

__all__ = ["TASKS", "make_examples", "make_qa_examples", "needs_essay"]

TASKS = (*needle_tasks(), "vt", "cwe", "fwe", "passkey", "number_string", "kv_retrieval")


def needs_essay(task: str) -> bool:
    """Whether a task hides its facts in a text that the caller gives."""
    return task in needle_tasks() and needle_tasks()[task].haystack == "essay"


def make_examples(
    task: str, *, num_examples: int, num_tokens: int, tokenizer: Any, seed: int = 42, essay: str | None = None
) -> list[dict[str, Any]]:
    """Return examples of a task, each filled up to ``num_tokens`` tokens of prompt and answer.

    Example ``index`` depends on nothing but task, seed, index, length, tokenizer and essay.

    Args:
        task: one of `TASKS`.
        num_examples: how many.
        num_tokens: tokens of prompt and answer, at most.
        tokenizer: a tokenizer of transformers; lengths are counted without special tokens.
        seed: of all draws.
        essay: the text that hides the needles, repeated where it is too short.

    Returns:
        Records with ``index, task, instruction, context, query, answer_prefix, input, outputs, length,
        max_new_tokens``; ``input + answer_prefix == instruction + context + query``.

    Raises:
        ValueError: an unknown task, a task that needs an essay without one, or too few tokens.
    """
    if task not in TASKS:
        near = get_close_matches(task, TASKS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown task {task!r}{hint}; tasks: {', '.join(TASKS)}")
    words = (essay or "").split()
    if needs_essay(task) and not words:
        raise ValueError(f"{task} hides its needles in a text: pass essay, a book say")
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    result = []
    for index in range(num_examples):
        try:
            record = fit(_draft(task, seed, index, num_tokens, words), num_tokens, tokenizer)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from None
        result.append({"index": index, "task": task} | record)
    return result


def _draft(task: str, seed: int, index: int, num_tokens: int, essay: Sequence[str]) -> Draft:
    drafts: dict[str, Callable[[], Draft]] = {
        "vt": lambda: tracking_draft(task, seed, index),
        "cwe": lambda: common_words_draft(task, seed, index, num_tokens),
        "fwe": lambda: frequent_words_draft(task, seed, index, num_tokens),
        "passkey": lambda: hidden_number_draft(task, seed, index),
        "number_string": lambda: hidden_number_draft(task, seed, index),
        "kv_retrieval": lambda: key_value_draft(task, seed, index),
    }
    return drafts.get(task, lambda: needle_draft(task, seed, index, essay or None))()
