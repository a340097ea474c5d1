"""Summaries of batches of prompts: left-padded, cached, ended by the end-of-text token.

B rows of a batch, P tokens of its longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: tokens of a summary at most, its end counted.
        temperature: 0 takes the likeliest token, above tokens are drawn.
        top_k: draw among so many of the likeliest; None: among all.
        seed: of the draws; batch b draws from (seed, b).

    Raises:
        ValueError: a number out of range, or options of drawing without drawing.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(f"max_new_tokens and top_k must be at least 1, got {self.max_new_tokens} and {self.top_k}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (likeliest token) or above, got {self.temperature}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.temperature == 0 and self.top_k is not None:
            raise ValueError(f"top_k={self.top_k} has no effect at temperature 0: leave it out, or pass a temperature")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k or 0}
        return drawn | {"max_new_tokens": self.max_new_tokens}


def generate_batch(
    model: Any,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    *,
    number: int,
    eos_token_id: int,
    forbidden: Sequence[int] = (),
) -> list[list[int]]:
    """Continue the prompts of a batch; return what each got, its end-of-text token included where it came to one.

    Args:
        model: Hugging Face model, on the device where it stands.
        prompts: token ids.
        decoding: how tokens are chosen.
        number: of the batch, for its draws.
        eos_token_id: ends a summary.
        forbidden: ids that are never chosen.
    """
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = np.full((len(prompts), longest), eos_token_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    torch.manual_seed(int(np.random.SeedSequence([decoding.seed, number]).generate_state(1, np.uint64)[0] >> 1))
    with torch.inference_mode():
        output = model.generate(
            torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,  # what fills rows that have ended
            suppress_tokens=list(forbidden) or None,
            **decoding.arguments(),
        )
    return [_until_end(row, eos_token_id) for row in output[:, longest:].tolist()]


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
