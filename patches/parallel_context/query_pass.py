"""Read a query, and then generated tokens, behind an encoded context.

Notable: the tokens' own keys go into buffers allocated once; the context is neither copied nor changed.

Legend: B batch, L layers, H heads, G kv heads, T tokens of a call, D head size, M model width, K pieces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patches.parallel_context.cache import PieceCache
from patches.parallel_context.dispatch import attend, visible_window
from patches.parallel_context.families import check_positions
from patches.parallel_context.hook import AttentionCall, ModelHook
from patches.parallel_context.key_groups import Block, KeyPart, find_blocks
from patches.parallel_context.meters import Recorder
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.problem import Own, Problem
from patches.parallel_context.query_slots import SlotPolicy
from patches.parallel_context.selector import Selector
from patches.parallel_context.slots import Kept, keep_slots, slot_segments
from patches.parallel_context.streaming import StreamingRule, split_sinks

Watch = Callable[[int, Problem, list[int]], None]
"""Takes the number of a layer, its attention call and the valid tokens of every row."""


@dataclass(frozen=True)
class Context:
    """What a query reads: parts of every layer, and where the query begins."""

    layers: Sequence[tuple[KeyPart, ...]]
    num_pieces: tuple[int, ...]
    start: Tensor
    """``[B]`` on the host: position of the first query token."""
    least: float
    """A position that no key lies below."""
    received: Sequence[Tensor] | None = None
    """Per layer ``[B, G, N]``, attention the slots received while they were encoded."""

    @classmethod
    def of(cls, state: PieceCache) -> "Context":
        """Return the context that a cache holds."""
        layers = [(part,) for part in state.parts()]
        places = {x.data_ptr(): x for x in state.positions}
        least = min((float(x.min()) for x in places.values() if x.numel()), default=0.0)
        return cls(layers, tuple(state.num_pieces), state.next_position.cpu(), least, state.received)


class QueryPass:
    """One query of a batch while it is read and continued."""

    def __init__(
        self, hook: ModelHook, context: Context, *, options: ParallelContext, capacity: int, recorder: Recorder
    ) -> None:
        """Prepare to read at most ``capacity`` tokens per row."""
        self.hook, self.options, self.recorder = hook, options, recorder
        self.layers = list(context.layers)
        eviction = options.eviction
        streams = eviction is not None and eviction.method == "streaming"
        self._stream = StreamingRule(hook, eviction) if eviction is not None and streams else None
        self.num_pieces = context.num_pieces
        self.selector = Selector(options.selection, context.num_pieces)
        self.slots = SlotPolicy(
            options.calibration, options.eviction, num_layers=hook.num_layers, received=context.received
        )
        batch = len(context.num_pieces)
        self.read = [0] * batch
        """Valid tokens of each row so far."""
        self._start, self._capacity = context.start, capacity
        self._least = min(context.least, float(context.start.min()))
        self._used = 0
        self._keys: list[Tensor | None] = [None] * hook.num_layers
        self._values: list[Tensor | None] = [None] * hook.num_layers
        self._places = torch.zeros(batch, capacity, dtype=context.start.dtype)
        self._valid = torch.zeros(batch, capacity, dtype=torch.bool)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self._blocks: dict[tuple[object, ...], Sequence[Block]] = {}
        self._lengths: list[int] = []
        self.watch: Watch | None = None
        """Sees every attention call of the first forward pass."""

    def forward(self, token_ids: Tensor, lengths: list[int]) -> Tensor:
        """Read ``[B, T]`` tokens, of which row b has ``lengths[b]`` valid ones at its left.

        Returns:
            Hidden states ``[B, T, M]``; those of padding are arbitrary.
        """
        width = token_ids.shape[1]
        step, count, read = torch.arange(width), torch.tensor(lengths)[:, None], torch.tensor(self.read)[:, None]
        # Padding repeats the last position: a greater one could change the angles of a growing rotary embedding.
        places = self._start[:, None] + torch.minimum(read + step, read + count - 1).clamp_min(0)
        check_positions(self.hook.model, float(places.max()))
        slots = slice(self._used, self._used + width)
        self._places[:, slots] = places
        self._valid[:, slots] = step < count
        self._lengths, self._on_device = lengths, {}
        device = self.hook.device
        self.selector.begin()
        if self.selector.two_pass:
            self.selector.begin_first_pass()
            self.hook.forward(token_ids.to(device), places.to(device), self._collect)
            self.selector.end_first_pass(lengths)
        self.recorder.start(self._valid[:, slots])
        hidden = self.hook.forward(token_ids.to(device), places.to(device), self._attend)
        self._used += width
        self.read = [count + new for count, new in zip(self.read, lengths, strict=True)]
        return hidden

    def live_slots(self) -> list[int]:
        """Return the context slots that each layer stores per row and kv head."""
        return [sum(part.keys.shape[2] for part in parts) for parts in self.layers]

    def _collect(self, call: AttentionCall) -> Tensor:
        """Attend without selection; the selector takes the scores."""
        problem = self._problem(call)
        self.selector.prepare(call.layer, problem, self._lengths)
        return attend(problem, frozenset(), self.options.implementation).output

    def _attend(self, call: AttentionCall) -> Tensor:
        problem = self._with_selection(call.layer, self._problem(call))
        lengths, layer = self._lengths, call.layer
        first = self._used == 0
        kept = self.slots.calibrate(layer, problem, lengths) if first else None
        if kept is not None and self.slots.recomputes:
            self._keep(layer, problem, kept)
            problem, kept = self._with_selection(layer, self._problem(call)), None
        found = attend(problem, self.recorder.wants, self.options.implementation)
        self.recorder.add(call.query, found)
        if first and self.watch is not None:
            self.watch(layer, problem, lengths)
        if first:
            kept = self.slots.evict(layer, problem, lengths, kept)
            if kept is not None:
                self._keep(layer, problem, kept)
        else:
            weaker = self.slots.weaken(layer, problem, lengths)
            if weaker is not None:
                self._replace(layer, weaker)
        return found.output

    def _with_selection(self, layer: int, problem: Problem) -> Problem:
        selection, scores = self.selector.prepare(layer, problem, self._lengths)
        return replace(problem, selection=selection, scores=scores)

    def _keep(self, layer: int, problem: Problem, kept: Kept) -> None:
        part = problem.context[0]
        segments = slot_segments(part, len(problem.query), problem.own.keys.shape[1])
        self._replace(layer, keep_slots(part, segments, kept, problem.most_pieces))

    def _replace(self, layer: int, part: KeyPart) -> None:
        self.layers[layer] = (part,)
        self._blocks.clear()

    def _problem(self, call: AttentionCall) -> Problem:
        """Store the new keys of a layer and state its attention."""
        stop = self._used + call.query.shape[2]
        keys, values = self._store(call, stop)
        parts, window = self.layers[call.layer], self._window(call)
        if self._stream is not None:
            sinks, rest = split_sinks(parts[0], self._stream.eviction.sinks)
            parts = (self._stream.sinks(sinks, call, self._places[:, self._used : stop]), rest)
        ragged = not bool(self._valid[:, : self._used].all())
        places = None if window is None else self._host("places", self._places[:, :stop], call.query.device)
        own = Own(
            keys,
            values,
            valid=self._host("valid", self._valid[:, :stop], call.query.device) if ragged else None,
            positions=places,
        )
        return Problem(
            call.query,
            parts,
            own,
            scale=call.scale,
            num_pieces=self.num_pieces,
            softcap=call.softcap,
            window=window,
            positions=None if places is None else places[:, self._used :],
            ape=self.options.ape,
            workspace=self.options.workspace,
            blocks=self._layout(parts, keys.shape[1]),
        )

    def _store(self, call: AttentionCall, stop: int) -> tuple[Tensor, Tensor]:
        """Write the new own keys and values; returns all so far ``[B, G, stop, D]``."""
        both = []
        for buffers, new in ((self._keys, call.key), (self._values, call.value)):
            buffer = buffers[call.layer]
            if buffer is None:
                buffer = new.new_zeros(*new.shape[:2], self._capacity, new.shape[3])
                buffers[call.layer] = buffer
            buffer[:, :, self._used : stop] = new
            both.append(buffer[:, :, :stop])
        return both[0], both[1]

    def _window(self, call: AttentionCall) -> int | None:
        """Return the window of a layer if it hides anything."""
        window = call.window if self._stream is None else self._stream.window(call.window)
        return visible_window(window, float(self._places.max()), self._least)

    def _host(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of this call on a device, moved once."""
        key = (name, device)
        if key not in self._on_device:
            self._on_device[key] = tensor.to(device)
        return self._on_device[key]

    def _layout(self, parts: tuple[KeyPart, ...], num_heads: int) -> Sequence[Block]:
        """Return the blocks of a layer; layers with the same counts share them."""
        name = tuple(part.counts for part in parts)
        if name not in self._blocks:
            self._blocks[name] = find_blocks(parts, self.num_pieces, num_heads)
        return self._blocks[name]
