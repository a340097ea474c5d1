"""HELMET's sets as arXiv 2412.16545 uses them: retrieved passages, key-value lines, needles.

Notable: the instruction is part of the query, behind the context, and there are no demonstrations besides the context:
the scores do not compare with HELMET's own tables.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics import best, exact_match, parse_answer, string_match_all, substring_match, token_f1
from evaluation.tasks.base import Example, Task
from evaluation.tasks.records import read_records
from evaluation.templates import fill, load_templates

NUM_EXAMPLES = 100
LENGTHS = (4096, 8192, 16384)
_TEXTS = load_templates("helmet")
NAMES = (*_TEXTS["rag"]["sets"], "json_kv", *_TEXTS["ruler"]["sets"])


def file_task(name: str) -> HelmetTask:
    """Return a task by the name of its set."""
    kinds: dict[str, Callable[[str], HelmetTask]] = {"rag": RagTask, "json": KeyValueTask, "ruler": NeedleTask}
    return kinds[name.split("_")[0]](name)


def yes_no_f1(prediction: str, answer: str) -> float:
    """Return the F1 of words, 0 where one side is a verdict and the other is not."""
    return token_f1(prediction, answer, yes_no=True)


METRICS = {"exact_match": exact_match, "substring_match": substring_match, "token_f1": yes_no_f1}


class HelmetTask(Task):
    """What the sets have in common: a choice of examples drawn with a seed, three ways to match an answer."""

    texts: Mapping[str, Any]

    def __init__(self, name: str, *, max_new_tokens: int) -> None:
        super().__init__(f"helmet/{name}", max_new_tokens=max_new_tokens)

    def examples(
        self, records: Sequence[Mapping[str, Any]], *, limit: int | None = None, seed: int = 42
    ) -> list[Example]:
        """Return the examples that the protocol chooses of the records."""
        kept = super().examples(records)
        np.random.RandomState(seed).shuffle(kept)  # type: ignore[arg-type]
        return kept[: NUM_EXAMPLES if limit is None else limit]

    def matches(self, text: str, example: Example) -> dict[str, float]:
        """Return exact match, substring match and F1 of a text, each the best over the answers."""
        return {name: best(metric, text, list(example.answers)) for name, metric in METRICS.items()}


class FileTask(HelmetTask):
    """A set with one file of JSON lines for each length."""

    has_lengths = True

    def read(self, path: str, *, limit: int | None = None, seed: int = 42, length: int = 8192) -> list[Example]:
        """Return the examples at a length: shuffled with the seed, then the first ones.

        Args:
            path: HELMET's data folder, or the file.
            limit: examples at most; None: 100.
            seed: of the shuffle.
            length: 4096, 8192 or 16384.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another length, or a damaged file.
        """
        file = Path(path) / self.file(length) if Path(path).is_dir() else Path(path)
        return self.examples(read_records(str(file), self.set_name, self.columns), limit=limit, seed=seed)

    @abstractmethod
    def file(self, length: int) -> str:
        """Return the file of a length inside HELMET's data folder.

        Raises:
            ValueError: there is none.
        """


def at_length(files: Mapping[str, Any], length: int, name: str) -> Any:
    """Return the entry of a length.

    Raises:
        ValueError: there is none.
    """
    if str(length) not in files:
        raise ValueError(f"{name} has data for lengths {', '.join(files)}, got {length}")
    return files[str(length)]


class RagTask(FileTask):
    """Questions behind retrieved documents, one passage each."""

    columns: tuple[str, ...] = ("question", "answers", "ctxs")
    texts = _TEXTS["rag"]

    def __init__(self, name: str) -> None:
        super().__init__(name, max_new_tokens=self.texts["max_new_tokens"])
        if name == "rag_popqa":
            self.columns = (*self.columns, "s_pop")

    def file(self, length: int) -> str:
        """Return the file of a length inside HELMET's data folder."""
        return str(at_length(self.texts["sets"][self.set_name], length, self.name))

    def example(self, record: Mapping[str, Any], index: int = 0) -> Example | None:
        """Return the question of a record; None for popular subjects of popqa."""
        if self.set_name == "rag_popqa" and record["s_pop"] >= 10 ** _TEXTS["rag"]["popqa_log10_popularity_below"]:
            return None
        passages = tuple(fill(self.texts["passage"], passage) for passage in record["ctxs"])
        query = fill(self.texts["query"], {"question": record["question"]})
        return Example(str(record.get("id", index)), "", passages, query, tuple(_listed(record["answers"])))

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """Score the last line of the query with the prediction, or what stands behind "Answer:", the better."""
        text = example.query.splitlines()[-1] + prediction
        parsed = parse_answer(text, self.texts["answer_prefix"])
        scores = self.matches(text, example)
        if parsed is not None:
            scores = {name: max(value, self.matches(parsed, example)[name]) for name, value in scores.items()}
        return {"score": scores[self.texts["headline"]]} | scores


class KeyValueTask(RagTask):
    """One entry of a JSON object, a passage for each entry."""

    columns = ("context", "question", "answer")
    texts = _TEXTS["json_kv"]

    def file(self, length: int) -> str:
        """Return the file of a length inside HELMET's data folder."""
        return str(at_length(self.texts["files"], length, self.name))

    def example(self, record: Mapping[str, Any], index: int = 0) -> Example:
        """Return the question of a record.

        Raises:
            ValueError: the context holds no JSON object.
        """
        text = str(record["context"])
        try:
            entries = json.loads(text[text.index("{") :])
        except ValueError as error:
            raise ValueError(f"{self.name}: the context of record {index} is no JSON object ({error})") from None
        passages = tuple(fill(self.texts["passage"], {"key": k, "value": v}) for k, v in entries.items())
        query = fill(self.texts["query"], {"question": record["question"]})
        return Example(str(record.get("id", index)), "", passages, query, tuple(_listed(record["answer"])))


class NeedleTask(FileTask):
    """RULER's needles, a passage for each sentence."""

    columns = ("context", "query")
    texts = _TEXTS["ruler"]

    def __init__(self, name: str) -> None:
        super().__init__(name, max_new_tokens=self.texts["sets"][name]["max_new_tokens"])

    def file(self, length: int) -> str:
        """Return the file of a length inside HELMET's data folder."""
        if length not in LENGTHS:
            raise ValueError(f"{self.name} has data for lengths {', '.join(map(str, LENGTHS))}, got {length}")
        return fill(self.texts["sets"][self.set_name]["file"], {"length": length})

    def example(self, record: Mapping[str, Any], index: int = 0) -> Example:
        """Return the question of a record."""
        passages = tuple(part + "." for part in str(record["context"]).split(".") if part.strip())
        query = fill(self.texts["sets"][self.set_name]["query"], {"query": record["query"]})
        answers = record["answer"] if "answer" in record else record["outputs"]
        return Example(str(record.get("index", index)), "", passages, query, tuple(_listed(answers)))

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """Return the share of the answers found."""
        text = example.query.splitlines()[-1] + prediction
        return {"score": string_match_all(text, [str(answer) for answer in example.answers])}


def _listed(answers: Any) -> list[Any]:
    return answers if isinstance(answers, list) else [answers]
