"""Encode prefix and pieces: the prefix once, the pieces in padded micro-batches, every key written once.

Legend: B batch, b pieces of a micro-batch, S their padded length, H heads, G kv heads, D head size, N slots of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patches.parallel_context.dispatch import Implementation, attend, visible_window
from patches.parallel_context.hook import AttentionCall, ModelHook
from patches.parallel_context.key_groups import KeyPart
from patches.parallel_context.problem import Own, Problem
from patches.parallel_context.slots import last_rows, observe

Write = Callable[[int, Tensor, Tensor], None]
"""Takes the number of a layer and its new keys and values ``[b, G, S, D]``."""
Watch = Callable[[int, Problem], None]
"""Takes the number of a layer and its attention call."""


@dataclass(frozen=True)
class Piece:
    """One piece of one row; the prefix is a piece too."""

    row: int
    number: int
    """From 1; 0 for the prefix."""
    tokens: list[int]
    positions: Tensor
    """``[l]`` on the host, never decreasing."""
    slot: int
    """Its first slot in the row."""


class PieceAttention:
    """Attention of a micro-batch of pieces: each sees the prefix and itself, causally."""

    def __init__(
        self,
        positions: Tensor,
        prefix: Sequence[KeyPart],
        write: Write,
        *,
        implementation: Implementation,
        workspace: int,
        watch: Watch | None = None,
    ) -> None:
        """Prepare for pieces at ``positions`` ``[b, S]`` (on the host) behind the layers of a prefix (or none)."""
        self._positions, self._prefix, self._write, self._watch = positions, prefix, write, watch
        self._implementation, self._workspace = implementation, workspace
        self._greatest = float(positions.max())
        least = float(positions.min())  # some modes push pieces below the prefix
        self._least = min(least, 0.0) if prefix else least

    def __call__(self, call: AttentionCall) -> Tensor:
        """Write the keys of a layer and attend."""
        self._write(call.layer, call.key, call.value)
        window = visible_window(call.window, self._greatest, self._least)
        places = None if window is None else self._positions.to(call.key.device)
        problem = Problem(
            call.query,
            (self._prefix[call.layer],) if self._prefix else (),
            Own(call.key, call.value, positions=places, host_positions=self._positions),
            scale=call.scale,
            num_pieces=(0,) * len(call.query),
            softcap=call.softcap,
            window=window,
            positions=places,
            workspace=self._workspace,
        )
        output = attend(problem, frozenset(), self._implementation).output
        if self._watch is not None:
            self._watch(call.layer, problem)
        return output


class CacheWriter:
    """Keys and values of all layers ``[B, G, N, D]``, allocated once and filled in place."""

    def __init__(self, num_layers: int, batch: int, width: int) -> None:
        self._batch, self._width = batch, width
        self.keys: list[Tensor] = [torch.empty(0)] * num_layers
        self.values: list[Tensor] = [torch.empty(0)] * num_layers

    def prefix(self, parts: Sequence[KeyPart]) -> None:
        """Write the prefix in front of every row."""
        for layer, part in enumerate(parts):
            self._allocate(layer, part.keys)
            self.keys[layer][:, :, : part.keys.shape[2]] = part.keys
            self.values[layer][:, :, : part.values.shape[2]] = part.values

    def write(self, pieces: Sequence[Piece]) -> Write:
        """Return the function that writes a micro-batch of these pieces to its slots."""

        def write(layer: int, keys: Tensor, values: Tensor) -> None:
            self._allocate(layer, keys)
            for index, piece in enumerate(pieces):
                length = len(piece.tokens)
                slots = slice(piece.slot, piece.slot + length)
                self.keys[layer][piece.row, :, slots] = keys[index, :, :length]
                self.values[layer][piece.row, :, slots] = values[index, :, :length]

        return write

    def _allocate(self, layer: int, like: Tensor) -> None:
        if self.keys[layer].numel():
            return
        shape = (self._batch, like.shape[1], self._width, like.shape[3])
        self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)


class AttentionReceived:
    """What slots receive from the rows of their own piece, summed over the rows: ``[B, G, N]`` per layer."""

    def __init__(self, num_layers: int, batch: int, width: int) -> None:
        self.layers: list[Tensor] = [torch.empty(0)] * num_layers
        self._batch, self._width = batch, width

    def watch(self, pieces: Sequence[Piece]) -> Watch:
        """Return the function that observes a micro-batch of these pieces."""
        lengths = [len(piece.tokens) for piece in pieces]

        def watch(layer: int, problem: Problem) -> None:
            found = observe(problem, last_rows(lengths, problem.query.shape[2], 0)).mean(2)
            if not self.layers[layer].numel():
                self.layers[layer] = found.new_zeros(self._batch, found.shape[1], self._width)
            offset = found.shape[2] - problem.own.keys.shape[2]
            for index, piece in enumerate(pieces):
                own = found[index, :, offset : offset + lengths[index]]
                self.layers[layer][piece.row, :, piece.slot : piece.slot + lengths[index]] = own

        return watch


def encode_prefix(
    hook: ModelHook, tokens: list[int], *, implementation: Implementation, workspace: int
) -> list[KeyPart]:
    """Run the prefix alone at positions 0 .. P - 1; returns its keys per layer ``[1, G, P, D]``, [] without tokens."""
    if not tokens:
        return []
    places = torch.arange(len(tokens))
    counts = (((len(tokens),),),)
    parts: list[KeyPart | None] = [None] * hook.num_layers

    def write(layer: int, keys: Tensor, values: Tensor) -> None:
        parts[layer] = KeyPart(keys, values, counts, places.to(keys.device)[None, None])

    attention = PieceAttention(places[None], [], write, implementation=implementation, workspace=workspace)
    hook.forward(torch.tensor([tokens], device=hook.device), places[None].to(hook.device), attention)
    return [part for part in parts if part is not None]


def micro_batches(pieces: Sequence[Piece], limit: int) -> Iterator[list[Piece]]:
    """Group pieces, longest first, so that a padded group holds at most ``limit`` tokens (or one piece)."""
    order = sorted(pieces, key=lambda piece: -len(piece.tokens))
    first = 0
    while first < len(order):
        count = max(1, limit // len(order[first].tokens))
        yield order[first : first + count]
        first += count


def padded(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Return token ids and positions ``[b, S]`` of a micro-batch on the host, padded at the right."""
    width = max(len(piece.tokens) for piece in pieces)
    tokens = torch.tensor([piece.tokens + [0] * (width - len(piece.tokens)) for piece in pieces])
    places = [torch.cat([p.positions, p.positions[-1:].expand(width - len(p.tokens))]) for p in pieces]
    return tokens, torch.stack(places)
