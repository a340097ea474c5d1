"""Keeping a cache within a budget: which runs of tokens to fold into slots, what to drop, and doing it.

Folding needs no second pass: a token's keys and values do not depend on whether it lies in a span, so sentinels may be
fed when the span is closed. Plans depend on positions only, hence whole plans are made first and then carried out.

Legend: B batch, P physical cache entries, K slots of a span, N folds of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from patches.rules_kinds import OPEN, PAD, PLAIN, SLOT
from patches.sentinel.cache import HOLE, EvictingCache
from patches.sentinel.feeding import Columns, feed
from patches.sentinel.sentinels import Sentinels


@dataclass(frozen=True)
class Budget:
    """How many entries a row may keep between calls, and what of it is spared."""

    entries: int
    span_length: int
    num_sinks: int
    recent_tokens: int
    may_drop: bool = True
    """Drop the oldest slots where nothing is left to fold; else wait until there is."""
    forget: int = 0
    """Thousandths of the closed spans, oldest first, whose slots leave."""


@dataclass(frozen=True)
class Fold:
    """A run of plain tokens that becomes K slots."""

    first: int
    """Position of its first token."""
    last: int
    """Position of its last token."""
    number: int
    """Number of the span."""


@dataclass(frozen=True)
class Group:
    """Slots of a span that is closed, or will be."""

    position: int
    number: int
    entries: int
    fold: Fold | None = None
    """What makes them; None if they are there."""


@dataclass
class RowPlan:
    """What to do with one row."""

    folds: list[Fold] = field(default_factory=list)
    """Folds whose slots stay."""
    gone: list[int] = field(default_factory=list)
    """Positions of plain tokens that leave without slots."""
    gone_spans: list[int] = field(default_factory=list)
    """Numbers of the spans whose slots leave."""
    num_folds: int = 0
    num_dropped: int = 0
    num_forgotten: int = 0

    @property
    def evicts(self) -> bool:
        """Whether entries leave without being folded."""
        return bool(self.gone or self.gone_spans)

    def remove(self, group: Group) -> None:
        """Note that slots leave; those of a planned fold are not even made."""
        if group.fold is None:
            self.gone_spans.append(group.number)
        else:
            self.folds.remove(group.fold)
            self.gone.extend(range(group.fold.first, group.fold.last + 1))


def plan_row(plain: np.ndarray, groups: dict[int, tuple[int, int]], budget: Budget, slots: int) -> RowPlan:
    """Plan folds and drops until a row fits.

    Args:
        plain: Positions of the plain entries ``[P]``, increasing.
        groups: For each span number the position of its slots and how many they are.
        budget: Limits.
        slots: K.
    """
    plan, closed = RowPlan(), max(groups, default=0)
    held = [Group(place, number, size) for number, (place, size) in groups.items()]
    while len(plain) + sum(group.entries for group in held) > budget.entries:
        start = int(np.searchsorted(plain, budget.num_sinks))
        stop = max(start, len(plain) - budget.recent_tokens)
        foldable = plain[start:stop]
        edges = [0, *(np.flatnonzero(np.diff(foldable) != 1) + 1).tolist(), len(foldable)]
        lengths = np.diff(edges)
        worth = lengths > slots
        worth[-1] = lengths[-1] >= budget.span_length
        outside = foldable[: edges[-2]]
        if worth.any():
            begin, size = edges[int(worth.argmax())], min(int(lengths[worth.argmax()]), budget.span_length)
        elif not budget.may_drop:
            break
        elif held or len(outside):
            oldest = min(held, key=lambda group: group.position, default=None)
            if oldest is not None and (not len(outside) or oldest.position <= outside[0]):
                held.remove(oldest)
                plan.num_dropped += oldest.entries
                plan.remove(oldest)
            else:
                plain = np.delete(plain, start)
                plan.num_dropped += 1
                plan.gone.append(int(outside[0]))
            continue
        else:
            begin, size = 0, len(foldable)
        closed += 1
        fold = Fold(int(foldable[begin]), int(foldable[begin + size - 1]), closed)
        plain = np.delete(plain, slice(start + begin, start + begin + size))
        plan.folds.append(fold)
        plan.num_folds += 1
        held = _remembered([*held, Group(fold.last, closed, slots, fold)], closed * budget.forget // 1000, plan)
    return plan


def _remembered(held: list[Group], gone: int, plan: RowPlan) -> list[Group]:
    """Return the groups behind the first ``gone`` spans; the others leave."""
    for group in held:
        if group.number <= gone:
            plan.num_forgotten += group.entries
            plan.remove(group)
    return [group for group in held if group.number > gone]


def plan_rows(cache: EvictingCache, budgets: Sequence[Budget], slots: int) -> list[RowPlan]:
    """Plan every row of a cache, each with its own limits."""
    plans = []
    fields = torch.stack([cache.kind, cache.span, cache.position_ids]).cpu().numpy()
    for (kind, span, position), budget in zip(fields.transpose(1, 0, 2), budgets, strict=True):
        closed = kind == SLOT
        numbers, first, sizes = np.unique(span[closed], return_index=True, return_counts=True)
        places = position[closed][first]
        groups = {
            int(number): (int(place), int(size)) for number, place, size in zip(numbers, places, sizes, strict=True)
        }
        plans.append(plan_row(position[kind == PLAIN], groups, budget, slots))
    return plans


def carry_out(
    model: nn.Module, cache: EvictingCache, sentinels: Sentinels, plans: list[RowPlan], *, most_entries: int
) -> None:
    """Feed the sentinels of all folds and evict what is folded or dropped.

    Args:
        model: Decoder with sentinels.
        cache: Changed in place.
        sentinels: Its sentinels.
        plans: One for each row.
        most_entries: Physical entries that must not be exceeded on the way.
    """
    waiting = [list(plan.folds) for plan in plans]
    if not any(waiting) or any(plan.evicts for plan in plans):
        cache.evict(_kept(cache, plans))
    while any(waiting):
        number = max(1, (most_entries - cache.num_physical) // len(sentinels.ids))
        _fold(model, cache, sentinels, [folds[:number] for folds in waiting])
        waiting = [folds[number:] for folds in waiting]


def _kept(cache: EvictingCache, plans: list[RowPlan]) -> Tensor:
    """Return bool ``[B, P]``: entries that are neither holes nor dropped."""
    keep = cache.index != HOLE
    for row, plan in enumerate(plans):
        if plan.evicts:
            device = keep.device
            gone = torch.isin(cache.position_ids[row], torch.tensor(plan.gone, dtype=torch.int64, device=device))
            spans = torch.isin(cache.span[row], torch.tensor(plan.gone_spans, dtype=torch.int64, device=device))
            kind = cache.kind[row]
            keep[row] &= ~((gone & (kind == PLAIN)) | (spans & (kind == SLOT)))
    return keep


def _fold(model: nn.Module, cache: EvictingCache, sentinels: Sentinels, folds: list[list[Fold]]) -> None:
    """Turn runs of plain entries into slots, several of each row in one call, and evict the runs."""
    slots, most = sentinels.slots, max(map(len, folds))
    shape = (len(folds), most, 1 + slots)
    first, last, number = (torch.zeros(shape[:2], dtype=torch.int64) for _ in range(3))
    for row, own in enumerate(folds):
        for order, fold in enumerate(own):
            first[row, order], last[row, order], number[row, order] = fold.first, fold.last, fold.number
    first, last, number = (table.to(cache.kind.device) for table in (first, last, number))
    position = cache.position_ids
    for order in range(most):
        inside = (position >= first[:, order, None]) & (position <= last[:, order, None]) & (cache.kind == PLAIN)
        cache.renumber(inside & (number[:, order, None] > 0), number[:, order, None])
    kind = torch.tensor([OPEN, *[SLOT] * slots], device=number.device).expand(shape)
    position = torch.cat([(first - 1).clamp(min=0)[..., None], last[..., None].expand(-1, -1, slots)], dim=2)
    columns = Columns(
        input_ids=torch.tensor(sentinels.ids, device=number.device).expand(shape).flatten(1),
        kind=torch.where(number[..., None] > 0, kind, PAD).flatten(1),
        span=number[..., None].expand(shape).flatten(1),
        position_ids=position.flatten(1),
    )
    feed(model, cache, columns, logits_to_keep=torch.zeros(1, dtype=torch.int64, device=number.device))
    cache.evict((cache.kind == SLOT) | ((cache.kind == PLAIN) & (cache.span == 0)))
