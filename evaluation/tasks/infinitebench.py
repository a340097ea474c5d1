"""InfiniteBench: 12 sets beyond 100K tokens, with the published prompts or those of ParallelComp."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evaluation.metrics import infinitebench
from evaluation.metrics.infinitebench import LETTERS
from evaluation.tasks.base import Example, Task
from evaluation.templates import cut, fill, load_templates

NAMES = tuple(load_templates("infinitebench")["sets"])
CHOICES = ("longbook_choice_eng", "code_debug")
_CALL = re.compile(r"(func_[0-9]+)\(-?[0-9]+\)")


class InfiniteBenchTask(Task):
    """One set.

    Args:
        name: the set.
        parallelcomp: use the prompts and lengths of arXiv 2502.14317.
    """

    columns = ("context", "input", "answer")

    def __init__(self, name: str, *, parallelcomp: bool = False) -> None:
        templates = load_templates("infinitebench")
        options = templates["parallelcomp" if parallelcomp else "sets"][name]
        family = "infinitebench_parallelcomp" if parallelcomp else "infinitebench"
        super().__init__(f"{family}/{name}", max_new_tokens=options["max_new_tokens"], chat_template=True)
        self.template: str = options["context"] + options["question"] if parallelcomp else options["template"]

    def example(self, record: Mapping[str, Any], index: int = 0) -> Example:
        """Return the question of a record.

        Raises:
            ValueError: the record lacks options, or its input does not say what the prompt repeats.
        """
        fields = {"input": record["input"], "question": record["input"]} | self._fields(record, index)
        before, after = cut(self.template)
        return Example(
            str(record.get("id", index)),
            fill(before, fields),
            (str(record["context"]),),
            fill(after, fields),
            self._answers(record, index),
        )

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """Return the score by the rule of the set."""
        return {"score": infinitebench(self.set_name, prediction, list(example.answers))}

    def _fields(self, record: Mapping[str, Any], index: int) -> dict[str, str]:
        text = str(record["input"])
        if self.set_name in CHOICES:
            return {f"OPTION_{letter}": option for letter, option in zip(LETTERS, self._options(record, index))}  # noqa: B905
        if self.set_name == "math_find":
            found = re.search(r"The .+ of", text)
            if found is None:
                raise ValueError(
                    f"{self.name}: record {index} asks for no number as in 'The largest number of', {text!r}"
                )
            return {"prefix": f"What is {found[0].lower().removesuffix(' of')} in the following list?"}
        if self.set_name == "code_run":
            found = _CALL.search(text)
            if found is None:
                raise ValueError(f"{self.name}: record {index} calls no function as in func_1(2), {text!r}")
            return {"func": found[1], "func_call": found[0]}
        return {}

    def _options(self, record: Mapping[str, Any], index: int) -> list[str]:
        options = record.get("options")
        if not isinstance(options, list) or len(options) != len(LETTERS):
            raise ValueError(f"{self.name}: record {index} must have {len(LETTERS)} options, got {options!r}")
        return [str(option) for option in options]

    def _answers(self, record: Mapping[str, Any], index: int) -> tuple[Any, ...]:
        """Return the answers; of a choice, its text and its letter."""
        answer = record["answer"]
        answers = list(answer) if isinstance(answer, list) else [answer]
        if self.set_name not in CHOICES or (len(answers) == 2 and answers[1] in tuple(LETTERS)):
            return tuple(answers)
        options = self._options(record, index)
        if len(answers) != 1 or answers[0] not in options:
            raise ValueError(f"{self.name}: the answer of record {index} is none of its options, {answer!r}")
        return (answers[0], LETTERS[options.index(answers[0])])
