"""Retrieval by a frozen text encoder, in the manner of Contriever: mean-pooled vectors, inner products.

Legend: B batch, N chunks, S tokens of a chunk, K neighbours, n texts, L their tokens, M width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.gca import retrieve_chunks

# Vectors of chunks that were already encoded; decoding asks for all earlier ones with every new chunk.
MAX_REMEMBERED = 2**16


class MeanPooledEncoder:
    """A frozen encoder whose vector of a text is the mean of its last hidden states.

    Args:
        model: A Hugging Face encoder.
        tokenizer: Its tokenizer, to encode text; None: it is given token ids.
        batch_size: Texts of a forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, batch_size: int = 64) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.batch_size = tokenizer, batch_size

    @classmethod
    def from_pretrained(cls, path: str, *, text: bool) -> MeanPooledEncoder:
        """Load an encoder by folder or name, with its tokenizer if it is to read text.

        Raises:
            OSError: there is no such model.
        """
        from transformers import AutoModel, AutoTokenizer

        return cls(AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path) if text else None)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Return float32 vectors ``[n, M]`` of n texts, or of token ids ``[n, L]``."""
        parts = [
            self._encode(texts[start : start + self.batch_size]) for start in range(0, len(texts), self.batch_size)
        ]
        return torch.cat(parts)

    def _encode(self, texts: Sequence[str] | Tensor) -> Tensor:
        device = self.model.device
        if isinstance(texts, Tensor):
            ids = texts.to(device)
            mask = torch.ones_like(ids)
        else:
            batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
            ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.autocast(device.type, enabled=False):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        kept = mask[..., None].float()
        return (hidden * kept).sum(1) / kept.sum(1).clamp_min(1.0)


class DenseRetriever:
    """Neighbours by the inner product of vectors of chunks.

    Args:
        encode: Vectors ``[n, M]`` of a list of n texts, or, without a tokenizer, of token ids ``[n, S]``.
        tokenizer: The language model's tokenizer, through which chunks become text.
    """

    def __init__(self, encode: Callable[[Any], Tensor], tokenizer: Any = None) -> None:
        self.encode, self.tokenizer = encode, tokenizer
        self._remembered: dict[bytes, Tensor] = {}

    def __call__(self, chunk_tokens: Tensor, top_k: int, visible: Tensor) -> Tensor:
        """Return the neighbours ``[B, N, K]``. See ``models.rpt.retrievers.Retriever``."""
        vectors = self._vectors(chunk_tokens.flatten(0, 1)).unflatten(0, chunk_tokens.shape[:2])
        return retrieve_chunks(vectors, vectors, top_k, visible=visible)[0]

    def _vectors(self, chunks: Tensor) -> Tensor:
        """Return the vectors ``[n, M]`` of chunks ``[n, S]``; only new ones are encoded."""
        keys = [row.numpy().tobytes() for row in chunks.cpu()]
        new = {key: place for place, key in enumerate(keys) if key not in self._remembered}
        known = {key: self._remembered[key] for key in keys if key not in new}
        if new:
            missing = chunks[list(new.values())]
            texts = missing if self.tokenizer is None else self.tokenizer.batch_decode(missing.tolist())
            known.update(zip(new, self.encode(texts).to(chunks.device), strict=True))
        if len(self._remembered) + len(new) > MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered.update(known)
        return torch.stack([known[key].to(chunks.device) for key in keys])
