"""Make sure that the sequences a fine-tuning run reads exist, and their scores: from a corpus to stores.

Notable: processes that need the same stores at once (the ranks of a run) wait for the one that makes them. Scores of a
large model are better made beforehand, by ``python -m preprocess.score_tokens`` on all devices.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.sequence_store import SequenceStore
from preprocess.chunk_inputs import FirstDocuments, open_input
from preprocess.chunk_job import Cut, make_sequences
from preprocess.corpora import held_lock
from preprocess.documents import ReadOptions
from preprocess.progress import TokenizeProgress
from preprocess.score_job import Run, Schedule, score_tokens
from preprocess.score_model import Dtype, ScorerOptions, find_scorer
from preprocess.score_progress import ScoreProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scoring:
    """Frozen scores of the training sequences.

    Attributes:
        output: score folder.
        scorer: folder or hub name of the scorer, or a function that builds one, saved beside the scores; None only
            accepts scores that are there.
        base_length: tokens of a short context.
        base_stride: distance of two short contexts.
        tail: what becomes of a last window that does not fit.
        first_window: score the first window, too.
        dtype: of the scorer's weights.
    """

    output: str
    scorer: str | Callable[[], PreTrainedModel] | None = None
    base_length: int = 8192
    base_stride: int = 6144
    tail: Literal["align", "short", "strict"] = "align"
    first_window: bool = True
    dtype: Dtype = "bfloat16"


def ensure_sequences(
    sequences: str,
    validation: str | None,
    *,
    length: int,
    corpus: str | None = None,
    max_documents: int | None = None,
    bos_token_id: int | None = None,
    scoring: Scoring | None = None,
) -> dict[str, str | None]:
    """Return the stores of a run, cutting and scoring what is not there yet.

    Args:
        sequences: store to train on.
        validation: store to validate on, None for none.
        length: tokens of a sequence.
        corpus: corpus folder to cut where a store is missing: ``train`` into ``sequences``, ``validation`` into
            ``validation``; its tokenizer is kept beside them.
        max_documents: cut only so many documents of each split; None: all.
        bos_token_id: token in front of every sequence.
        scoring: scores of ``sequences``; None for none.

    Returns:
        ``sequences``, ``validation``, ``scores`` as a datamodule takes them.

    Raises:
        FileNotFoundError: a store is missing and there is nothing to make it from.
        ValueError: a store has sequences of another length.
    """
    cut = Cut(length, bos_token_id)
    for path, split in ((sequences, "train"), (validation, "validation")):
        if path is not None:
            with held_lock(_lock(path)):
                _ensure_split(Path(path), split, cut, corpus=corpus, max_documents=max_documents)
    if scoring is not None:
        with held_lock(_lock(scoring.output)):
            _ensure_scores(SequenceStore(sequences), scoring)
    return {
        "sequences": sequences,
        "validation": validation,
        "scores": None if scoring is None else scoring.output,
    }


def _lock(store: str) -> Path:
    return Path(store).with_name(f".{Path(store).name}.lock")


def _ensure_split(path: Path, split: str, cut: Cut, *, corpus: str | None, max_documents: int | None) -> None:
    if not path.exists():
        if corpus is None:
            raise FileNotFoundError(
                f"no sequences at {path}: make them with python -m preprocess.chunk_documents --length {cut.length} "
                f"--output {path}, or pass prepare.corpus=FOLDER"
            )
        source = open_input(str(Path(corpus) / split), None, options=ReadOptions(), num_workers=1)
        if max_documents is not None:
            source = FirstDocuments(source, max_documents)
        tokenizer = Path(corpus) / "tokenizer"
        if tokenizer.is_dir():  # first: a store that is there is not touched again
            shutil.copytree(tokenizer, path.parent / "tokenizer", dirs_exist_ok=True)
        with TokenizeProgress(path.name, 1) as progress:
            make_sequences([source], cut, output=path, report=progress)
    store = SequenceStore(path)
    if (store.length, store.bos_token_id) != (cut.length, cut.bos_token_id):
        raise ValueError(
            f"{path} has sequences of {store.length} tokens with bos_token_id={store.bos_token_id}, the recipe wants "
            f"{cut.length} and {cut.bos_token_id}: pass module.context_length={store.length} "
            f"module.bos_token_id={'null' if store.bos_token_id is None else store.bos_token_id}, or other stores"
        )


def _ensure_scores(sequences: SequenceStore, scoring: Scoring) -> None:
    """Make the scores or what is missing of them; a folder of other scores is refused."""
    if scoring.scorer is None:
        if not Path(scoring.output).exists():
            raise FileNotFoundError(
                f"no scores at {scoring.output}: make them with python -m preprocess.score_tokens --sequences "
                f"{sequences.path} --output {scoring.output}, or pass prepare.scoring.scorer=MODEL"
            )
        return
    replace: Any = "none" if sequences.bos_token_id is None else "replace"
    schedule = Schedule(
        scoring.base_length,
        scoring.base_stride,
        tail=scoring.tail,
        first_window=scoring.first_window,
        bos=replace,
        bos_token_id=sequences.bos_token_id,
    )
    scorer = find_scorer(ScorerOptions(_scorer_folder(scoring), dtype=scoring.dtype))
    with ScoreProgress(Path(scoring.output).name) as progress:
        score_tokens(sequences, scorer, schedule, run=Run(output=Path(scoring.output)), progress=progress)


def _scorer_folder(scoring: Scoring) -> str:
    if isinstance(scoring.scorer, str):
        return scoring.scorer
    assert scoring.scorer is not None
    import torch

    folder = Path(f"{scoring.output}.scorer")
    if not (folder / "config.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            scoring.scorer().save_pretrained(folder)
    return str(folder)
