"""The budget policy of one row, told naively, and a dense forward over all it ever fed."""

import torch

from patches.sentinel import OPEN, PLAIN, SLOT


class DenseFolds:
    """The budget policy of one row, told naively: every column that is ever fed, and what each may see."""

    def __init__(self, sentinels, *, budget, span_length, num_sinks, recent_tokens, forget=0):
        self.sentinels, self.budget, self.span_length = sentinels, budget, span_length
        self.num_sinks, self.recent_tokens = num_sinks, recent_tokens
        self.ids, self.kinds, self.positions, self.sees = [], [], [], []
        self.live, self.groups = [], []
        self.folds = self.dropped = self.forgotten = self.peak = 0
        self.forget, self.numbers = forget, {}

    def add(self, token, kind, position, visible):
        self.ids.append(token)
        self.kinds.append(kind)
        self.positions.append(position)
        self.sees.append([*visible, len(self.ids) - 1])
        return len(self.ids) - 1

    def feed(self, tokens):
        position = 1 + max((p for p, kind in zip(self.positions, self.kinds, strict=True) if kind == PLAIN), default=-1)
        for number, token in enumerate(tokens):
            self.live.append(self.add(token, PLAIN, position + number, self.live))
        while len(self.live) > self.budget:
            self.shrink()

    def runs(self):
        plain = sorted(c for c in self.live if self.kinds[c] == PLAIN)
        spared = plain[len(plain) - self.recent_tokens :]
        runs = []
        for column in plain:
            if column in spared or self.positions[column] < self.num_sinks:
                continue
            if runs and self.positions[runs[-1][-1]] + 1 == self.positions[column]:
                runs[-1].append(column)
            else:
                runs.append([column])
        return runs

    def shrink(self):
        runs, slots = self.runs(), self.sentinels.slots
        for run in runs[:-1]:
            if len(run) > slots:
                return self.fold(run[: self.span_length])
        if runs and len(runs[-1]) >= self.span_length:
            return self.fold(runs[-1][: self.span_length])
        old_plain = [column for run in runs[:-1] for column in run]
        choices = [(self.positions[group[0]], 0, group) for group in self.groups]
        choices += [(self.positions[column], 1, [column]) for column in old_plain]
        if not choices:
            return self.fold(runs[-1])
        *_, gone = min(choices)
        self.dropped += len(gone)
        self.live = [column for column in self.live if column not in gone]
        self.groups = [group for group in self.groups if group != gone]

    def fold(self, run):
        self.folds += 1
        first, last = self.positions[run[0]], self.positions[run[-1]]
        span = [self.add(self.sentinels.open_id, OPEN, max(first - 1, 0), [])]
        for slot_id in self.sentinels.slot_ids:
            span.append(self.add(slot_id, SLOT, last, [*run, *span]))
        self.live = [column for column in self.live if column not in run] + span[1:]
        closed = 1 + max((self.numbers[group[0]] for group in self.groups), default=0)
        self.groups.append(span[1:])
        self.numbers[span[1]] = closed
        for group in [group for group in self.groups if self.numbers[group[0]] <= closed * self.forget // 1000]:
            self.forgotten += len(group)
            self.live = [column for column in self.live if column not in group]
            self.groups.remove(group)

    def logits(self, model, columns, window):
        size = len(self.ids)
        visible, positions = torch.zeros(size, size, dtype=torch.bool), torch.tensor(self.positions)
        for query, keys in enumerate(self.sees):
            visible[query, keys] = True
        near = visible & (positions[:, None] - positions < (window or size))
        full, sliding = (
            torch.zeros(1, 1, size, size).masked_fill(~mask, torch.finfo(torch.float32).min) for mask in (visible, near)
        )
        types = getattr(model.config, "layer_types", None)
        mask = sliding if types is None else {"full_attention": full, "sliding_attention": sliding}
        model.set_attn_implementation("eager")
        ids = {"input_ids": torch.tensor([self.ids]), "position_ids": positions[None]}
        return model(**ids, attention_mask=mask, use_cache=False).logits[0, columns]
