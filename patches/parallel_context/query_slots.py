"""Policies that drop context slots while a query is read: calibration, eviction after the pass, dynamic eviction.

Legend: B batch, G kv heads, R query heads of a kv head, T query tokens, N context slots, n live slots, O observed rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from patches.parallel_context.calibration import Calibration
from patches.parallel_context.eviction import TokenEviction, pool_scores
from patches.parallel_context.key_groups import KeyPart
from patches.parallel_context.problem import Problem
from patches.parallel_context.slots import Kept, keep_slots, last_rows, observe, slot_segments, slot_table


class SlotPolicy:
    """Which slots of which layer stay; one object serves one query of a batch."""

    def __init__(
        self,
        calibration: Calibration | None,
        eviction: TokenEviction | None,
        *,
        num_layers: int,
        received: Sequence[Tensor] | None = None,
    ) -> None:
        """Prepare.

        Args:
            calibration: Slots to drop inside layers.
            eviction: Eviction at stage "query"; others have no effect here.
            num_layers: Layers of the model.
            received: Per layer ``[B, G, N]``, attention the slots received before the query (H2O over a prompt).
        """
        self._calibration, self._num_layers, self._received = calibration, num_layers, received
        late = eviction is not None and eviction.stage == "query" and eviction.method != "streaming"
        self._eviction = eviction if late else None
        self._recent: dict[int, Tensor] = {}

    @property
    def recomputes(self) -> bool:
        """Whether calibrated layers attend again without the dropped slots."""
        return self._calibration is not None and self._calibration.apply == "pass"

    def calibrate(self, layer: int, problem: Problem, lengths: list[int]) -> Kept | None:
        """Return the slots that are not abnormal in a layer of the query pass; None where it is not calibrated."""
        calibration = self._calibration
        if calibration is None or not calibration.layers[0] <= layer <= calibration.layers[1]:
            return None
        segments = _segments(problem)
        rows = last_rows(lengths, problem.query.shape[2], calibration.rows)
        attention = observe(problem, rows).mean(2).cpu() / rows.sum(1)[:, None, None]
        kept = []
        for row, heads in enumerate(_live(segments)):
            slots = torch.stack(heads)
            kept.append(list(slots.gather(-1, calibration.keep(attention[row].gather(-1, slots)))))
        return kept

    def evict(self, layer: int, problem: Problem, lengths: list[int], live: Kept | None) -> Kept | None:
        """Return the slots that stay after a layer of the query pass, of the ``live`` ones (None: all)."""
        eviction = self._eviction
        if eviction is None:
            return live
        segments = _segments(problem)
        count = 0 if eviction.method == "h2o" else eviction.observation
        weights = observe(problem, last_rows(lengths, problem.query.shape[2], count)).cpu()
        kept = []
        for row, heads in enumerate(_live(segments) if live is None else live):
            groups = [segments[row, head, slots] for head, slots in enumerate(heads)]
            pieces = [slots[ids > 0] for slots, ids in zip(heads, groups, strict=True)]
            prefix = [slots[ids == 0] for slots, ids in zip(heads, groups, strict=True)]
            scores = [self._scores(layer, weights[row, head], slots, (row, head)) for head, slots in enumerate(pieces)]
            chosen = self._choose(layer, scores)
            kept.append([torch.cat([prefix[h], pieces[h][index]]) for h, index in enumerate(chosen)])
        if eviction.dynamic:
            self._remember(layer, problem, lengths, slot_table(kept)[0])
        return kept

    def weaken(self, layer: int, problem: Problem, lengths: list[int]) -> KeyPart | None:
        """Drop the weakest piece slot of every kv head after a decoded token; None if nothing is dropped."""
        eviction = self._eviction
        if eviction is None or not eviction.dynamic:
            return None
        part, segments = problem.context[0], _segments(problem)
        width = part.keys.shape[2]
        newest = observe(problem, last_rows(lengths, problem.query.shape[2], 1)).cpu()[..., :width]
        recent = torch.cat([newest[None], self._recent[layer]])[: eviction.observation]
        total, kept = recent.sum(0), []
        for row, heads in enumerate(_live(segments)):
            kept.append(list(heads))
            for head, slots in enumerate(heads if lengths[row] else []):
                pieces = (segments[row, head, slots] > 0).nonzero().squeeze(-1)
                if len(pieces):
                    scores = self._scores(layer, total[row, head], slots[pieces], None)
                    weakest = pieces[torch.sort(scores, stable=True).indices[0]]
                    kept[-1][head] = torch.cat([slots[:weakest], slots[weakest + 1 :]])
        self._recent[layer] = _take(recent, slot_table(kept)[0])
        return keep_slots(part, segments, kept, problem.most_pieces)

    def _scores(self, layer: int, weights: Tensor, slots: Tensor, place: tuple[int, int] | None) -> Tensor:
        """Score slots ``[n]`` of a head by the weights ``[R, N]``; ``place`` adds what they received before."""
        assert self._eviction is not None
        method = self._eviction.method
        kernel = self._eviction.kernel if place is None or method != "h2o" else 1
        scores = pool_scores(weights[:, slots], kernel, self._eviction.pool).mean(0)
        if place is not None and method == "h2o" and self._received is not None:
            scores = scores + self._received[layer][place][slots.to(self._received[layer].device)].cpu()
        return scores

    def _choose(self, layer: int, scores: list[Tensor]) -> list[Tensor]:
        """Choose among the scored slots of every head."""
        assert self._eviction is not None
        sizes = {len(head) for head in scores}
        if len(sizes) == 1:
            budget = self._eviction.budget(layer, self._num_layers, sizes.pop())
            return list(self._eviction.choose(torch.stack(scores)[None], budget, layer)[0])
        budgets = [self._eviction.budget(layer, self._num_layers, len(head)) for head in scores]
        return [
            self._eviction.choose(head[None, None], budget, layer)[0, 0]
            for head, budget in zip(scores, budgets, strict=True)
        ]

    def _remember(self, layer: int, problem: Problem, lengths: list[int], index: Tensor) -> None:
        """Keep the weights of the last O rows of the pass, latest first, on the slots that stay."""
        assert self._eviction is not None
        rows = []
        for back in range(self._eviction.observation):
            observed = torch.zeros(len(lengths), problem.query.shape[2], dtype=torch.bool)
            for row, length in enumerate(lengths):
                if back < length:
                    observed[row, length - 1 - back] = True
            rows.append(observe(problem, observed).cpu())
        self._recent[layer] = _take(torch.stack(rows), index)


def _take(weights: Tensor, index: Tensor) -> Tensor:
    """Return the weights ``[O, B, G, R, n]`` on slots ``[B, G, n]`` of ``[O, B, G, R, N]``."""
    full = index[None, :, :, None].expand(len(weights), -1, -1, weights.shape[3], -1)
    return weights.gather(-1, full)


def _segments(problem: Problem) -> Tensor:
    """Return the segments of the context ``[B, G, N]`` on the host."""
    assert len(problem.context) == 1
    return slot_segments(problem.context[0], len(problem.query), problem.own.keys.shape[1])


def _live(segments: Tensor) -> list[list[Tensor]]:
    """Return the used slots per row and kv head."""
    return [[(ids >= 0).nonzero().squeeze(-1) for ids in row] for row in segments]
