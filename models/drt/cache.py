"""The cache of a DRT: window keys and values, the running chunk, the chunk memory, and what was retrieved from it.

Legend: B batch, T text tokens, P positions, S text tokens of a chunk, R complete chunks of a call, E stored chunks,
G query groups, K retrieved chunks, M model width.
"""

from collections.abc import Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from models.drt.chunk_store import ChunkStore, Fetched
from models.drt.configuration_drt import DRTConfig
from models.drt.layout import GridLayout, IndexedLayout
from models.drt.layout_maps import grid_layout, segment_layout
from models.drt.retrieval import ChunkMemory, Retrieved
from models.rows import RowProgress, Spans, take
from models.window_cache import WindowRing

Layouts = GridLayout | IndexedLayout


class _Call:
    """What a cache notes about the forward call in progress."""

    def __init__(self, layout: Layouts, spans: Spans, past: list[int], chunk_size: int) -> None:
        self.layout = layout
        self.spans = spans
        self.past = past
        self.done = [count // chunk_size for count in past]
        self.after = [count + new for count, new in zip(past, spans.lengths, strict=True)]
        self.new_chunks = [count // chunk_size - done for count, done in zip(self.after, self.done, strict=True)]

    @property
    def finds(self) -> bool:
        """Whether any chunk completed in this call has an earlier one to retrieve."""
        return any(new and done + new > 1 for done, new in zip(self.done, self.new_chunks, strict=True))


class DRTCache(Cache):
    """State of a batch of sequences that a DRT continues, exact for pieces of any length."""

    def __init__(self, config: DRTConfig, *, offload: bool = False) -> None:
        """Start empty.

        Args:
            config: Configuration of the model.
            offload: Keep chunk keys and values in (pinned) host memory.
        """
        super().__init__(layers=[])
        self.config = config
        self.offload = offload
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        config = self.config
        self.ring = WindowRing(config.num_hidden_layers, config.window_size)
        self.progress = RowProgress()
        self.store = ChunkStore(offload=self.offload)
        self.pending: Tensor | None = None
        self._landmarks: Tensor | None = None
        self._found: list[tuple[Fetched, Tensor] | None] = [None] * len(config.layers_per_group)
        self._call: _Call | None = None

    @property
    def fetch_count(self) -> int:
        """Transfers of retrieved chunks from host memory so far."""
        return self.store.fetch_count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of input positions seen, padding included."""
        return self.progress.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def nbytes(self, part: Literal["window", "chunks", "landmarks"] | None = None) -> int:
        """Return the bytes held in one part, or (None) in all tensors of the cache.

        Args:
            part: ``"window"``: keys and values of the last positions; ``"chunks"``: stored chunk keys and values;
                ``"landmarks"``: the vectors that retrieval scores.
        """
        tensors = [self.pending, *(found[0].data for found in self._found if found is not None)]
        rest = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        landmarks = 0 if self._landmarks is None else self._landmarks.nbytes
        parts = {"window": self.ring.nbytes(), "chunks": self.store.nbytes(), "landmarks": landmarks}
        if part is None:
            return sum(parts.values()) + rest
        if part not in parts:
            raise ValueError(f"part must be one of {', '.join(parts)} or None, got {part!r}")
        return parts[part]

    # What a forward call does, in this order.

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Layouts:
        """Lay out a call that continues this cache (ids ``[B, T]``, mask ``[B, past + T]``) and prepare the window."""
        spans = self.progress.spans(input_ids.shape, attention_mask)
        past = self.progress.lengths or [0] * input_ids.shape[0]
        size = self.config.chunk_size
        # A grid would spend a whole chunk on a short first call.
        if any(past) or input_ids.shape[1] < size:
            layout: Layouts = segment_layout(input_ids, past, spans, chunk_size=size)
        else:
            layout = grid_layout(input_ids, spans, size)
        call = _Call(layout, spans, past, size)
        seen = [count + count // size for count in past]
        new = [count + count // size - before for count, before in zip(call.after, seen, strict=True)]
        real = self.ring.begin(seen, new, width=layout.num_positions, device=input_ids.device)
        if isinstance(layout, IndexedLayout):
            layout.document_ids = real
        self.progress.advance(spans, input_ids.shape[1])
        self._call = call
        return layout

    def document_numbers(self, input_ids: Tensor) -> Tensor | None:
        """Return 0 at valid tokens of the call, -1 at padding ``[B, T]``; None if there is no padding."""
        return self._require_call().spans.documents(input_ids)

    def remember(self, x: Tensor, memory: ChunkMemory | None) -> ChunkMemory | None:
        """Keep the running chunk of ``x`` [B, P, M] and the chunks of a call.

        Returns:
            All landmarks, with the keys and values of this call; None if no chunk was completed.
        """
        call = self._require_call()
        self._keep_running_chunk(x.detach(), call)
        if memory is None:
            return None
        data = torch.stack([memory.keys, memory.values], dim=2).detach()
        self.store.append(data, call.done, call.new_chunks)
        landmarks = self._append_landmarks(memory.landmarks.detach(), call)
        return memory if isinstance(call.layout, GridLayout) else memory._replace(landmarks=landmarks)

    def serve(self, group: int, indices: Tensor, weights: Tensor, memory: ChunkMemory) -> Retrieved | None:
        """Return what the query groups of the call read, and keep what the next call's running chunk will read.

        Args:
            group: Number of the layer group.
            indices: Chunks retrieved by the landmarks of this call ``[B, R, K]``.
            weights: Their weights ``[B, R, K]``.
            memory: What ``remember`` returned.
        """
        call, before = self._require_call(), self._found[group]
        last = torch.tensor(call.new_chunks, device=indices.device)[:, None, None] - 1
        if isinstance(call.layout, GridLayout):
            if call.finds:
                final = _last_row(indices, last, -1)
                self._found[group] = (self.store.fetch(final), _last_row(weights, last, 0.0).detach())
            if not call.layout.retrieves:
                return None
            layout = call.layout
            return Retrieved(memory.keys, memory.values, layout.assign(weights, 0.0), layout.assign(indices, -1))
        if not call.finds:
            return None if before is None else _read(*before, num_groups=call.layout.num_groups)
        fetched = self.store.fetch(indices)
        if min(call.new_chunks) == 1 and not call.layout.retrieves:
            self._found[group] = (fetched, weights.detach())
            return None if before is None else _read(*before)
        return self._join(group, fetched, weights, last)

    def running(self, group: int) -> Retrieved | None:
        """Return what the running chunk reads, in a call that completes no chunk."""
        found = self._found[group]
        return None if found is None else _read(*found)

    def _join(self, group: int, fetched: Fetched, weights: Tensor, last: Tensor) -> Retrieved:
        """Put what the running chunks read in front of what this call fetched, and keep each row's last row."""
        batch_size, _, top_k = weights.shape
        before = self._found[group]
        fetched.wait()
        data, local = fetched.data, fetched.local
        if before is None:
            first = (local.new_full((batch_size, 1, top_k), -1), weights.new_zeros(batch_size, 1, top_k))
        else:
            before[0].wait()
            data = torch.cat([before[0].data, data], dim=1)
            local = torch.where(local < 0, -1, local + before[0].data.shape[1])
            first = (before[0].local, before[1])
        indices = torch.cat([first[0], local], dim=1)
        weights = torch.cat([first[1], weights], dim=1)
        # Row 0 is what was there before: rows of the batch that completed nothing keep it.
        kept, kept_weights = (rows.gather(1, (last + 1).expand(-1, 1, top_k)) for rows in (indices, weights))
        chosen = take(data, kept[:, 0].long().clamp_min(0))
        slots = torch.arange(top_k, device=kept.device, dtype=kept.dtype)
        self._found[group] = (Fetched(chosen, torch.where(kept < 0, -1, slots), None), kept_weights.detach())
        num_groups = self._require_call().layout.num_groups
        return Retrieved(data[:, :, 0], data[:, :, 1], weights[:, :num_groups], indices[:, :num_groups])

    def _keep_running_chunk(self, x: Tensor, call: _Call) -> None:
        size = self.config.chunk_size
        if self.pending is None:
            self.pending = x.new_zeros(x.shape[0], size, x.shape[2])
        shift = [chunks * (size + 1) - before % size for chunks, before in zip(call.new_chunks, call.past, strict=True)]
        place = torch.arange(size, device=x.device) + torch.tensor(shift, device=x.device)[:, None]
        new = take(x, place.clamp(0, x.shape[1] - 1))
        self.pending = torch.where(place[..., None] < 0, self.pending, new)

    def _append_landmarks(self, landmarks: Tensor, call: _Call) -> Tensor:
        """Write landmarks ``[B, R, M]`` behind those of each row; return all ``[B, E, M]``."""
        needed = max(done + new for done, new in zip(call.done, call.new_chunks, strict=True))
        held = self._landmarks
        if held is None or held.shape[1] < needed:
            # A little room, so that long decoding does not copy all landmarks for every chunk.
            grown = landmarks.new_zeros(landmarks.shape[0], needed + needed // 64, landmarks.shape[2])
            if held is not None:
                grown[:, : held.shape[1]] = held
            self._landmarks = held = grown
        for row, (done, new) in enumerate(zip(call.done, call.new_chunks, strict=True)):
            held[row, done : done + new] = landmarks[row, :new]
        return held[:, :needed]

    def _require_call(self) -> _Call:
        assert self._call is not None, "begin() comes first"
        return self._call

    # Rows.

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Make row i continue what row ``indices[i]`` was."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        numbers = rows.tolist()
        self.progress.select(numbers)
        self.store.select(numbers)
        if self.pending is None:
            return
        rows = rows.to(self.pending.device)
        self.ring.select(rows)
        self.pending = self.pending.index_select(0, rows)
        if self._landmarks is not None:
            self._landmarks = self._landmarks.index_select(0, rows)
        for group, found in enumerate(self._found):
            if found is not None:
                found[0].wait()
                data, local = (tensor.index_select(0, rows) for tensor in (found[0].data, found[0].local))
                self._found[group] = (Fetched(data, local, None), found[1].index_select(0, rows))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue what row ``beam_idx[i]`` was."""
        if beam_idx.tolist() != list(range(len(beam_idx))):
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(len(self.progress.lengths)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: keys that left the window are gone.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a DRTCache cannot be cropped: positions outside the window are gone, start a new cache")


def _last_row(rows: Tensor, last: Tensor, empty: float) -> Tensor:
    """Return row ``last`` [B, 1, 1] of ``rows`` [B, R, K], ``empty`` where last is -1."""
    chosen = rows.gather(1, last.clamp_min(0).expand(-1, 1, rows.shape[2]))
    return torch.where(last < 0, empty, chosen)


def _read(fetched: Fetched, weights: Tensor, *, num_groups: int = 1) -> Retrieved:
    """Return what was fetched for the first query group; groups behind it read nothing."""
    fetched.wait()
    indices = fetched.local
    if num_groups > 1:
        behind = (0, 0, 0, num_groups - 1)
        weights, indices = F.pad(weights, behind), F.pad(indices, behind, value=-1)
    return Retrieved(fetched.data[:, :, 0], fetched.data[:, :, 1], weights, indices)
