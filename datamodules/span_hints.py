"""What some span policies want to know of a block besides its length: where sentences start, how likely tokens are.

Notable: hints are functions of the tokens and of files, never of chance; what is drawn stays with the sampler.

Letters: T tokens of a block, V token ids.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamodules.corpus import TokenCorpus, open_split
from datamodules.span_scores import open_span_scores
from patches.sentinel.sampler import SpanSampler

UNIGRAM = "unigram"
SENTENCE_ENDS = (".", "!", "?")
CLOSING = "\"')]} \t"
NEEDED = {"boundary": "boundaries", "low_information": "scores"}
COUNT_BLOCK = 1 << 22

Hints = Callable[[Tensor, int], dict[str, Sequence[float]]]


class SpanHints:
    """Hints for the blocks of one split.

    Args:
        folder: corpus folder.
        split: the split that blocks are cut from, one after the other.
        policy: of the sampler.
        scores: for ``low_information``: ``unigram`` takes ``-log`` of a token's share of the training split, a folder
            holds a number for each token of the split, see `datamodules.span_scores`.
        train_split: where unigrams are counted.

    Raises:
        FileNotFoundError: the corpus has no tokenizer, or there are no scores.
        ValueError: scores of another number of tokens, or scores that the policy does not use.
    """

    def __init__(
        self, folder: str | Path, split: str, *, policy: str, scores: str | None = None, train_split: str = "train"
    ):
        if scores is not None and policy != "low_information":
            raise ValueError(f"span_scores belong to policy low_information, got {policy!r}")
        self.folder, self.split, self.policy, self.train_split = Path(folder), split, policy, train_split
        self.scores = scores or UNIGRAM

    def __call__(self, ids: Tensor, index: int) -> dict[str, Sequence[float]]:
        """Return what the sampler takes besides the length of block ``index`` with tokens ``[T]``; often nothing."""
        if self.policy == "boundary":
            ends = self.ends_sentence[ids.numpy()]
            return {"boundaries": [0, *(np.flatnonzero(ends[:-1]) + 1).tolist()]}
        if self.policy == "low_information":
            return {"scores": self._block_scores(ids, index).tolist()}
        return {}

    def _block_scores(self, ids: Tensor, index: int) -> npt.NDArray[Any]:
        if self.scores == UNIGRAM:
            return self.surprisal[ids.numpy()]
        return np.asarray(self.stored[index * len(ids) : (index + 1) * len(ids)], dtype=np.float64)

    @cached_property
    def corpus(self) -> TokenCorpus:
        """The split."""
        return open_split(self.folder, self.split)

    @cached_property
    def ends_sentence(self) -> npt.NDArray[np.bool_]:
        """Bool ``[V]``: ids whose text ends a sentence or a line."""
        from transformers import PreTrainedTokenizerFast

        path = self.folder / "tokenizer"
        if not path.is_dir():
            raise FileNotFoundError(f"policy boundary reads text: {self.folder} has no tokenizer folder")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        texts = (tokenizer.decode([token]) for token in range(self.corpus.vocab_size))
        return np.array(["\n" in text or text.rstrip(CLOSING).endswith(SENTENCE_ENDS) for text in texts])

    @cached_property
    def surprisal(self) -> npt.NDArray[np.float64]:
        """Float64 ``[V]``: ``-log((count + 1) / (tokens + V))`` in the training split."""
        corpus = open_split(self.folder, self.train_split)
        size = max(corpus.vocab_size, self.corpus.vocab_size)
        counts = np.ones(size, dtype=np.int64)
        for start in range(0, len(corpus), COUNT_BLOCK):
            part = corpus.read(start, min(start + COUNT_BLOCK, len(corpus)))
            counts += np.bincount(part, minlength=size)
        return -np.log(counts / counts.sum())

    @cached_property
    def stored(self) -> npt.NDArray[Any]:
        """The scores of the split ``[n]``, mapped from their file."""
        return open_span_scores(self.scores, self.corpus, split=self.split)


def hinted_spans(
    blocks: Sequence[Tensor], sampler: SpanSampler, hints: Hints, *, slots: int, seed: int
) -> list[list[tuple[int, ...]]] | None:
    """Return the spans of blocks ``[T]`` to score, drawn from (seed, block); None for a policy that needs no hints."""
    if sampler.policy not in NEEDED:
        return None
    drawn = []
    for index, ids in enumerate(blocks):
        draw = random.Random(f"{seed} {index}")
        given: dict[str, Any] = hints(torch.as_tensor(ids), index)
        drawn.append([tuple(span) for span in sampler(len(ids), slots=slots, generator=draw, **given)])
    return drawn
