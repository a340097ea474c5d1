"""The sentinel ids: where they come from, their rows in the embedding, and their absence from every prediction.

Legend: V rows of the embedding, M model width, K slots of a span.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

FILE_NAME = "sentinels.json"


@dataclass(frozen=True)
class Sentinels:
    """Ids of the opening sentinel and of the slots that close a span, in order. They are ids, never text."""

    open_id: int
    slot_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "slot_ids", tuple(self.slot_ids))
        if not self.slot_ids or len(set(self.ids)) != len(self.ids) or min(self.ids) < 0:
            raise ValueError(f"sentinels need one opening id and slot ids, all different and >= 0, got {self.ids}")

    @property
    def slots(self) -> int:
        """K, entries that stay of a closed span."""
        return len(self.slot_ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """The opening id, then the slot ids."""
        return (self.open_id, *self.slot_ids)

    def save(self, folder: str | Path) -> None:
        """Write `sentinels.json` beside a model or an adapter."""
        content = {"open_id": self.open_id, "slot_ids": list(self.slot_ids)}
        (Path(folder) / FILE_NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Sentinels":
        """Read `sentinels.json` of a folder.

        Raises:
            FileNotFoundError: if the folder has none.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {FILE_NAME} in {folder}; it is saved with a model trained with sentinels")
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["open_id"], tuple(content["slot_ids"]))


def add_sentinels(
    model: PreTrainedModel,
    num_token_ids: int,
    *,
    slots: int = 1,
    init: Literal["mean", "zero"] = "mean",
    pad_to_multiple_of: int = 64,
    seed: int = 0,
) -> Sentinels:
    """Give a model sentinel ids: spare rows of its embedding, or new ones.

    With ``init="mean"`` the rows become the mean of the real rows plus noise of a tenth of their standard deviation, so
    that slots differ. With "zero" they are zero: behind a norm such a slot has no query, key or value of its own, so it
    starts as the average of its span in the first layer, and an opening sentinel as nothing.
    Every other row keeps its bits. The tokenizer is not touched.

    Args:
        model: Model whose embedding is changed in place.
        num_token_ids: Ids that the tokenizer can produce, ``len(tokenizer)``; the sentinels come right after them.
        slots: K.
        init: "mean" or "zero", as above.
        pad_to_multiple_of: If rows are missing, their number grows to the next multiple of this.
        seed: Seed of the noise; the global random state does not move.

    Raises:
        ValueError: if the embedding has fewer rows than the tokenizer has ids, or on slots < 1 or an unknown `init`.
    """
    if slots < 1 or pad_to_multiple_of < 1:
        raise ValueError(f"slots and pad_to_multiple_of must be at least 1, got {slots} and {pad_to_multiple_of}")
    if init not in ("mean", "zero"):
        raise ValueError(f"unknown init {init!r}, use 'mean' or 'zero'")
    num_rows = model.get_input_embeddings().weight.shape[0]
    if not 0 < num_token_ids <= num_rows:
        raise ValueError(
            f"num_token_ids must be len(tokenizer), at most the {num_rows} rows of the embedding, got {num_token_ids}"
        )
    sentinels = Sentinels(num_token_ids, tuple(range(num_token_ids + 1, num_token_ids + 1 + slots)))
    needed = num_token_ids + 1 + slots
    if needed > num_rows:
        _grow(model, -(-needed // pad_to_multiple_of) * pad_to_multiple_of, seed)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        real = weight[:num_token_ids].float()
        noise = torch.randn(1 + slots, real.shape[1], generator=torch.Generator().manual_seed(seed)).to(real.device)
        rows = real.mean(0) + 0.1 * real.std(0, correction=0) * noise
        weight[num_token_ids:needed] = rows.to(weight.dtype) if init == "mean" else 0.0
    return sentinels


def suppress(logits: Tensor, sentinels: Sentinels | None) -> Tensor:
    """Return a copy of logits ``[..., V]`` with the sentinel columns at -inf; gradients reach the others.

    A model without sentinels has nothing to hide: its logits come back as they are.
    """
    if sentinels is None:
        return logits
    columns = torch.tensor(sentinels.ids, device=logits.device)
    return logits.index_fill(-1, columns, float("-inf"))


def _grow(model: PreTrainedModel, num_rows: int, seed: int) -> None:
    """Resize input embedding and output head; the global random state stays where it was."""
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.resize_token_embeddings(num_rows, mean_resizing=False)
