"""Micro-batches of documents with their summaries, from any starting point.

Notable: item i of the data set is micro-batch i of the run, whatever the number of workers; which rows it has is a
pure function of (seed, i), see ``datamodules.scored_batches.SequencePlan``. Rows are padded to the longest of their
micro-batch only. ``window_start`` is the number of the pair.

Letters: B rows of a micro-batch on one rank, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.batch import IGNORED, TokenBatch
from datamodules.scored_batches import SequencePlan
from datamodules.summarization import Int64Array, SummaryLayout
from datamodules.summary_store import SummaryStore


class SummaryBatches(Dataset[TokenBatch]):
    """The micro-batches of a run, or of a validation.

    Args:
        store: documents and summaries.
        layout: how they become rows.
        plan: who reads what when.
        length: micro-batches in all.
        training: announce ``num_step_targets``.
    """

    def __init__(
        self, store: SummaryStore, layout: SummaryLayout, *, plan: SequencePlan, length: int, training: bool
    ) -> None:
        self.store, self.layout, self.plan = store, layout, plan
        self.length, self.training = length, training

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TokenBatch:
        numbers = self.plan.rows(index)
        # Ranks that share a model must call it equally often.
        batch = self._read(numbers if len(numbers) else np.zeros(1, np.int64))
        if not len(numbers):
            batch["labels"].fill_(IGNORED)
        share, first = self.plan.share, index * self.plan.sequences_per_micro_batch
        place = torch.arange(len(batch["input_ids"])) * share.num_ranks + share.rank
        batch["sample_index"] = first + place
        if self.training:
            window = np.concatenate([self.plan.rows(number) for number in self.plan.window(index)])
            batch["num_step_targets"] = torch.tensor(sum(self._num_targets(int(number)) for number in window))
        return batch

    def _num_targets(self, number: int) -> int:
        lengths = self.store.document_lengths[number], self.store.summary_lengths[number]
        return self.layout.num_targets(*map(int, lengths))

    def _read(self, numbers: Int64Array) -> TokenBatch:
        rows = [
            self.layout.row(self.store.documents.document(int(n)), self.store.summaries.document(int(n)))
            for n in numbers
        ]
        longest = max(int(row["attention_mask"].sum()) for row in rows)
        names = ("input_ids", "labels", "attention_mask")
        stacked = {name: torch.from_numpy(np.stack([row[name][:longest] for row in rows])) for name in names}
        batch = TokenBatch(
            input_ids=stacked["input_ids"],
            labels=stacked["labels"],
            sample_index=torch.from_numpy(numbers),
            window_start=torch.from_numpy(numbers),
        )
        if not bool(stacked["attention_mask"].all()):
            batch["attention_mask"] = stacked["attention_mask"]
        return batch
