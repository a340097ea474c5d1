"""A data set of the hub, streamed: nothing but the rows being tokenised is held here.

Notable: the revision is looked up first and pinned, so that a resumed run reads the same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from preprocess.documents import (
    SPLIT_OF_NAME,
    TRAIN,
    VALIDATION,
    Document,
    ReadOptions,
    is_validation,
    matches,
)
from preprocess.records import parse_line, text_of

HUB_PREFIX = "hub:"


class HubSource:
    """Rows of a hub data set, split by split.

    Args:
        name: ``NAME`` or ``NAME:config``.
        options: how to read it.
        json_lines: file patterns per split, for repositories whose files are json lines that differ in their keys;
            they are streamed line by line instead of as a table.

    Raises:
        ConnectionError: the hub does not answer, or has no such data set.
    """

    def __init__(self, name: str, options: ReadOptions, *, json_lines: Mapping[str, str] | None = None):
        self.repository, _, self.config = name.partition(":")
        self.name = self.repository.rsplit("/", 1)[-1]
        self.options, self.json_lines = options, dict(json_lines or {})
        self.revision = _revision(self.repository)
        self.streams = {split: rows for split, rows in self._load().items() if self._is_asked_for(split)}
        self.num_parts = len(self.streams)

    def describe(self) -> dict[str, Any]:
        """Name, configuration, pinned revision and the reading options."""
        described = {"kind": "hub", "name": self.repository, "config": self.config, "revision": self.revision}
        return described | {"json_lines": self.json_lines, "options": self.options.described()}

    def documents(self, part: int = 0, row: int = 0, *, full: Collection[str] = ()) -> Iterator[Document]:
        """Yield the documents from a place on; ``full`` splits are not streamed."""
        share = 0.0 if VALIDATION in self.streams else self.options.validation_fraction
        for number, (split, rows) in enumerate(self.streams.items()):
            if number < part or (split in full and (not share or {TRAIN, VALIDATION} <= set(full))):
                continue
            first = row if number == part else 0
            for index, record in enumerate(rows.skip(first) if first else rows, first):
                text = self._text(record, f"{self.repository} {split} row {index}")
                if text is None:
                    continue
                held_out = split == TRAIN and is_validation(text, share)
                document = Document(text, len(text.encode()), VALIDATION if held_out else split, number, index)
                if not self.options.splits or document.split in self.options.splits:
                    yield document

    def _text(self, record: dict[str, Any], place: str) -> str | None:
        if self.json_lines:
            record = parse_line(record["text"].encode(), place, errors=self.options.errors)
        if self.options.where is not None and not matches(record, self.options.where):
            return None
        return text_of(record, place, options=self.options)

    def _is_asked_for(self, split: str) -> bool:
        from_training = split == TRAIN and VALIDATION in self.options.splits
        return not self.options.splits or split in self.options.splits or from_training

    def _load(self) -> dict[str, Any]:
        import datasets

        try:
            if self.json_lines:
                root = f"hf://datasets/{self.repository}@{self.revision}"
                files = {split: f"{root}/{pattern}" for split, pattern in self.json_lines.items()}
                loaded = datasets.load_dataset("text", data_files=files, streaming=True)
            else:
                loaded = datasets.load_dataset(
                    self.repository, self.config or None, streaming=True, revision=self.revision
                )
        except Exception as error:  # the library raises many kinds; each means that there is nothing to stream
            raise _unavailable(self.repository, error) from error
        streams = {SPLIT_OF_NAME.get(split, split): rows for split, rows in loaded.items()}
        return {split: streams[split] for split in dict.fromkeys(SPLIT_OF_NAME.values()) if split in streams}


def _revision(repository: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(repository).sha)
    except Exception as error:  # network, credentials and misspelt names all end here
        raise _unavailable(repository, error) from error


def _unavailable(repository: str, error: Exception) -> ConnectionError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConnectionError(f"the hub has no data set {repository} for us ({reason}): check name and network")
