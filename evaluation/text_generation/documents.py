"""A user's own text files, as the context of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TEXT_SUFFIXES = (".md", ".py", ".rst", ".tex", ".text", ".txt")


def read_text(path: str | Path, option: str) -> str:
    """Return the text of a UTF-8 file.

    Args:
        path: the file.
        option: the option that names it, for the sentence.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}={path} does not exist")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}={path} is not UTF-8 text (byte {error.start}): convert it") from error


def read_documents(paths: str | Sequence[str]) -> dict[str, str]:
    """Return the text of every document by its path; a folder stands for its text files in the order of their names.

    Raises:
        FileNotFoundError: no such file or folder, or no text file in a folder.
        ValueError: a file twice, not UTF-8, or without text.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if Path(path).is_dir():
            found = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in TEXT_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"documents={path} holds no text file ({', '.join(TEXT_SUFFIXES)})")
            files += found
        else:
            files.append(Path(path))
    if not files:
        raise ValueError("documents is empty: name at least one file")
    texts: dict[str, str] = {}
    for file in files:
        if str(file) in texts:
            raise ValueError(f"documents names {file} twice")
        texts[str(file)] = read_text(file, "documents")
        if not texts[str(file)].strip():
            raise ValueError(f"documents={file} has no text: leave it out")
    return texts
