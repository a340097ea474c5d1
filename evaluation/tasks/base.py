"""What a task is: examples made of records, their prompts, and the score of a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.tasks.records import read_records


@dataclass(frozen=True)
class Example:
    """One question; its prompt is instruction, passages and query, one after another."""

    id: str
    instruction: str
    passages: tuple[str, ...]
    query: str
    answers: tuple[Any, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the score or a figure needs."""


class Task(ABC):
    """A named set of questions; families override `example` and `score`.

    Attributes:
        name: ``family/set``.
        max_new_tokens: tokens to generate at most.
        stop: text at which a prediction is cut; None: nothing.
        chat_template: whether instruct models get the prompt in their chat template.
        columns: what every record must hold.
        has_lengths: whether `read` takes a ``length``, for sets with a file for each of several.
    """

    columns: tuple[str, ...] = ()
    has_lengths = False

    def __init__(self, name: str, *, max_new_tokens: int, stop: str | None = None, chat_template: bool = False) -> None:
        self.name, self.max_new_tokens = name, max_new_tokens
        self.stop, self.chat_template = stop, chat_template

    @property
    def set_name(self) -> str:
        """Name inside its family."""
        return self.name.partition("/")[2]

    @abstractmethod
    def example(self, record: Mapping[str, Any], index: int = 0) -> Example | None:
        """Return the question of a record; None for one that the protocol leaves out."""

    def prompt(self, example: Example) -> str:
        """Return the whole prompt."""
        return example.instruction + "".join(example.passages) + example.query

    @abstractmethod
    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """Return the scores of a prediction, ``score`` among them, each in [0, 1]."""

    def read(self, path: str, *, limit: int | None = None, seed: int = 42) -> list[Example]:
        """Return the examples of a file in the published format.

        Args:
            path: a file, a folder with ``<set>.jsonl``, or ``hub:OWNER/NAME``.
            limit: examples at most; None: all.
            seed: of the choice, where the protocol draws one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is damaged or lacks a column, with the number of the line.
        """
        return self.examples(read_records(path, self.set_name, self.columns), limit=limit, seed=seed)

    def examples(
        self, records: Sequence[Mapping[str, Any]], *, limit: int | None = None, seed: int = 42
    ) -> list[Example]:
        """Return the examples of records, in their order."""
        made = (self.example(record, index) for index, record in enumerate(records))
        return [example for example in made if example is not None][:limit]
