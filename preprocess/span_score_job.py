"""The work of scoring every token of a corpus by a fixed model: one resumable, repeatable piece of work.

Notable: the text of a split is one stream, as blocks are cut from it; windows go over it with an overlap and score each
token once. What is done counts only when the journal says so; the folder appears under its name when it is complete.

Letters: n tokens of a split, L tokens of a window, s their distance.
"""

from __future__ import annotations

import functools
import io
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from datamodules.corpus import TokenCorpus
from datamodules.corpus_format import META_FILE, canonical_json, digest, file_sha256, identity_of
from datamodules.span_scores import FORMAT, SCORE_DTYPE, VERSION, read_span_meta, scores_file
from preprocess.disk import full_disk_named
from preprocess.index import is_taken, move_into_place, refuse_foreign, write_text
from preprocess.journal import JOURNAL_FILE, WorkFolder, read_state, write_state
from preprocess.score_model import Scorer, choose_device, load_scorer
from preprocess.tokenizers import load_tokenizer

WINDOWS_OF_A_PIECE = 64
TOKENIZER_FILE = "tokenizer.json"

Report = Callable[[int, int, int], None]
"""Called with splits, tokens and splits done so far."""


@dataclass(frozen=True)
class SpanScoring:
    """What is to be scored, and how.

    Attributes:
        corpora: splits by their names.
        scorer: the model.
        output: folder to make.
        context_length: L; the model sees L - s to L - 1 tokens before the one it scores.
        stride: s.
        device: ``auto``, ``cpu`` or ``cuda``.
        windows_per_forward: bound of the windows of a pass.
        overwrite: replace other scores at ``output``.
    """

    corpora: Mapping[str, TokenCorpus]
    scorer: Scorer
    output: Path
    context_length: int
    stride: int
    device: str = "auto"
    windows_per_forward: int = 8
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2 (a token and its target), got {self.context_length}")
        if not 1 <= self.stride < self.context_length:
            raise ValueError(
                f"stride must lie between 1 and context_length - 1 = {self.context_length - 1}, got {self.stride}"
            )
        if self.windows_per_forward < 1:
            raise ValueError(f"windows_per_forward must be at least 1, got {self.windows_per_forward}")
        positions = self.scorer.max_positions
        if positions is not None and self.context_length > positions:
            raise ValueError(
                f"windows of {self.context_length} tokens exceed the {positions} positions of "
                f"{self.scorer.options.model}: use a smaller --context-length"
            )
        for corpus in self.corpora.values():
            check_readable(self.scorer, corpus)

    @property
    def identity(self) -> dict[str, Any]:
        """The plain values that decide every byte of the scores."""
        corpora = {split: corpus.identity for split, corpus in self.corpora.items()}
        windows = {"context_length": self.context_length, "stride": self.stride}
        return {"corpora": corpora, **self.scorer.identity, **windows}


def check_readable(scorer: Scorer, corpus: TokenCorpus) -> None:
    """Raise ValueError if a model cannot read a corpus: too many ids, or another tokenizer beside its weights."""
    name = scorer.options.model
    if problem := corpus.misfit(vocab_size=scorer.vocab_size, eos_token_ids=()):
        raise ValueError(f"{name} cannot score {corpus.path}: {problem}")
    if (scorer.folder / TOKENIZER_FILE).is_file() and corpus.made_by(load_tokenizer(scorer.folder)) is False:
        raise ValueError(
            f"{corpus.path} was made with another tokenizer than that of {name}: tokenise the text with it"
        )


def score_spans(work: SpanScoring, report: Report = lambda splits, tokens, parts: None) -> tuple[dict[str, Any], bool]:
    """Do the work, or what is left of it.

    Returns:
        ``meta.json``, and whether it was there already.

    Raises:
        FileExistsError: something else is at ``work.output``.
        ValueError: the model gives losses that are not finite.
        OSError: the disk is full; what is done is kept for the next run.
    """
    if is_taken(work.output):
        meta = read_span_meta(work.output) if (work.output / META_FILE).is_file() else None
        if meta is not None and meta["work"] == work.identity:
            return meta, True
        if meta is None or not work.overwrite:
            found = "exists and holds no scores" if meta is None else "holds scores of another corpus, model or options"
            raise FileExistsError(f"{work.output} {found}: choose another --output{' or use --overwrite' * bool(meta)}")
        refuse_foreign(work.output, (META_FILE, *map(scores_file, meta["splits"])))
    folder = work.output.parent / f".{work.output.name}.{digest(work.identity)[:12]}.partial"
    try:
        with full_disk_named(work.output, keeps=folder), WorkFolder(folder) as held:
            meta = _write(work, folder, report)
            held.clear_tools()
            move_into_place(folder, work.output, overwrite=work.overwrite)
    except ValueError:  # another model or other options are needed, and those are other work
        shutil.rmtree(folder)
        raise
    return meta, False


def _write(work: SpanScoring, folder: Path, report: Report) -> dict[str, Any]:
    journal = _Journal(folder)
    device = choose_device(work.device, dtype=work.scorer.options.dtype, local_rank=0)
    model = functools.cache(lambda: load_scorer(work.scorer, device))  # a finished split needs none
    splits: dict[str, dict[str, Any]] = {}
    for number, (split, corpus) in enumerate(work.corpora.items()):
        with journal.open(split, len(corpus)) as file:
            while (start := journal.done[split]) < len(corpus):
                scores = score_piece(model(), corpus, start, work=work)
                file.write(scores.tobytes())
                journal.commit(split, file, start + len(scores))
                report(number, sum(journal.done.values()), number)
        splits[split] = {"corpus": corpus.identity, "num_tokens": len(corpus)}
        splits[split]["sha256"] = file_sha256(folder / scores_file(split))
    meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "work": work.identity, "splits": splits}
    meta["identity"] = identity_of(meta)
    write_text(folder / META_FILE, canonical_json(meta) + "\n")
    return meta


def score_piece(model: Any, corpus: TokenCorpus, start: int, *, work: SpanScoring) -> npt.NDArray[np.float32]:
    """Return the losses of the tokens from ``start`` on, some windows of them, float32.

    The first token of a split, which nothing foresees, gets ``log V``: what a model that knows nothing would give.

    Raises:
        ValueError: a loss is not finite.
    """
    import torch

    from losses.base_scoring import score_base_nll

    stop = min(start + WINDOWS_OF_A_PIECE * work.stride, len(corpus))
    first = max(0, start - (work.context_length - work.stride))
    device = next(model.parameters()).device
    losses = np.full(stop - first, math.log(work.scorer.vocab_size), SCORE_DTYPE)
    if stop - first > 1:
        found = score_base_nll(
            model,
            torch.from_numpy(corpus.read(first, stop))[None].to(device),
            base_length=work.context_length,
            base_stride=work.stride,
            first_window=True,
            windows_per_forward=work.windows_per_forward,
        )
        losses[1:] = found[0].cpu().numpy()
    scores = losses[start - first :]
    if not np.isfinite(scores).all():
        place = start + int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"the model gives a loss that is not finite for token {place} of {corpus.path}: "
            "score with --dtype float32, or check the model"
        )
    return scores


class _Journal:
    """How many tokens of each split count, and the files they lie in."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / JOURNAL_FILE
        self.done: dict[str, int] = read_state(self.file) or {}

    def open(self, split: str, num_tokens: int) -> BinaryIO:
        """Open the file of a split at the end of what counts; what a killed run wrote behind it is cut off."""
        path = self.folder / scores_file(split)
        header = io.BytesIO()
        shape = {"descr": SCORE_DTYPE.str, "fortran_order": False, "shape": (num_tokens,)}
        np.lib.format.write_array_header_1_0(header, shape)
        end = header.tell() + self.done.setdefault(split, 0) * SCORE_DTYPE.itemsize
        if not path.is_file() or path.stat().st_size < end:
            path.write_bytes(header.getvalue())
            self.done[split], end = 0, header.tell()
        file = open(path, "ab")  # noqa: SIM115 - closed by the caller
        file.truncate(end)
        return file

    def commit(self, split: str, file: BinaryIO, done: int) -> None:
        """Make the tokens written so far count."""
        file.flush()
        os.fsync(file.fileno())
        self.done[split] = done
        write_state(self.file, self.done)
