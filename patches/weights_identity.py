"""What tells two models of one shape apart: a few values of every weight.

Legend: V vocabulary, M model width, N ids.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SAMPLES = 8


@torch.no_grad()
def weights_digest(model: nn.Module, token_ids: Sequence[int] = ()) -> str:
    """Return ``sha256:`` over the shapes and some values of all weights, evenly spaced, rounded to bfloat16.

    Cheap enough for every context: nothing but these values leaves the device. Any training changes it; loading in
    another precision does not, but for float16, which rounds otherwise.

    Args:
        model: any model; weights without storage count by their shapes, those in slices over processes by the slice
            that this one holds.
        token_ids: rows ``[N, M]`` of the input embedding ``[V, M]`` that count as weights of their own.
    """
    weights = [_held(weight.detach()) for weight in model.parameters()]
    if token_ids:
        embedding = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        weights += [embedding[token_id] for token_id in token_ids]
    hasher = hashlib.sha256(repr([tuple(weight.shape) for weight in weights]).encode())
    for device in sorted({str(weight.device) for weight in weights if not weight.is_meta}):
        picked = [_picked(weight) for weight in weights if str(weight.device) == device and weight.numel()]
        hasher.update(repr(torch.cat(picked).float().tolist() if picked else []).encode())
    return f"sha256:{hasher.hexdigest()}"


def _held(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight ``[...]`` that may lie in slices over several."""
    held: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[operator]
    return held


def _picked(weight: Tensor) -> Tensor:
    """Return some values ``[n]`` of a weight ``[...]``, the first and the last among them, bfloat16."""
    flat = weight.reshape(-1)
    count = min(SAMPLES, len(flat))
    places = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(1, count - 1)
    return flat[places].to(torch.bfloat16)
