"""Attention sinks and a sliding window in all layers, prefill included (StreamingLLM, arXiv 2309.17453).

Position t reaches the first `sinks` positions and the positions closer than ``capacity - sinks``. With `rerotate` the
distance to sink j is ``min(t, capacity - 1) - j``, as inside a cache of `capacity` slots: the query is turned back for
the sinks, by plain angles.

Legend: B batch, H heads, G kv heads, T tokens of a call, D head size, N context slots, S sinks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patches.parallel_context.cache import PieceCache
from patches.parallel_context.dispatch import attend, visible_window
from patches.parallel_context.eviction import TokenEviction
from patches.parallel_context.families import check_positions
from patches.parallel_context.hook import AttentionCall, ModelHook
from patches.parallel_context.key_groups import Counts, KeyPart, Turned
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.problem import Own, Problem


@dataclass(frozen=True)
class StreamingRule:
    """The rule of one model and one `TokenEviction`."""

    hook: ModelHook
    eviction: TokenEviction

    @property
    def reach(self) -> int:
        """Positions that a query sees, itself included, besides the sinks."""
        return self.eviction.capacity - self.eviction.sinks

    def window(self, window: int | None) -> int:
        """Return the window of a layer whose own window is ``window``."""
        return self.reach if window is None else min(window, self.reach)

    def sinks(self, part: KeyPart, call: AttentionCall, positions: Tensor) -> KeyPart:
        """Return the sinks as queries at ``positions`` ``[B, T]`` see them."""
        assert part.positions is not None
        places = positions.to(call.query.device)
        seen_from = places.clamp_max(self.eviction.capacity - 1) if self.eviction.rerotate else places
        query = turn(call.query, seen_from - places, self.frequencies(call.layer))
        distance = seen_from[:, :, None] - part.positions[:, 0, None]
        window = torch.inf if call.window is None else call.window
        return replace(part, turned=Turned(query, distance >= window))

    def frequencies(self, layer: int) -> Tensor:
        """Return the inverse frequencies ``[R / 2]`` of a layer's rotary embedding of R dimensions."""
        types = getattr(self.hook.config, "layer_types", None) or []
        rotary = self.hook.decoder.rotary_emb
        name = f"{types[layer]}_inv_freq" if layer < len(types) else "inv_freq"
        return getattr(rotary, name if hasattr(rotary, name) else "inv_freq")


def turn(x: Tensor, distance: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate ``[B, H, T, D]`` on by ``distance`` ``[B, T]`` positions; only the rotary dimensions, halves paired."""
    if not distance.any():
        return x
    acc = torch.promote_types(x.dtype, torch.float32)
    angles = distance[:, None, :, None].to(acc) * frequencies.to(x.device, acc)
    cos, sin = angles.cos(), angles.sin()
    half = frequencies.shape[0]
    first, second, rest = x[..., :half].to(acc), x[..., half : 2 * half].to(acc), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1)


def split_sinks(part: KeyPart, sinks: int) -> tuple[KeyPart, KeyPart]:
    """Cut a context part into its first ``sinks`` slots and the others, without copying."""

    def cut(counts: Counts) -> tuple[Counts, Counts]:
        first, left = [], sinks
        for size in counts:
            first.append(min(size, left))
            left -= first[-1]
        return tuple(first), tuple(size - taken for size, taken in zip(counts, first, strict=True))

    pairs = [[cut(head) for head in row] for row in part.counts]
    counts = [tuple(tuple(pair[side] for pair in row) for row in pairs) for side in range(2)]
    slices = (slice(0, sinks), slice(sinks, None))
    assert part.positions is not None
    parts = [
        KeyPart(part.keys[:, :, slots], part.values[:, :, slots], found, part.positions[:, :, slots])
        for slots, found in zip(slices, counts, strict=True)
    ]
    return parts[0], parts[1]


class _Reader:
    """Keys and values while a sequence is read in chunks: all of the first one, then sinks and window."""

    def __init__(self, rule: StreamingRule, options: ParallelContext) -> None:
        self._rule, self._options = rule, options
        self.kept: list[KeyPart] = []
        """Per layer ``[1, G, n, D]``: everything up to `capacity` slots, then sinks and the last ones."""
        self.places = torch.empty(1, 0, dtype=torch.int64)
        """Positions ``[1, T]`` of the chunk that is read."""

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attend, then keep what later tokens can reach."""
        rule, sinks = self._rule, self._rule.eviction.sinks
        device = call.query.device
        places = self.places.to(device)
        first = int(self.places[0, 0]) == 0
        window = visible_window(call.window, float(self.places[0, -1]), 0.0)
        parts: tuple[KeyPart, ...] = ()
        if not first:
            sink, tail = split_sinks(self.kept[call.layer], sinks)
            parts, window = (rule.sinks(sink, call, self.places), tail), rule.window(call.window)
        problem = Problem(
            call.query,
            parts,
            Own(call.key, call.value, positions=places, host_positions=self.places),
            scale=call.scale,
            num_pieces=(0,),
            softcap=call.softcap,
            window=window,
            positions=places,
            workspace=self._options.workspace,
        )
        self._keep(call, places, first=first)
        return attend(problem, frozenset(), self._options.implementation).output

    def _keep(self, call: AttentionCall, places: Tensor, *, first: bool) -> None:
        new = KeyPart(call.key, call.value, (((call.key.shape[2],),),), places[:, None])
        if first:
            self.kept.append(new)
            return
        old = self.kept[call.layer]
        assert old.positions is not None and new.positions is not None
        both = [
            torch.cat(x, 2) for x in ((old.keys, new.keys), (old.values, new.values), (old.positions, new.positions))
        ]
        cut, last = self._rule.eviction.sinks, self._rule.reach
        keys, values, positions = (torch.cat([x[:, :, :cut], x[:, :, cut:][:, :, -last:]], 2) for x in both)
        self.kept[call.layer] = KeyPart(keys, values, (((keys.shape[2],),),), positions)


def encode_streaming(
    hook: ModelHook, options: ParallelContext, *, prefix: list[int], pieces: list[list[int]]
) -> PieceCache:
    """Read prefix and one piece as a stream; at most `capacity` slots stay.

    Raises:
        ValueError: If the context is shorter than the sinks.
    """
    eviction = options.eviction
    assert eviction is not None
    tokens = prefix + [token for piece in pieces for token in piece]
    if len(tokens) < eviction.sinks:
        raise ValueError(
            f"streaming keeps {eviction.sinks} sinks, but prefix and piece have {len(tokens)} tokens; lower sinks"
        )
    check_positions(hook.model, len(tokens) - 1)
    reader = _Reader(StreamingRule(hook, eviction), options)
    first = 0
    while first < len(tokens):
        size = options.micro_batch_tokens if first else eviction.capacity
        chunk = torch.tensor([tokens[first : first + size]])
        reader.places = first + torch.arange(chunk.shape[1])[None]
        hook.forward(chunk.to(hook.device), reader.places.to(hook.device), reader)
        first += chunk.shape[1]
    keys, values = [part.keys for part in reader.kept], [part.values for part in reader.kept]
    places = reader.kept[0].positions
    assert places is not None
    table = places.cpu()
    segments = (table >= len(prefix)).long()
    return PieceCache(
        keys=keys,
        values=values,
        positions=[table.to(x.device).expand(-1, x.shape[1], -1) for x in keys],
        segments=[segments.to(x.device).expand(-1, x.shape[1], -1) for x in keys],
        next_position=torch.tensor([len(tokens)]),
        lengths=[[len(piece) for piece in pieces]],
        source_pieces=[list(range(1, len(pieces) + 1))],
        offsets=[len(prefix)],
        mode=options.position_mode,
    )
