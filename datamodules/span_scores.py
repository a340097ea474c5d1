"""A number for every token of a corpus split, by which spans are chosen: how well a model foresees the token.

A folder holds

* ``<split>.npy``: float32 ``[n]``, the loss of every token of the split in the tokens before it;
* ``meta.json``: format, scorer, windows, for each split the identity of its corpus and the SHA-256 of its file, and
  ``identity``, the SHA-256 of everything else in it (``python -m preprocess.span_scores`` writes it).

Files of any other origin may lie there without ``meta.json``: then only their number of tokens is checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.corpus import TokenCorpus
from datamodules.corpus_format import META_FILE, identity_of

FORMAT = "span-scores"
VERSION = 1
SCORE_DTYPE = np.dtype("<f4")
COMMAND = "python -m preprocess.span_scores"


def scores_file(split: str) -> str:
    """Return the name of the file of a split."""
    return f"{split}.npy"


def open_span_scores(folder: str | Path, corpus: TokenCorpus, *, split: str) -> npt.NDArray[Any]:
    """Map the scores of a split, ``[n]``.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is torn, or of another corpus.
    """
    file = Path(folder) / scores_file(split)
    if not file.is_file():
        raise FileNotFoundError(f"no scores at {file}: make them with {COMMAND}, or pass data.span_scores=unigram")
    if (Path(folder) / META_FILE).is_file():
        entry = read_span_meta(folder)["splits"].get(split, {})
        if entry.get("corpus") != corpus.identity:
            raise ValueError(
                f"{file} scores the corpus {entry.get('corpus')}, but {corpus.path} is {corpus.identity}: "
                f"score this one with {COMMAND}"
            )
    try:
        scores: npt.NDArray[Any] = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is torn or no array ({error}): make the scores again") from error
    if scores.shape != (len(corpus),) or scores.dtype.kind != "f":
        raise ValueError(
            f"{file} holds {scores.dtype} {scores.shape}, but the split has {len(corpus)} tokens: one number each"
        )
    return scores


def read_span_meta(folder: str | Path) -> dict[str, Any]:
    """Read and check ``meta.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not describe scores of this version, or was changed after writing.
    """
    file = Path(folder) / META_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {META_FILE} in {folder}: make scores with {COMMAND}")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): make the scores again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise ValueError(f"{file} does not describe {FORMAT} of version {VERSION}: make the scores again")
    if meta.get("identity") != identity_of(meta):
        raise ValueError(f"{file} was changed after it was written: make the scores again")
    return meta
