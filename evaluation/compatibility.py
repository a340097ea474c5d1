"""Whether a model can be scored on a corpus: token ids must mean the same to both, and windows must fit the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from transformers import AutoConfig

from evaluation.loading import has_position_table, load_tokenizer, max_positions
from evaluation.scoring import Corpus

SAME = "that of the corpus"
UNKNOWN = "not known to be that of the corpus; vocabulary size and end-of-text token do not contradict it"


class TokenizedCorpus(Corpus, Protocol):
    """A token corpus that knows what made it; `datamodules.corpus.TokenCorpus` does."""

    def made_by(self, tokenizer: Any) -> bool | None:
        """Say whether a tokenizer made the corpus; None if that is not known."""

    def misfit(self, *, vocab_size: int | None, eos_token_ids: Collection[int]) -> str:
        """Say why a model cannot read the token ids; empty if nothing known speaks against it."""


def check_tokens(name: str, corpus: TokenizedCorpus) -> str:
    """Return how the tokenizer of a model stands to that of the corpus, `SAME` or `UNKNOWN`.

    Args:
        name: model folder or hub name.
        corpus: what it is to read.

    Raises:
        ValueError: the tokenizers differ, or one is unknown and the model's configuration contradicts the corpus.
    """
    tokenizer = load_tokenizer(name)
    same = None if tokenizer is None else corpus.made_by(tokenizer)
    if same:
        return SAME
    problem = "the corpus was made with another tokenizer than the model's"
    if same is None:
        config = AutoConfig.from_pretrained(name).get_text_config()
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        problem = corpus.misfit(vocab_size=config.vocab_size, eos_token_ids=[end for end in ends if end is not None])
    if problem:
        raise ValueError(f"{problem}: tokenise the text with --tokenizer {name}")
    return UNKNOWN


def check_length(name: str, length: int) -> None:
    """Raise ValueError if a model has no position embedding for the last of ``length`` tokens."""
    config = AutoConfig.from_pretrained(name)
    if has_position_table(config) and length > (max_positions(config) or 0):
        raise ValueError(
            f"the model has {max_positions(config)} positions, too few for a length of {length}: leave it out"
        )
