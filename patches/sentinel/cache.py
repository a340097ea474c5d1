"""A cache that removes entries for good, row by row, and knows what its entries are.

Legend: B batch, P physical entries, T columns of a call, L layers.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache

from patches.sentinel.cache_layer import EntryTable, EvictingLayer

HOLE = -1


class EvictingCache(Cache):
    """Keys and values of a batch whose rows lose entries independently.

    A column that is fed gets the next logical index, for ever; `evict` only changes where it lies. Kept entries of a
    row stay in order at the right, shorter rows have holes on the left. With holes the default masks of transformers
    are wrong: `sentinel(cache)` is the rule over physical entries.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=EvictingLayer)
        self._entries = EntryTable()
        self.num_seen = 0
        """Logical columns so far."""
        self.has_holes = False
        """Whether some row has a hole."""
        self.forget: Tensor | None = None
        """``[B]``, see `patches.rules_kinds.last_seen`; set while rows that forget are read."""

    @property
    def index(self) -> Tensor:
        """``[B, P]`` int64: logical index of each entry, -1 in holes."""
        return self._entries.fields[0]

    @property
    def kind(self) -> Tensor:
        """``[B, P]`` int64: PLAIN, OPEN or SLOT, -1 (PAD) in holes."""
        return self._entries.fields[1]

    @property
    def span(self) -> Tensor:
        """``[B, P]`` int64: span number, 0 outside, -1 in holes."""
        return self._entries.fields[2]

    @property
    def position_ids(self) -> Tensor:
        """``[B, P]`` int64: position, -1 in holes."""
        return self._entries.fields[3]

    @property
    def num_physical(self) -> int:
        """P, holes included."""
        return self._entries.length

    @property
    def num_kept(self) -> Tensor:
        """``[B]`` int64: entries of each row, without holes."""
        return (self.index != HOLE).sum(1)

    def append(self, *, kind: Tensor, span: Tensor, position_ids: Tensor, valid: Tensor | None = None) -> None:
        """Register the columns of the coming forward call.

        Args:
            kind: ``[B, T]``.
            span: ``[B, T]``.
            position_ids: ``[B, T]``.
            valid: bool ``[B, T]``; False makes a hole. None = all valid.
        """
        if self._pending():
            raise ValueError(f"{self._pending()} columns were appended without a forward call; run it first")
        index = torch.arange(self.num_seen, self.num_seen + kind.shape[1], device=kind.device).expand_as(kind)
        fields = torch.stack([index, kind.long(), span.long(), position_ids.long()])
        if valid is not None:
            fields = fields.masked_fill(~valid, HOLE)
            self.has_holes = self.has_holes or not bool(valid.all())
        self._entries.append(fields)
        self.num_seen += kind.shape[1]

    def renumber(self, chosen: Tensor, span: Tensor) -> None:
        """Put entries under a span number: bool ``[B, P]`` and ``[B, 1]``."""
        self.span.copy_(torch.where(chosen, span, self.span))

    def evict(self, keep: Tensor) -> None:
        """Remove all entries but those of ``keep`` bool [B, P], and free their memory.

        Kept entries move, in order, to the right; P becomes the number of the fullest row.
        """
        if self._pending() or keep.shape != self.index.shape:
            raise ValueError(
                f"keep must be bool [B, P] = {list(self.index.shape)} after the forward call, got {list(keep.shape)}"
            )
        keep = keep & (self.index != HOLE)
        counts = keep.sum(1)
        least, most = (int(count) for count in counts.aminmax()) if counts.numel() else (0, 0)
        order = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, keep.shape[1] - most :]
        hole = torch.arange(most, device=keep.device) < most - counts[:, None]
        fields = self._entries.fields.gather(2, order.expand(4, -1, -1)).masked_fill(hole, HOLE)
        self._entries, self.has_holes = EntryTable(fields), least < most
        for layer in self.layers:
            layer.select(order)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values ``[B, H, T, D]`` of a layer; columns that nobody appended count as plain tokens."""
        if layer_idx == 0:
            new, pending = key_states.shape[2], self._pending()
            if not pending:
                row = torch.zeros(key_states.shape[0], new, dtype=torch.int64, device=key_states.device)
                position = torch.arange(self.num_seen, self.num_seen + new, device=row.device).expand_as(row)
                self.append(kind=row, span=row, position_ids=position)
            elif pending != new:
                raise ValueError(f"append announced {pending} columns, the forward call brought {new}")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _physical(self, layer_idx: int) -> int:
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def _pending(self) -> int:
        """Columns that were appended and whose keys have not come yet."""
        return self.num_physical - self._physical(0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the logical length: all columns that a layer has seen, evicted ones too."""
        return self.num_seen - (self.num_physical - self._physical(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys of a coming call and the logical index that the first of them stands for."""
        physical = self._physical(layer_idx)
        return physical + query_length, self.get_seq_length(layer_idx) - physical

    def reset(self) -> None:
        """Forget everything and free the memory."""
        super().reset()
        self._entries, self.num_seen, self.has_holes = EntryTable(), 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` columns, as long as none before them has been evicted since.

        Raises:
            ValueError: on a positive number, or if the columns are not all there any more.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of columns to remove as a negative count, got {tokens_to_remove}")
        if tokens_to_remove == 0:
            return
        tail = self.index[:, tokens_to_remove:]
        wanted = torch.arange(self.num_seen + tokens_to_remove, self.num_seen, device=tail.device)
        if -tokens_to_remove > self.num_physical or not bool(((tail == wanted) | (tail == HOLE)).all()):
            raise ValueError(f"cannot crop {-tokens_to_remove} columns: some of them were evicted; fork before instead")
        self._entries = EntryTable(self._entries.fields[:, :, :tokens_to_remove].clone())
        self.num_seen += tokens_to_remove
        self.has_holes = bool((self.index == HOLE).any())
        super().crop(tokens_to_remove)

    def _choose_rows(self, rows: Tensor) -> None:
        fields = self._entries.fields
        self._entries = EntryTable(fields.index_select(1, rows.to(fields.device)))
        self.has_holes = bool((self.index == HOLE).any())
        for layer in self.layers:
            layer.choose_rows(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by rows of it ``[B']``."""
        self._choose_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows ``[B']`` of the batch, as numbers or as a bool mask."""
        self._choose_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._choose_rows(torch.arange(self.index.shape[0]).repeat_interleave(repeats))

    def nbytes(self) -> int:
        """Bytes of keys and values, holes included."""
        return sum(layer.nbytes() for layer in self.layers)

    def allocated_bytes(self) -> int:
        """Bytes of keys and values with the slack behind them."""
        return sum(layer.allocated_bytes() for layer in self.layers)

    def fork(self) -> "EvictingCache":
        """Return an independent copy."""
        return self.from_state({name: tensor.clone() for name, tensor in self.state().items()}, self.num_seen)

    def state(self) -> dict[str, Tensor]:
        """Return views that, with `num_seen`, are the cache: entries ``[4, B, P]``, keys, values ``[B, H, P, D]``."""
        tensors = {"entries": self._entries.fields}
        for number, layer in enumerate(self.layers):
            if layer.is_initialized:
                tensors |= {f"keys.{number}": layer.keys.detach(), f"values.{number}": layer.values.detach()}
        return tensors

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], num_seen: int) -> "EvictingCache":
        """Build a cache that holds the tensors of `state`: ``[4, B, P]`` and ``[B, H, P, D]``."""
        cache = cls()
        if tensors["entries"].shape[1]:
            cache._entries, cache.num_seen = EntryTable(tensors["entries"]), num_seen
        cache.has_holes = bool((cache.index == HOLE).any())
        while f"keys.{len(cache.layers)}" in tensors:
            layer, number = EvictingLayer(), len(cache.layers)
            layer.dtype, layer.device = tensors[f"keys.{number}"].dtype, tensors[f"keys.{number}"].device
            layer.hold(tensors[f"keys.{number}"], tensors[f"values.{number}"])
            cache.layers.append(layer)
        return cache

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file."""
        write_tensors(path, self.state(), {"num_seen": str(self.num_seen)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "EvictingCache":
        """Read a cache that `save` wrote, bit for bit."""
        tensors, metadata = read_tensors(path, device)
        return cls.from_state(tensors, int(metadata["num_seen"]))


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any shape ``[...]`` and metadata to one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def read_tensors(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors ``[...]`` and the metadata that `write_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or cut off.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no saved cache at {path}")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or holds no cache ({error}): make it again") from error
