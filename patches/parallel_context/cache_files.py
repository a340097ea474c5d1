"""Files of encoded contexts: one safetensors file, with the identity of the model that made it.

Notable: keys and values come back bit for bit; what layers and heads share is stored once and shared again.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patches.parallel_context.families import model_fingerprint

FORMAT = "longhaul piece cache 1"
PER_LAYER = ("keys", "values", "positions", "segments", "received")
PLAIN = ("lengths", "source_pieces", "offsets", "mode", "piece_scores", "fingerprint")


def save_cache(cache: Any, path: str | Path) -> None:
    """Write a `PieceCache` to ``path``."""
    tensors: dict[str, Tensor] = {"next_position": cache.next_position.contiguous()}
    sources: dict[str, list[str]] = {}
    heads: dict[str, int] = {}
    for kind in PER_LAYER:
        known: dict[tuple[int, torch.Size], str] = {}
        sources[kind] = []
        for layer, tensor in enumerate(getattr(cache, kind) or ()):
            name = known.setdefault((tensor.data_ptr(), tensor.shape), f"{kind}.{layer}")
            sources[kind].append(name)
            if name in tensors:
                continue
            heads[name] = tensor.shape[1]
            shared = tensor.shape[1] > 1 and tensor.stride(1) == 0
            tensors[name] = (tensor[:, :1] if shared else tensor).contiguous()
    plain = {name: getattr(cache, name) for name in PLAIN}
    metadata = {"format": FORMAT, "plain": json.dumps(plain), "sources": json.dumps(sources)}
    save_file(tensors, str(path), metadata=metadata | {"heads": json.dumps(heads)})


def load_cache(path: str | Path, model: Any = None) -> dict[str, Any]:
    """Read the fields of a `PieceCache`, to the device of ``model`` if given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no cache, or that of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no piece cache at {path}")
    device = "cpu" if model is None else str(next(model.parameters()).device)
    try:
        with safe_open(str(path), "pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no piece cache of this version; encode the context again")
    plain, sources, heads = (json.loads(metadata[name]) for name in ("plain", "sources", "heads"))
    if model is not None:
        _check_model(path, plain["fingerprint"], model_fingerprint(model))
    full = {name: tensors[name].expand(-1, count, *tensors[name].shape[2:]) for name, count in heads.items()}
    fields: dict[str, Any] = {name: plain[name] for name in PLAIN}
    fields["next_position"] = tensors["next_position"].cpu()
    for kind in PER_LAYER:
        fields[kind] = [full[name] for name in sources[kind]] or None
    return fields


def _check_model(path: str | Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if different:
        listed = ", ".join(f"{name} {found.get(name)!r} is not {expected.get(name)!r}" for name in different)
        raise ValueError(f"the piece cache at {path} was made by another model: {listed}")
