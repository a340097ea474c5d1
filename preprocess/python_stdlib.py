"""Text that is on every machine with Python: the sources of its standard library and its documentation topics.

Notable: nothing is downloaded; the split is by file, decided by a hash of its name, so a file is held out on every
machine or on none.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from datamodules.corpus_format import digest
from preprocess.documents import TRAIN, VALIDATION, Document, ReadOptions, is_validation

NAME = "python_stdlib"
LEFT_OUT_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data")
)
LEFT_OUT_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "_distutils_system_mod")
TOPIC_PREFIX = "topics:"
GENERATED_MARK = "decoding_table"


class StdlibSource:
    """Files of the standard library (without tests and generated tables), then the documentation topics."""

    def __init__(self, options: ReadOptions, root: Path | None = None):
        self.options, self.name = options, NAME
        self.root = root or Path(sysconfig.get_paths()["stdlib"])
        files, self.topics = _file_names(self.root), _topics()
        if not files:
            raise FileNotFoundError(f"no Python sources in {self.root}: this Python comes without them, give a folder")
        self.names = files + [TOPIC_PREFIX + topic for topic in sorted(self.topics)]
        self.num_parts = len(self.names)

    def describe(self) -> dict[str, Any]:
        """Digest of names and texts."""
        texts = [[document.split, document.text] for document in self.documents()]
        return {"kind": NAME, "files": self.num_parts, "sha256": digest(texts), "options": self.options.described()}

    def documents(self, part: int = 0, row: int = 0, *, full: Collection[str] = ()) -> Iterator[Document]:
        """Yield the documents from a place on; each part is one document."""
        for number in range(part + (row > 0), self.num_parts):
            name = self.names[number]
            split = VALIDATION if is_validation(name, self.options.validation_fraction) else TRAIN
            if split not in full and (not self.options.splits or split in self.options.splits):
                text = self._read(name)
                yield Document(text, len(text.encode()), split, number, 0)

    def _read(self, name: str) -> str:
        topic = name.removeprefix(TOPIC_PREFIX)
        return self.topics[topic] if topic != name else _source_text(self.root / name)


def _file_names(root: Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _is_wanted_folder(name)]  # what is left out is not walked through
        place = Path(folder).relative_to(root)
        names += [(place / name).as_posix() for name in files if _is_wanted_file(name)]
    return sorted(name for name in names if not _is_generated(root / name))


def _is_wanted_folder(name: str) -> bool:
    return name not in LEFT_OUT_FOLDERS and not name.startswith("config-")


def _is_wanted_file(name: str) -> bool:
    return name.endswith(".py") and not name.startswith(LEFT_OUT_PREFIXES)


def _is_generated(path: Path) -> bool:
    """Character maps of the ``encodings`` package are tables written by a script."""
    return path.parent.name == "encodings" and GENERATED_MARK in _source_text(path)


def _source_text(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        # Some distributions package the topics separately.
        return {}
