"""Where the examples of an evaluation come from: files in the published formats, or the generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evaluation.ruler import make_examples, make_qa_examples, needs_essay
from evaluation.tasks import get_task, task_names
from evaluation.tasks.base import Example, Task
from evaluation.tasks.records import parse_lines, read_records

ESSAY_CHARACTERS = 5_000_000
QA_COLUMNS = ("question", "answers", "passages")


@dataclass(frozen=True)
class Cell:
    """One task, at one length where the source has several."""

    task: Task
    length: int | None = None

    @property
    def folder(self) -> str:
        """Its folder among the results."""
        name = self.task.name.replace("/", "_")
        return name if self.length is None else f"{name}_{self.length}"


class Source(Protocol):
    """Gives the examples of its cells."""

    def cells(self) -> list[Cell]:
        """Return what there is to evaluate."""

    def examples(self, cell: Cell, tokenizer: Any) -> list[Example]:
        """Return the examples of one cell."""


def named_tasks(family: str, tasks: Sequence[str]) -> list[Task]:
    """Return tasks of a family, all of them for an empty list; names may leave the family out.

    Raises:
        ValueError: an unknown name, or one twice.
    """
    names = [name if "/" in name else f"{family}/{name}" for name in tasks] or task_names(family)
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must differ from each other, got {', '.join(names)}")
    return [get_task(name) for name in names]


class TaskFiles:
    """Tasks of one family in the published formats.

    Args:
        family: ``longbench``, ``infinitebench``, ``helmet`` or ``ruler``.
        path: a folder with the family's files, one file for a single task, or ``hub:OWNER/NAME``.
        tasks: set names; empty: all of the family.
        lengths: of families that have files for several lengths (``helmet``); empty: the task's own.
        limit: examples of a set at most.
        seed: of the choice, where the protocol draws one.

    Raises:
        ValueError: an unknown task, no path, lengths of tasks that have none, or a limit below 1.
    """

    def __init__(
        self,
        family: str,
        path: str | None,
        *,
        tasks: Sequence[str] = (),
        lengths: Sequence[int] = (),
        limit: int | None = None,
        seed: int = 42,
    ) -> None:
        if not path:
            raise ValueError(f"data.path is required: a folder with {family}'s files, or hub:OWNER/NAME")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.path, self.limit, self.seed, self.lengths = path, limit, seed, list(lengths)
        self.tasks = named_tasks(family, tasks)
        single = [task.name for task in self.tasks if not task.has_lengths]
        if self.lengths and single:
            raise ValueError(f"{', '.join(single)} come in one file, not in one for each length: leave lengths out")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths must be different, got {self.lengths}")
        if len(self.lengths) > 1 and Path(path).is_file():
            raise ValueError(f"{path} is one file, but there are {len(self.lengths)} lengths: name the folder of all")

    def cells(self) -> list[Cell]:
        """Return what there is to evaluate."""
        lengths: list[int | None] = [*self.lengths] or [None]
        return [Cell(task, length) for task in self.tasks for length in lengths]

    def examples(self, cell: Cell, tokenizer: Any) -> list[Example]:
        """Return the examples of one cell.

        Raises:
            FileNotFoundError: its file is missing.
            ValueError: its file is damaged.
        """
        options = {} if cell.length is None else {"length": cell.length}
        return cell.task.read(self.path, limit=self.limit, seed=self.seed, **options)


class GeneratedTasks:
    """Synthetic tasks at several lengths, made for the model's tokenizer.

    Args:
        tasks: names of `evaluation.ruler.TASKS`, and ``qa``.
        lengths: tokens of prompt and answer.
        num_examples: of each task at each length.
        seed: of all draws.
        essay: file with the text that hides needles: plain text, json lines or parquet with a column ``text``.
        qa: json lines with ``question``, ``answers``, ``passages``, for the task ``qa``.

    Raises:
        ValueError: an unknown task, lengths below 1, or a task whose text is not given.
        FileNotFoundError: a file that is named does not exist.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        lengths: Sequence[int],
        *,
        num_examples: int = 100,
        seed: int = 42,
        essay: str | None = None,
        qa: str | None = None,
    ) -> None:
        if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise ValueError(f"lengths must be different numbers from 1 up, at least one, got {list(lengths)}")
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        self.tasks, self.lengths = named_tasks("ruler", tasks or ["niah_single_1"]), sorted(lengths)
        self.num_examples, self.seed, self.essay, self.qa = num_examples, seed, essay, qa
        needy = [task.set_name for task in self.tasks if needs_essay(task.set_name)]
        if needy and essay is None:
            raise ValueError(f"needles need a text to hide in ({', '.join(needy)}): pass data.essay=FILE, a book say")
        if "qa" in (task.set_name for task in self.tasks) and qa is None:
            raise ValueError(f"the task qa needs data.qa=FILE, json lines with {', '.join(QA_COLUMNS)}")
        published = [task.set_name for task in self.tasks if task.set_name.startswith("qa_")]
        if published:
            raise ValueError(f"{', '.join(published)} are read from published files; generated is qa")
        for name, path in (("essay", essay), ("qa", qa)):
            if path is not None and not Path(path).is_file():
                raise FileNotFoundError(f"data.{name}={path} does not exist")
        self._text: str | None = None

    def cells(self) -> list[Cell]:
        """Return what there is to evaluate."""
        return [Cell(task, length) for task in self.tasks for length in self.lengths]

    def examples(self, cell: Cell, tokenizer: Any) -> list[Example]:
        """Return the examples of one cell.

        Raises:
            ValueError: the length is too short for the task.
        """
        assert cell.length is not None
        options: dict[str, Any] = {"num_tokens": cell.length, "tokenizer": tokenizer, "seed": self.seed}
        options["num_examples"] = self.num_examples
        if cell.task.set_name == "qa":
            records = make_qa_examples(read_records(str(self.qa), "qa", QA_COLUMNS), **options)
        else:
            if self._text is None and self.essay is not None and needs_essay(cell.task.set_name):
                self._text = read_essay(self.essay)
            records = make_examples(cell.task.set_name, essay=self._text, **options)
        return cell.task.examples(records)


def read_essay(path: str, limit: int = ESSAY_CHARACTERS) -> str:
    """Return the first characters of the texts in a file: plain, or the column ``text`` of json lines or parquet.

    Raises:
        ValueError: the file holds no text.
    """
    texts: list[str] = []
    for text in _texts(Path(path)):
        texts.append(text[: limit - sum(map(len, texts))])
        if sum(map(len, texts)) >= limit:
            break
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path} holds no text")
    return "\n".join(texts)


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column text; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=1, columns=["text"]):
            yield from (str(text) for text in batch["text"].to_pylist())
    elif path.suffix in (".jsonl", ".json"):
        with path.open("rb") as lines:
            yield from (str(record["text"]) for record in parse_lines(lines, str(path), ("text",)))
    else:
        with path.open(encoding="utf-8") as text:
            yield text.read(ESSAY_CHARACTERS)
