"""What a tokenizer is, as one digest: equal wherever it lies and whatever it is called."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from datamodules.corpus_format import digest

if TYPE_CHECKING:
    # Importing transformers takes seconds, and encoding processes import this module without needing it.
    from transformers import PreTrainedTokenizerFast

IDENTITY_PREFIX = "sha256:"


def canonical_backend(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return ``tokenizer.json`` in one form: sorted keys, without the state of the last call (padding, truncation)."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(content | {"padding": None, "truncation": None}, sort_keys=True)


def tokenizer_identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return ``sha256:...`` of what the tokenizer does, whatever its path or name."""
    return f"{IDENTITY_PREFIX}{digest(json.loads(canonical_backend(tokenizer)))}"
