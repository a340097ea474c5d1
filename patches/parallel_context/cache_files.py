"""Files of encoded contexts: one safetensors file, with the identity of the model that made it.

Notable: keys and values come back bit for bit; what layers and heads share is stored once and shared again.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.parallel_context.families import model_fingerprint

FORMAT = "longhaul piece cache 1"
PER_LAYER = ("keys", "values", "positions", "segments")
PLAIN = ("lengths", "source_pieces", "offsets", "mode", "piece_scores", "fingerprint")


def save_cache(cache: Any, path: str | Path) -> None:
    """Write a `PieceCache` to ``path``."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {"next_position": cache.next_position.contiguous()}
    links: dict[str, str] = {}
    stored: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for kind in PER_LAYER:
        for layer, tensor in enumerate(getattr(cache, kind)):
            name, known = f"{kind}.{layer}", (tensor.data_ptr(), tensor.shape, tensor.stride())
            if kind in ("positions", "segments") and known in stored:
                links[name] = stored[known]
                continue
            stored[known] = name
            shared = tensor.shape[1] > 1 and tensor.stride(1) == 0
            if shared:
                links[name + ".heads"] = str(tensor.shape[1])
            tensors[name] = (tensor[:, :1] if shared else tensor).clone(memory_format=torch.contiguous_format)
    plain = {name: getattr(cache, name) for name in PLAIN} | {"num_layers": cache.num_layers}
    metadata = {"format": FORMAT, "plain": json.dumps(plain), "links": json.dumps(links)}
    save_file(tensors, str(path), metadata=metadata)


def load_cache(path: str | Path, model: Any = None) -> dict[str, Any]:
    """Read the fields of a `PieceCache`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no cache, or that of another model.
    """
    from safetensors import SafetensorError, safe_open

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
    plain, links = json.loads(metadata["plain"]), json.loads(metadata["links"])
    if model is not None:
        _check_model(path, plain["fingerprint"], model_fingerprint(model))
    fields: dict[str, Any] = {name: plain[name] for name in PLAIN} | {"next_position": tensors["next_position"]}
    expanded: dict[str, Tensor] = {}
    for kind in PER_LAYER:
        names = [f"{kind}.{layer}" for layer in range(plain["num_layers"])]
        for name in names:
            source = links.get(name, name)
            if source not in expanded:
                heads = links.get(source + ".heads")
                tensor = tensors[source]
                expanded[source] = tensor if heads is None else tensor.expand(-1, int(heads), -1)
        fields[kind] = [expanded[links.get(name, name)] for name in names]
    return fields


def _check_model(path: str | Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if different:
        listed = ", ".join(f"{name} {found.get(name)!r} is not {expected.get(name)!r}" for name in different)
        raise ValueError(f"the piece cache at {path} was made by another model: {listed}")
