"""Needle tasks in the tokens of a corpus: its tokenizer writes the templates, its plain ids make the values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from datamodules.niah import Kind, NeedleTask

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "landmark_token_id")


def corpus_needle_task(
    path: str | Path,
    kind: Kind,
    *,
    chunk_size: int,
    pad_token_id: int,
    special_token_ids: Collection[int | None] = (),
    vocab_range: tuple[int, int] | None = None,
    **options: Any,
) -> NeedleTask:
    """Build a task whose templates are written by the tokenizer of a corpus folder (or of one of its splits).

    Args:
        path: the corpus; its tokenizer lies in ``tokenizer/``.
        kind: as `NeedleTask`.
        chunk_size: as `NeedleTask`.
        pad_token_id: as `NeedleTask`.
        special_token_ids: ids that no value may hold; None among them is passed over.
        vocab_range: ids of values; None is the longest run of ids without special ones.
        **options: further options of `NeedleTask`.

    Raises:
        FileNotFoundError: the corpus has no tokenizer.
        ValueError: as `NeedleTask`.
    """
    tokenizer = _tokenizer(Path(path))
    if vocab_range is None:
        special = {pad_token_id, *tokenizer.all_special_ids, *special_token_ids} - {None}
        vocab_range = text_range(len(tokenizer), special)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return NeedleTask(
        kind, encode, chunk_size=chunk_size, pad_token_id=pad_token_id, vocab_range=vocab_range, **options
    )


def model_needle_task(
    path: str | Path,
    model_path: str,
    *,
    kind: Kind = "single",
    chunk_size: int | None = None,
    key_length: int = 5,
    num_hops: int | None = None,
    num_distractors: int | None = None,
    vocab_range: list[int] | None = None,
    align_question: bool = True,
) -> NeedleTask:
    """Build the task that suits a model: its chunks, its padding, and values without its special tokens.

    Args:
        path: corpus folder, or one of its splits.
        model_path: model folder, or ``hub:NAME``.
        kind: as `NeedleTask`.
        chunk_size: None is that of the model.
        key_length: as `NeedleTask`.
        num_hops: as `NeedleTask`.
        num_distractors: as `NeedleTask`.
        vocab_range: ids of values; None is the longest run of ids without special ones.
        align_question: as `NeedleTask`.

    Raises:
        FileNotFoundError: the corpus has no tokenizer.
        ValueError: the model has no chunks and none are given, or as `NeedleTask`.
    """
    values = id_range(vocab_range)
    config = AutoConfig.from_pretrained(model_path.removeprefix("hub:")).get_text_config()
    size = getattr(config, "chunk_size", None) if chunk_size is None else chunk_size
    if size is None:
        raise ValueError(f"the model {model_path} has no chunks to place the question at: pass a chunk_size")
    special = [getattr(config, name, None) for name in SPECIAL]
    pad = next((token for token in reversed(special[:3]) if token is not None), 0)
    return corpus_needle_task(
        path,
        kind,
        chunk_size=size,
        pad_token_id=pad,
        special_token_ids=special,
        vocab_range=values,
        key_length=key_length,
        num_hops=num_hops,
        num_distractors=num_distractors,
        align_question=align_question,
    )


def id_range(vocab_range: Sequence[int] | None) -> tuple[int, int] | None:
    """Return ``[low, high)`` as a recipe gives it; None is left to the tokenizer.

    Raises:
        ValueError: not two ids.
    """
    if vocab_range is None:
        return None
    if len(vocab_range) != 2:
        raise ValueError(f"vocab_range must be two ids [low, high), got {vocab_range}")
    return vocab_range[0], vocab_range[1]


def text_range(vocab_size: int, special: Collection[int]) -> tuple[int, int]:
    """Return the longest run [low, high) of ids below ``vocab_size`` without special ones, the first of equal ones."""
    borders = [-1, *sorted(token for token in special if 0 <= token < vocab_size), vocab_size]
    runs = [(low + 1, high) for low, high in pairwise(borders)]
    return max(runs, key=lambda run: run[1] - run[0])


def _tokenizer(path: Path) -> Any:
    for folder in (path / "tokenizer", path.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(folder)
    raise FileNotFoundError(
        f"no tokenizer in {path / 'tokenizer'}: needles are written in the tokens of their haystack, "
        "so make the corpus with python -m preprocess.tokenize"
    )
