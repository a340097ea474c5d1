"""Classification by demonstrations (HELMET's in-context learning as arXiv 2412.16545 uses it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics import parse_answer
from evaluation.tasks.base import Example
from evaluation.tasks.helmet import HelmetTask, at_length
from evaluation.tasks.records import read_records
from evaluation.templates import fill, load_templates

NAMES = tuple(load_templates("helmet")["icl"]["sets"])


class DemonstrationTask(HelmetTask):
    """Classes named by random numbers, a passage for each demonstration, balanced over the classes."""

    columns = ("text", "label")
    texts = load_templates("helmet")["icl"]
    has_lengths = True

    def __init__(self, name: str) -> None:
        super().__init__(name, max_new_tokens=self.texts["max_new_tokens"])
        self.options: Mapping[str, Any] = self.texts["sets"][name]

    def read(self, path: str, *, limit: int | None = None, seed: int = 42, length: int = 8192) -> list[Example]:
        """Return test items, each behind its own shuffle of the demonstrations and map of the labels.

        Args:
            path: a folder with ``train.jsonl`` and ``test.jsonl``, by itself or in a folder of the set's name.
            limit: examples at most; None: 100.
            seed: of all draws.
            length: 4096, 8192 or 16384; sets the number of demonstrations.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: another length, or a damaged file.
        """
        folder = Path(path) / self.set_name if (Path(path) / self.set_name).is_dir() else Path(path)
        train, test = (read_records(str(folder / f"{part}.jsonl"), part, self.columns) for part in ("train", "test"))
        shots = int(at_length(self.options["shots"], length, self.name))
        return self.examples(
            list(demonstrated(train, test, shots, self.options["num_labels"], seed)), limit=limit, seed=seed
        )

    def example(self, record: Mapping[str, Any], index: int = 0) -> Example:
        """Return the question of a test item with its demonstrations, ``{"demonstrations", "text", "label"}``."""
        passages = tuple(fill(self.texts["passage"], shown) for shown in record["demonstrations"])
        query = fill(self.texts["query"], {"text": record["text"]})
        return Example(str(record.get("id", index)), "", passages, query, (str(record["label"]),))

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """Score what stands behind "label:"."""
        text = example.query.splitlines()[-1] + prediction
        scores = self.matches(parse_answer(text, self.texts["answer_prefix"]) or "", example)
        return {"score": scores[self.texts["headline"]]} | scores


def demonstrated(
    train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]], shots: int, num_labels: int, seed: int
) -> list[dict[str, Any]]:
    """Return the test items with demonstrations, by the draws of the published protocol.

    Args:
        train: items with ``text`` and ``label``, numbers or names of classes.
        test: items of the same kind.
        shots: demonstrations of an item.
        num_labels: classes; as many numbers are shuffled.
        seed: of one generator for all draws.
    """
    draw = np.random.RandomState(seed)
    names = sorted({str(item["label"]) for item in train})
    numbers = {name: int(name) if all(map(str.isdigit, names)) else index for index, name in enumerate(names)}
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for item in train:
        by_label.setdefault(str(item["label"]), []).append(item)
    rounds: list[list[Mapping[str, Any]]] = [[] for _ in range(-(-shots // len(by_label)))]
    for items in by_label.values():
        order: list[int] = []
        while len(order) < len(rounds):
            more = list(range(len(items)))
            draw.shuffle(more)  # type: ignore[arg-type]
            order += more
        for number, place in enumerate(order[: len(rounds)]):
            rounds[number].append(items[place])
    made = []
    for index, item in enumerate(test):
        for group in rounds:
            draw.shuffle(group)  # type: ignore[arg-type]
        shown = [each for group in rounds for each in group][:shots]
        labels = list(range(num_labels))
        draw.shuffle(labels)  # type: ignore[arg-type]
        known = {name: labels[number] for name, number in numbers.items() if number < num_labels}
        pairs = [{"text": each["text"], "label": known[str(each["label"])]} for each in shown]
        if str(item["label"]) in known:
            made.append(
                {"id": index, "demonstrations": pairs, "text": item["text"], "label": known[str(item["label"])]}
            )
    return made
