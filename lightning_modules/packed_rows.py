"""How a model is told which tokens of a row belong to one document.

B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from losses.output_head import causal_lm_of


def document_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of a causal LM that keep the documents of a batch apart.

    The suite's models take ``document_ids``. Transformers' decoders swallow that name without effect; they keep
    apart what position ids that begin anew say, in rows without a mask and without a cache.

    Args:
        model: the causal LM, PEFT-wrapped or not.
        batch: ``input_ids`` and ``document_ids`` int64 [B, T].

    Raises:
        ValueError: the model has no positions to begin anew, or the rows are padded.
    """
    documents = batch["document_ids"]
    parameters = inspect.signature(causal_lm_of(model).forward).parameters
    if "document_ids" in parameters:
        return {"document_ids": documents}
    if "position_ids" not in parameters or "attention_mask" in batch:
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__} cannot keep packed documents apart"
            f"{' in padded rows' if 'position_ids' in parameters else ''}: use data.documents=stream"
        )
    return {"position_ids": restarting_positions(documents)}


def restarting_positions(document_ids: Tensor) -> Tensor:
    """Positions int64 [B, T] that count from 0 in every document.

    ``p[t] = t - max {s <= t : s = 0 or d[s] != d[s - 1]}``

    Args:
        document_ids: int64 [B, T].
    """
    at = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.zeros_like(at)
    begins[:, 1:] = at[:, 1:] * (document_ids[:, 1:] != document_ids[:, :-1])
    return at - begins.cummax(dim=1).values
