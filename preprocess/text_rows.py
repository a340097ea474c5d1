"""The rows of a text as they are stored, empty ones too, for methods that work on text and not on tokens."""

from __future__ import annotations

from preprocess.documents import SPLITS, ReadOptions
from preprocess.sources import open_source


def text_rows(source: str | None, *, split: str, text_column: str = "text") -> list[str]:
    """Return the rows of a split.

    Args:
        source: a file, a folder, or ``hub:NAME[:config]``; a recipe that needs none leaves it out.
        split: ``train``, ``validation`` or ``test``.
        text_column: column (parquet, hub) or key (json lines) of the text.

    Raises:
        FileNotFoundError: no such source.
        ValueError: no source, an unknown split, or one that the source does not have.
    """
    if source is None:
        raise ValueError("the published protocol marks text, not tokens: pass sweep.text=FOLDER with the text")
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    opened = open_source(source, ReadOptions(text_column=text_column, validation_fraction=0.0, splits=(split,)))
    rows = [document.text for document in opened.documents()]
    if not any(rows):
        raise ValueError(f"{source} has no {split} text: name another split")
    return rows
