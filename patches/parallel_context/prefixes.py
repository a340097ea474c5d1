"""What stands in front of all pieces: a BOS, a published text, or any other text."""

import warnings
from typing import Any

PREFIX_TEXTS = {
    "p1": "Given the following partial context, predicting the next sequence of words:\n\n",
    "p1_task": "Given the following contexts, answer the final question accordingly:\n\n",
    "p2": "\n\n",
}
"""The published prefixes, byte for byte (arXiv 2412.16545)."""


def prefix_token_ids(prefix: str | None, *, bos: bool, repeat: int, tokenizer: Any, config: Any) -> list[int]:
    """Return the token ids of a prefix option.

    Args:
        prefix: None (empty), "bos", a name of `PREFIX_TEXTS`, or any other text.
        bos: Whether texts get the tokenizer's BOS in front.
        repeat: How often the text (or the BOS) is repeated.
        tokenizer: A tokenizer, or None.
        config: The model's text configuration, for its BOS without a tokenizer.

    Raises:
        ValueError: If a text is asked for without a tokenizer, or a BOS that is not known.
    """
    if prefix is None:
        return []
    bos_id = getattr(config, "bos_token_id", None) if tokenizer is None else tokenizer.bos_token_id
    if prefix == "bos" and bos_id is not None:
        return [bos_id] * repeat
    if prefix == "bos" and tokenizer is None:
        raise ValueError(
            "prefix='bos' needs a tokenizer or a bos_token_id in the model's configuration; try prefix=None"
        )
    if tokenizer is None:
        raise ValueError(f"the prefix text {prefix!r} needs a tokenizer: bind(model, tokenizer)")
    if prefix == "bos":
        warnings.warn("the tokenizer has no BOS: the prefix is a blank line (p2)", stacklevel=2)
        prefix = "p2"
    text = PREFIX_TEXTS.get(prefix, prefix) * repeat
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [bos_id, *ids] if bos and bos_id is not None else ids
