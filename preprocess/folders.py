"""Files of a folder of raw data, by names that are the same on every machine."""

from __future__ import annotations

import os
from pathlib import Path

NamedFile = tuple[Path, str]


def name_in(folder: Path, file: Path) -> str:
    """Return the name of a file inside a folder, with slashes and read as UTF-8, whatever the locale."""
    return os.fsencode(file.relative_to(folder).as_posix()).decode("utf-8", "surrogateescape")


def files_in(folder: Path) -> list[NamedFile]:
    """Return the files of a folder and of those in it, sorted by name; what begins with a dot is left out.

    Raises:
        ValueError: a link to a folder or to nothing, which is not followed.
    """
    found = []
    for file in folder.rglob("*"):
        name = name_in(folder, file)
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if file.is_symlink() and not file.is_file():
            raise ValueError(f"{file} is a link to a folder or to nothing, and is not followed: remove it")
        if file.is_file():
            found.append((file, name))
    return sorted(found, key=lambda entry: entry[1])


def output_folder(name: str) -> Path:
    """Return the folder of an ``--output``; a link to one is followed, since results are renamed into their place."""
    path = Path(name)
    return path.resolve() if path.is_symlink() else path


def refuse_output_inside(source: str | Path | None, output: Path) -> None:
    """Raise ValueError if a result would lie in the folder that it is made from: the next run would read it."""
    folder = Path(source or "")
    if source and folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{output} lies in the folder that is read, {folder}: choose an output outside it")
