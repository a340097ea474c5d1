"""BERTScore: how well the tokens of a text match those of its reference in the hidden states of an encoder.

Legend: B texts of a batch, S tokens of a text, R tokens of its reference, M width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Any, dict[str, Tensor]], Tensor]


class BertScore:
    """Score texts with an encoder (arXiv 1904.09675), without idf and without rescaling.

    Args:
        encoder: folder or hub name of an encoder, or a model (then ``tokenizer`` is its own).
        num_layers: layer whose hidden states count; None is the last. 17 of ``roberta-large`` is the usual choice.
        tokenizer: of a model that is given; called with texts, it returns ``input_ids``, ``attention_mask`` and
            ``special_tokens_mask``.
        forward: computes hidden states ``[B, S, M]`` from the model and the encoded texts; None: those of the layer.
        batch_size: texts of a forward.
        max_length: tokens of a text that count; None is the encoder's limit.
        device: where the encoder runs.

    Raises:
        ValueError: the encoder has fewer layers, a model without tokenizer, or a number below 1.
        OSError: there is no such encoder.
    """

    def __init__(
        self,
        encoder: Any = "roberta-large",
        *,
        num_layers: int | None = None,
        tokenizer: Any = None,
        forward: Forward | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        device: str = "cpu",
    ):
        if batch_size < 1 or (num_layers is not None and num_layers < 1):
            raise ValueError(f"batch_size and num_layers must be at least 1, got {batch_size} and {num_layers}")
        if not isinstance(encoder, str) and tokenizer is None:
            raise ValueError("an encoder that is given needs its tokenizer")
        self.name, self.num_layers, self.batch_size = str(encoder), num_layers, batch_size
        self.device = torch.device(device)
        if isinstance(encoder, str):
            from transformers import AutoModel, AutoTokenizer

            encoder, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        found = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
        if forward is None and num_layers is not None and found is not None and num_layers > found:
            raise ValueError(f"num_layers={num_layers} but the encoder {self.name} has {found}")
        self.model, self.tokenizer, self.forward = encoder.to(self.device).eval(), tokenizer, forward
        limit = max_length or getattr(tokenizer, "model_max_length", None)
        self.max_length = limit if limit is not None and limit < 1 << 20 else 512

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Return the F1 of each text with its reference.

        Precision is the mean over the tokens of the text of the best cosine with a token of the reference, recall the
        mean over those of the reference; special tokens may be matched but are not counted.

        Raises:
            ValueError: lists of different lengths.
        """
        if len(predictions) != len(references):
            raise ValueError(f"each text needs one reference, got {len(predictions)} texts and {len(references)}")
        scores: list[float] = []
        for first in range(0, len(predictions), self.batch_size):
            part = slice(first, first + self.batch_size)
            scores += match(self._encode(predictions[part]), self._encode(references[part])).tolist()
        return scores

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised states ``[B, S, M]``, what may be matched and what counts, bool ``[B, S]``."""
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        encoded = dict(self.tokenizer(list(texts), return_special_tokens_mask=True, **options))
        special = encoded.pop("special_tokens_mask").to(self.device) != 0
        encoded = {name: tensor.to(self.device) for name, tensor in encoded.items()}
        if self.forward is not None:
            states = self.forward(self.model, encoded)
        else:
            hidden = self.model(**encoded, output_hidden_states=True).hidden_states
            states = hidden[-1 if self.num_layers is None else self.num_layers]
        there = encoded["attention_mask"] != 0
        return F.normalize(states.float(), dim=-1), there, there & ~special


def match(one: tuple[Tensor, Tensor, Tensor], two: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the F1 ``[B]`` of texts and references, each given as states, what may be matched, what counts."""
    cosine = one[0] @ two[0].transpose(1, 2)
    cosine = cosine.masked_fill(~(one[1][:, :, None] & two[1][:, None, :]), -2.0)
    precision, recall = (
        (cosine.amax(dim) * counted).sum(1) / counted.sum(1).clamp(min=1) for dim, counted in ((2, one[2]), (1, two[2]))
    )
    return torch.nan_to_num(2 * precision * recall / (precision + recall))
