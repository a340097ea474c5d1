"""Synthetic tasks: records of our generator, or files of the published one, and how they are scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evaluation.metrics import string_match_all, string_match_part
from evaluation.ruler import TASKS
from evaluation.tasks.base import Example, Task
from evaluation.templates import load_templates

QA = ("qa", "qa_1", "qa_2")
NAMES = (*TASKS, *QA)
_FIELD = re.compile(r"\{(\w+)\}")


class RulerTask(Task):
    """One synthetic task, scored by the share of its answers that the prediction contains."""

    columns = ("input", "outputs")

    def __init__(self, name: str) -> None:
        texts = load_templates("ruler")["templates"]
        self.kind = "niah" if name.startswith("niah") else "qa" if name in QA else name
        super().__init__(f"ruler/{name}", max_new_tokens=texts.get(self.kind, {}).get("max_new_tokens", 50))

    def example(self, record: Mapping[str, Any], index: int = 0) -> Example:
        """Return the question of a record; of the published generator's, cut at the template.

        Raises:
            ValueError: the text does not follow the template, or there is no answer.
        """
        if {"instruction", "context", "query"} <= set(record):
            parts = (record["instruction"], record["context"], record["query"])
        else:
            parts = self._cut(str(record["input"]), str(record.get("answer_prefix", "")), index)
        answers = tuple(str(answer) for answer in record["outputs"])
        if not answers:
            raise ValueError(f"record {index} of {self.name} has empty outputs: nothing can be found; leave it out")
        extra: dict[str, Any] = {"length": int(record["length"])} if "length" in record else {}
        if "max_new_tokens" in record:
            extra["max_new_tokens"] = int(record["max_new_tokens"])
        place = parts[1].find(answers[0])
        if place >= 0 and self.set_name not in ("cwe", "fwe", *QA):
            extra["depth"] = place / len(parts[1])
        return Example(str(record.get("index", index)), parts[0], (parts[1],), parts[2], answers, extra)

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """Return the share of the answers found; for questions over passages, whether one is."""
        metric = string_match_part if self.kind == "qa" else string_match_all
        return {"score": metric(prediction, [str(answer) for answer in example.answers])}

    def _cut(self, text: str, prefix: str, index: int) -> tuple[str, str, str]:
        templates = load_templates("ruler")
        variants = [templates["templates"].get(self.kind), templates["singular"].get(self.kind)]
        for variant in filter(None, variants):
            head, _, tail = variant["template"].partition("{context}")
            for end in (_pattern(tail), _pattern(tail + variant["answer_prefix"])):
                # Greedy: a worked example in front belongs to the instruction.
                found = re.fullmatch(f"(.*{_pattern(head)})(.*)({end})", text, re.DOTALL)
                if found:
                    return found[1], found[2], found[3] + prefix
        raise ValueError(f"{self.name}: record {index} does not follow the published template")


def _pattern(template: str) -> str:
    parts = _FIELD.split(template)
    return "".join(re.escape(part) if number % 2 == 0 else "[^\n]+?" for number, part in enumerate(parts))
