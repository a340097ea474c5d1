"""The encoded context: keys and values of prefix and pieces, with positions and segments of every slot.

Notable: kv heads are never repeated, and the prefix is stored once per row. Until slots are evicted head by head,
positions and segments are one small tensor, expanded over layers and heads.

Legend: B batch, L layers, G kv heads, N key slots, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.parallel_context.cache_files import load_cache, save_cache
from patches.parallel_context.key_groups import UNUSED, Counts, KeyPart, count_groups
from patches.parallel_context.positions import next_position


@dataclass
class PieceCache:
    """Keys and values of a batch of contexts; build it by `encode` of a bound `ParallelContext`."""

    keys: list[Tensor]
    """Per layer ``[B, G, N, D]``; slots sorted by segment, unused ones last."""
    values: list[Tensor]
    positions: list[Tensor]
    """Per layer ``[B, G, N]``, int64 (float64 with fractional positions)."""
    segments: list[Tensor]
    """Per layer ``[B, G, N]`` int64: 0 prefix, 1 .. K pieces, -2 unused."""
    next_position: Tensor
    """``[B]``: position of the first query token."""
    lengths: list[list[int]]
    """Tokens of each piece of each row, as encoded."""
    source_pieces: list[list[int]]
    """Per row, the numbers (from 1) that its pieces had in `encode`."""
    offsets: list[int]
    """Prefix length of each row."""
    mode: str
    """Position mode."""
    piece_scores: list[list[float] | None] | None = None
    """Per row, the mean NLL of the query after each piece that was encoded, dropped ones included."""
    received: list[Tensor] | None = None
    """Per layer ``[B, G, N]`` float32 or better: attention a slot received from the context, for H2O over a prompt."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """What identifies the model."""

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.keys)

    @property
    def num_pieces(self) -> list[int]:
        """Pieces of each row."""
        return [len(row) for row in self.lengths]

    @property
    def offset(self) -> int:
        """Prefix length, where all rows have the same."""
        if len(set(self.offsets)) > 1:
            raise ValueError(f"the rows have prefixes of different lengths, {self.offsets}; read offsets")
        return self.offsets[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def parts(self) -> list[KeyPart]:
        """Return every layer as a part of an attention call; layers with the same slots share their counts."""
        known: dict[tuple[int, torch.Size], tuple[tuple[Counts, ...], ...]] = {}
        parts = []
        for keys, values, places, segments in zip(self.keys, self.values, self.positions, self.segments, strict=True):
            name = (segments.data_ptr(), segments.shape)
            if name not in known:
                counts = count_groups(one_head(segments), max(self.num_pieces, default=0))
                known[name] = tuple(tuple(head[:-1] for head in row) for row in counts)
            parts.append(KeyPart(keys, values, known[name], one_head(places)))
        return parts

    def select(self, keep: Sequence[int] | Sequence[Sequence[int]]) -> "PieceCache":
        """Keep some pieces, in document order.

        Positions stay; the next position is recomputed from the kept lengths in the L modes and stays otherwise.

        Args:
            keep: Numbers from 1, in any order; one list for all rows or one per row.

        Raises:
            ValueError: If a row has no such piece, or a number is given twice.
        """
        rows = _numbers(keep, self.num_pieces)
        table = torch.full((len(rows), max(self.num_pieces, default=0) + 1), UNUSED)
        table[:, 0] = 0
        for row, numbers in enumerate(rows):
            table[row, numbers] = torch.arange(1, len(numbers) + 1)
        index, renamed = [], []
        for segments in map(one_head, self.segments):
            known = table.to(segments.device)[:, None].expand(-1, segments.shape[1], -1)
            names = known.gather(-1, segments.clamp_min(0)).masked_fill(segments == UNUSED, UNUSED)
            order = torch.sort((names == UNUSED).byte(), dim=-1, stable=True).indices
            width = int((names != UNUSED).sum(-1).max()) if names.numel() else 0
            index.append(order[..., :width])
            renamed.append(names)
        lengths = [[self.lengths[row][number - 1] for number in numbers] for row, numbers in enumerate(rows)]
        source = [[self.source_pieces[row][number - 1] for number in numbers] for row, numbers in enumerate(rows)]
        following = self.next_position.clone()
        if self.mode[-1] == "L":
            exact = following.is_floating_point()
            for row, (kept, offset) in enumerate(zip(lengths, self.offsets, strict=True)):
                following[row] = next_position(kept, self.mode, offset, fractional=exact)
        taken = replace(self, segments=renamed)._take(index)
        return replace(taken, lengths=lengths, source_pieces=source, next_position=following)

    def evict(self, keep: Sequence[Tensor]) -> "PieceCache":
        """Keep some slots, head by head; the rest is really removed.

        Args:
            keep: Per layer ``[B, G, n]`` int64 slots; n may differ between layers.
        """
        if len(keep) != self.num_layers:
            raise ValueError(f"evict needs the slots to keep of each of {self.num_layers} layers, got {len(keep)}")
        for slots, keys in zip(keep, self.keys, strict=True):
            if slots.shape[:2] != keys.shape[:2] or slots.dim() != 3:
                raise ValueError(f"slots must be [B, G, n] = {[*keys.shape[:2], 'n']}, got {list(slots.shape)}")
        return self._take([slots.to(keys.device).sort(-1).values for slots, keys in zip(keep, self.keys, strict=True)])

    def _take(self, index: Sequence[Tensor]) -> "PieceCache":
        """Return the cache of the slots ``[B, G or 1, n]`` of each layer."""
        parts: dict[str, list[Tensor]] = {"keys": [], "values": [], "positions": [], "segments": []}
        parts |= {} if self.received is None else {"received": []}
        for layer, slots in enumerate(index):
            shape = (*self.keys[layer].shape[:2], slots.shape[-1])
            full = slots.expand(shape)[..., None].expand(*shape, self.keys[layer].shape[-1])
            parts["keys"].append(self.keys[layer].gather(2, full))
            parts["values"].append(self.values[layer].gather(2, full))
            for name in ("positions", "segments"):
                places = one_head(getattr(self, name)[layer])
                places = places.expand(-1, max(slots.shape[1], places.shape[1]), -1)
                parts[name].append(places.gather(-1, slots.expand(*places.shape[:2], -1)).expand(shape))
            if self.received is not None:
                parts["received"].append(self.received[layer].gather(-1, slots.expand(shape)))
        return replace(self, **parts)  # type: ignore[arg-type]

    def row(self, number: int) -> "PieceCache":
        """Return one row, without unused slots at its end."""
        rows = slice(number, number + 1)
        widths = [int((x[rows] != UNUSED).sum(-1).max()) for x in self.segments]

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [x[rows, :, :width] for x, width in zip(tensors, widths, strict=True)]

        return replace(
            self,
            keys=cut(self.keys),
            values=cut(self.values),
            positions=cut(self.positions),
            segments=cut(self.segments),
            received=None if self.received is None else cut(self.received),
            next_position=self.next_position[rows],
            lengths=self.lengths[rows],
            source_pieces=self.source_pieces[rows],
            offsets=self.offsets[rows],
            piece_scores=None if self.piece_scores is None else self.piece_scores[rows],
        )

    def rows(self) -> "list[PieceCache]":
        """Return every row by itself."""
        return [self.row(number) for number in range(self.batch_size)]

    @staticmethod
    def stack(caches: "Sequence[PieceCache]") -> "PieceCache":
        """Put caches of one model and position mode together as the rows of one batch."""
        first = caches[0]
        for other in caches:
            if (other.mode, other.num_layers) != (
                first.mode,
                first.num_layers,
            ) or other.fingerprint != first.fingerprint:
                raise ValueError("only caches of the same model and position mode can be stacked")

        def joined(name: str, fill: float) -> list[Tensor]:
            layers = zip(*(getattr(cache, name) for cache in caches), strict=True)
            known: dict[tuple[int, ...], Tensor] = {}  # what layers share is stacked once
            return [_stack_padded(tensors, fill, known) for tensors in layers]

        scores = None
        if any(cache.piece_scores for cache in caches):
            scores = [row for cache in caches for row in cache.piece_scores or [None] * cache.batch_size]
        return replace(
            first,
            keys=joined("keys", 0),
            values=joined("values", 0),
            positions=joined("positions", 0),
            segments=joined("segments", UNUSED),
            received=joined("received", 0) if all(cache.received is not None for cache in caches) else None,
            next_position=torch.cat([cache.next_position for cache in caches]),
            lengths=[row for cache in caches for row in cache.lengths],
            source_pieces=[row for cache in caches for row in cache.source_pieces],
            offsets=[row for cache in caches for row in cache.offsets],
            piece_scores=scores,
        )

    def mix(self, other: "PieceCache", *, keys: bool = True, values: bool = False) -> "PieceCache":
        """Replace the keys or values by those of a cache of the same layout."""
        same = [a.shape == b.shape for a, b in zip(self.keys, other.keys, strict=False)]
        same += [torch.equal(a, b) for a, b in zip(self.segments, other.segments, strict=False)]
        if self.num_layers != other.num_layers or not all(same):
            raise ValueError("mix needs two caches with the same layers, rows and slots")
        return replace(self, keys=other.keys if keys else self.keys, values=other.values if values else self.values)

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file."""
        save_cache(self, path)

    @classmethod
    def load(cls, path: str | Path, *, model: Any = None) -> "PieceCache":
        """Read a cache, to the device of ``model`` if given.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds no cache, or that of another model.
        """
        return cls(**load_cache(path, model))


def one_head(x: Tensor) -> Tensor:
    """Return ``[B, 1, N]`` of a tensor that is expanded over the heads, else the tensor itself."""
    return x[:, :1] if x.shape[1] > 1 and x.stride(1) == 0 else x


def key_norms(cache: PieceCache) -> list[Tensor]:
    """Return the Euclidean norm of every key, per layer ``[B, G, N]`` (0 where unused), float32 or better."""
    return _norms(cache.keys, cache.segments)


def value_norms(cache: PieceCache) -> list[Tensor]:
    """Return the Euclidean norm of every value, per layer ``[B, G, N]`` (0 where unused), float32 or better."""
    return _norms(cache.values, cache.segments)


def _norms(tensors: list[Tensor], segments: list[Tensor]) -> list[Tensor]:
    return [
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)) * (ids != UNUSED)
        for x, ids in zip(tensors, segments, strict=True)
    ]


def _stack_padded(tensors: Sequence[Tensor], fill: float, known: dict[tuple[int, ...], Tensor]) -> Tensor:
    """Stack ``[B, G, N, ...]`` of different N along the rows."""
    name = tuple(x.data_ptr() for x in tensors)
    if name not in known:
        width, heads = max(x.shape[2] for x in tensors), tensors[0].shape[1]
        single = all(one_head(x).shape[1] == 1 for x in tensors)
        rows = [
            torch.nn.functional.pad(
                one_head(x) if single else x, (0, 0) * (x.dim() - 3) + (0, width - x.shape[2]), value=fill
            )
            for x in tensors
        ]
        known[name] = torch.cat(rows).expand(-1, heads, *rows[0].shape[2:])
    return known[name]


def _numbers(keep: Sequence[int] | Sequence[Sequence[int]], num_pieces: list[int]) -> list[list[int]]:
    """Return the numbers to keep of every row, ascending."""
    nested = any(not isinstance(item, int) for item in keep)
    rows: list[list[int]] = [sorted(row) for row in keep] if nested else [sorted(keep) for _ in num_pieces]  # type: ignore
    if len(rows) != len(num_pieces):
        raise ValueError(f"select needs one list of pieces per row, {len(num_pieces)}, got {len(rows)}")
    for row, (numbers, most) in enumerate(zip(rows, num_pieces, strict=True)):
        if len(set(numbers)) < len(numbers) or any(not 1 <= number <= most for number in numbers):
            raise ValueError(f"row {row} has pieces 1 .. {most}; select each at most once, got {numbers}")
    return rows
