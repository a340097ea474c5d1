"""LongBench: 21 sets in English, Chinese and code, with the published prompts or those of ParallelComp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from evaluation import metrics
from evaluation.metrics import best
from evaluation.tasks.base import Example, Task
from evaluation.templates import cut, fill, load_templates

NAMES = tuple(load_templates("longbench")["sets"])
METRICS: dict[str, Callable[..., float]] = {
    name: getattr(metrics, name)
    for name in (
        "token_f1",
        "token_f1_zh",
        "rouge_l",
        "rouge_l_zh",
        "classification",
        "retrieval",
        "retrieval_zh",
        "count",
        "code_similarity",
    )
}


class LongBenchTask(Task):
    """One set; the score is the best over its answers.

    Args:
        name: the set.
        parallelcomp: use the prompts of arXiv 2502.14317 where they deviate.
    """

    columns = ("input", "context", "answers")

    def __init__(self, name: str, *, parallelcomp: bool = False) -> None:
        templates = load_templates("longbench")
        options = templates["sets"][name]
        super().__init__(
            f"longbench{'_parallelcomp' if parallelcomp else ''}/{name}",
            max_new_tokens=options["max_new_tokens"],
            stop="\n" if options["stop_at_newline"] else None,
            chat_template=options["chat_template"],
        )
        self.metric, self.first_line_only = options["metric"], options["first_line_only"]
        other = templates["parallelcomp"].get(name) if parallelcomp else None
        self.template: str = options["template"] if other is None else other["context"] + other["question"]

    def example(self, record: Mapping[str, Any], index: int = 0) -> Example:
        """Return the question of a record.

        Raises:
            ValueError: it names no classes where they are scored.
        """
        if self.metric == "classification" and not record.get("all_classes"):
            raise ValueError(f"{self.name}: record {index} must name its classes in all_classes")
        before, after = cut(self.template)
        answers = record["answers"]
        return Example(
            str(record.get("_id", index)),
            fill(before, record),
            (str(record["context"]),),
            fill(after, record),
            tuple(answers) if isinstance(answers, list) else (answers,),
            {"classes": record.get("all_classes") or []},
        )

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """Return the best score over the answers."""
        if self.first_line_only:
            prediction = prediction.lstrip("\n").split("\n")[0]
        metric = METRICS[self.metric]
        if self.metric == "classification":
            metric = partial(metric, classes=example.extra["classes"])
        return {"score": best(metric, prediction, list(example.answers))}
