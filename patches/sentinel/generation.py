"""Generation through transformers' `generate` over a cache that folds old tokens into slots to stay within a budget.

Legend: B batch, K slots of a span.
"""

from dataclasses import replace
from typing import Any

from patches.sentinel.context import CompressedContext
from patches.sentinel.decoding import ForgettingDecoding
from patches.sentinel.folding import Budget, carry_out, plan_rows
from patches.sentinel.sentinels import Sentinels


class SentinelGenerator(ForgettingDecoding):
    """Decoding loop for ``model.generate(ids, custom_generate=SentinelGenerator(...), ...)``.

    After every forward call each row that holds more entries than the budget folds its oldest run of plain tokens into
    K slots; when nothing is left to fold it drops the oldest slots: context is lost.
    """

    sentinels: Sentinels

    def __init__(
        self,
        sentinels: Sentinels,
        *,
        budget: int | None = None,
        compression_ratio: float | None = None,
        span_length: int = 24,
        num_sinks: int = 4,
        recent_tokens: int = 32,
        forget: int = 0,
        prefill_chunk: int | None = None,
        context: CompressedContext | None = None,
    ) -> None:
        """Check the options.

        Args:
            sentinels: Sentinels of the model.
            budget: Entries a row may hold between calls, slots included; None = no folding.
            compression_ratio: Fraction of the tokens so far that folding removes, instead of a budget. Nothing is
                dropped then: a row that can fold nothing waits for its newest run to reach `span_length`.
            span_length: Tokens folded at once.
            num_sinks: First positions that stay.
            recent_tokens: Newest plain tokens that stay.
            forget: Thousandths of the spans folded so far, oldest first, whose slots leave, as in the rows of a policy
                that forgets (``SpanSampler.forget``); what they leave goes to plain tokens.
            prefill_chunk: Tokens of the prompt fed at once; None = all.
            context: Continue a fork of this context; the prompt is what follows it.

        Raises:
            ValueError: if the budget does not hold sinks, recent tokens, one group of slots and one token more, or on
                a ratio outside [0, 1) or beside a budget.
        """
        if span_length <= sentinels.slots or num_sinks < 0 or recent_tokens < 0:
            raise ValueError(
                f"needs span_length > {sentinels.slots} slots, num_sinks >= 0 and recent_tokens >= 0, "
                f"got {span_length}, {num_sinks}, {recent_tokens}"
            )
        least = num_sinks + recent_tokens + sentinels.slots + 1
        if budget is not None and budget < least:
            raise ValueError(
                f"budget must hold num_sinks + recent_tokens + slots + 1 = {least} entries, got {budget}; "
                "raise it or spare fewer tokens"
            )
        if compression_ratio is not None and (budget is not None or not 0 <= compression_ratio < 1):
            raise ValueError(
                f"compression_ratio is the fraction removed, in [0, 1), and takes the place of a budget, "
                f"got {compression_ratio} and budget {budget}"
            )
        folds = budget is not None or compression_ratio is not None
        if not 0 <= forget < 1000 or (forget and not folds):
            raise ValueError(
                f"forget is thousandths of the folded spans, from 0 to 999, and needs a budget or a compression_ratio, "
                f"got {forget}"
            )
        super().__init__(sentinels, prefill_chunk=prefill_chunk, context=context)
        self.compression_ratio = compression_ratio
        spared = (num_sinks, recent_tokens)
        self._limits = Budget(budget or 0, span_length, *spared, may_drop=budget is not None, forget=forget)
        self._folds = folds

    def shorten(self, model: Any, state: CompressedContext, *, num_fed: int) -> None:
        """Fold until every row is within its limits."""
        if not self._folds:
            return
        limits = self._limits_of_rows(state)
        most = max(limit.entries for limit in limits)
        if self.compression_ratio is None and state.cache.num_physical <= most:
            return
        plans = plan_rows(state.cache, limits, self.sentinels.slots)
        most = max(most + num_fed, state.cache.num_physical) + len(self.sentinels.ids)
        if any(plan.folds or plan.evicts for plan in plans):
            carry_out(model, state.cache, self.sentinels, plans, most_entries=most)
        self.num_folds += sum(plan.num_folds for plan in plans)
        self.num_dropped += sum(plan.num_dropped for plan in plans)
        self.num_forgotten += sum(plan.num_forgotten for plan in plans)

    def _limits_of_rows(self, state: CompressedContext) -> list[Budget]:
        """Return the limits of each row now."""
        if self.compression_ratio is None:
            return [self._limits] * state.next_position.shape[0]
        shares = (int((1 - self.compression_ratio) * count + 0.5) for count in state.next_position.tolist())
        return [replace(self._limits, entries=entries) for entries in shares]
