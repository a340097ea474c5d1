"""Training a byte-level BPE tokenizer whose special tokens come first (0 end of text, 1 padding, 2 landmark)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from preprocess.tokenizers import SPECIAL_TOKENS, set_byte_level, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 256 + len(SPECIAL_TOKENS), 1 << 32


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that loses nothing.

    Args:
        texts: read once, streamed.
        vocab_size: entries, special tokens and the 256 bytes included; fewer if the text does not give as many.

    Raises:
        ValueError: a vocabulary too small for bytes and special tokens or too large for any corpus, or nothing to
            learn from.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"a byte-level vocabulary has {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY} entries, got {vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    set_byte_level(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() == SMALLEST_VOCABULARY < vocab_size:
        raise ValueError("the source has no training text to learn a tokenizer from")
    return wrap(backend)
