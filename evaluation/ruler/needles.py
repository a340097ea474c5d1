"""Needles in a haystack: facts hidden in noise, in a text, or among other facts."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.ruler.draft import Draft, Growing, draft_rng
from evaluation.ruler.words import Kind, distinct
from evaluation.templates import cut, fill, load_templates

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
# Prompts that continue a fact word for word, for models that follow no instructions.
RECALL: dict[str, Any] = {
    "instruction": "",
    "needle": "The secret number of the {key} is {value}.",
    "question": "\n",
    "answer_prefix": "The secret number of the {query} is",
    "max_new_tokens": 8,
}
RECALL_TASKS: dict[str, dict[str, Any]] = {
    "recall_single": {"haystack": "essay", "num_keys": 1},
    "recall_multikey": {"haystack": "essay", "num_keys": 4},
    "recall_needles": {"haystack": "needle", "num_keys": 1},
}


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden where, and what is asked."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Kind = "words"
    values: Kind = "short_numbers"
    num_keys: int = 1
    num_values: int = 1
    """Values of each key."""
    num_queries: int = 1


def needle_tasks() -> dict[str, NeedleTask]:
    """Return the needle tasks by name, the published ones first."""
    published = load_templates("ruler")["tasks"]
    tasks = {name: NeedleTask(**options) for name, options in published.items() if name.startswith("niah")}
    return tasks | {name: NeedleTask(**options) for name, options in RECALL_TASKS.items()}


def needle_draft(name: str, seed: int, index: int, essay: Sequence[str] | None) -> Draft:
    """Return an example of a needle task; ``essay`` holds the words of the text that hides them."""
    task = needle_tasks()[name]
    rng = draft_rng(name, seed, index)
    keys, values = distinct(task.keys, rng), distinct(task.values, rng)
    facts = [(key, [next(values) for _ in range(task.num_values)]) for key in itertools.islice(keys, task.num_keys)]
    asked = facts[: task.num_queries]
    rng.shuffle(facts)
    state = _texts(name, task, _joined([key for key, _ in asked]))
    needle = state["needle"]
    needles = [fill(needle, {"key": key, "value": value}) for key, own in facts for value in own]
    rng.shuffle(needles)
    depths = [rng.random() for _ in needles]
    haystack: Callable[[int], str]
    if task.haystack == "essay":
        assert essay is not None
        haystack = _in_essay(essay, rng.randrange(len(essay)), needles, depths)
    else:
        lines: Iterator[str] = itertools.repeat(load_templates("ruler")["noise"])
        if task.haystack == "needle":
            lines = (fill(needle, {"key": key, "value": value}) for key, value in zip(keys, values, strict=False))
        haystack = _in_lines(Growing(lines), needles, depths)
    return Draft(
        state["instruction"],
        haystack,
        state["question"],
        state["answer_prefix"],
        [value for _, own in asked for value in own],
        state["max_new_tokens"],
    )


def _texts(name: str, task: NeedleTask, query: str) -> dict[str, Any]:
    """Return instruction, needle, question and answer prefix with everything filled in but key and value."""
    if name in RECALL_TASKS:
        return RECALL | {"answer_prefix": fill(RECALL["answer_prefix"], {"query": query})}
    templates = load_templates("ruler")
    plural: str = task.values
    one = task.num_queries * task.num_values == 1
    texts = templates["templates"]["niah"] | (templates["singular"]["niah"] if one else {})
    fields = {"type": plural.removesuffix("s") if one else plural, "query": query}
    before, after = cut(texts["template"])
    return {
        "instruction": fill(before, fields),
        "needle": fill(templates["needle"], {"type": plural, "key": "{key}", "value": "{value}"}),
        "question": fill(after, fields),
        "answer_prefix": fill(texts["answer_prefix"], fields),
        "max_new_tokens": texts["max_new_tokens"],
    }


def _joined(keys: list[str]) -> str:
    return ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]


def place(lines: list[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Return the lines with each needle at its depth in [0, 1), the order of equal places that of the depths."""
    spots = sorted((int(d * (len(lines) + 1)), d, needle) for d, needle in zip(depths, needles, strict=True))
    for spot, _, needle in reversed(spots):
        lines.insert(spot, needle)
    return lines


def _in_lines(lines: Growing, needles: list[str], depths: list[float]) -> Callable[[int], str]:
    return lambda size: "\n".join(place(lines.first(size), needles, depths))


def _in_essay(essay: Sequence[str], start: int, needles: list[str], depths: list[float]) -> Callable[[int], str]:
    """Hide needles between the sentences of so many words of a text, which begins anew where it ends."""

    def build(size: int) -> str:
        words = (essay[at % len(essay)] for at in range(start, start + size))
        sentences: list[list[str]] = [[]]
        for word in words:
            sentences[-1].append(word)
            if _SENTENCE_END.search(word):
                sentences.append([])
        return " ".join(place([" ".join(words) for words in sentences if words], needles, depths))

    return build
