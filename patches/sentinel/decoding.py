"""The decoding loop that transformers' `generate` hands over to, for caches that forget on the way.

Legend: B batch, T tokens of a call, V vocabulary.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from patches.sentinel.cache import EvictingCache
from patches.sentinel.context import CompressedContext
from patches.sentinel.feeding import Columns, feed
from patches.sentinel.sentinels import Sentinels, suppress

logger = logging.getLogger(__name__)

MODES = ("greedy_search", "sample")


class ForgettingDecoding:
    """Decoding loop for ``model.generate(ids, custom_generate=..., ...)``; what is forgotten is up to `shorten`.

    Processors, warpers, stopping criteria and sampling are those of transformers; they see the original tokens, and
    sentinels are never eligible.

    Args:
        sentinels: Ids that are never eligible; None = none.
        prefill_chunk: Tokens of the prompt fed at once; None = all.
        context: Continue a fork of this context; the prompt is what follows it.
    """

    def __init__(
        self, sentinels: Sentinels | None, *, prefill_chunk: int | None = None, context: CompressedContext | None = None
    ) -> None:
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        self.sentinels, self.prefill_chunk, self.context = sentinels, prefill_chunk, context
        self._restart()

    def _restart(self) -> None:
        self.history: list[int] = []
        """Physical entries after each generated token's forward call and its folds."""
        self.num_folds = 0
        """Spans folded, over all rows."""
        self.num_dropped = 0
        """Entries dropped, over all rows: loss of context, not compression."""
        self.num_forgotten = 0
        """Slots that left because of the option `forget`, over all rows."""
        self.final_context: CompressedContext | None = None
        """Everything that was fed: the prompt and all generated tokens but the last of each row."""

    def shorten(self, model: Any, state: CompressedContext, *, num_fed: int) -> None:
        """Forget, after a forward call of `num_fed` tokens; called with the model in hand."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_options: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Generate; called by transformers. Padding, positions and caches come in `model_options` and stay there."""
        _check(generation_config, model_options.get("past_key_values"))
        self._restart()
        state = self._start(input_ids)
        ids, valid = left_padded(input_ids, model_options.get("attention_mask"))
        self._prefill(model, state, ids, valid)
        choice = _Choice(
            logits_processor, generation_config, any(hasattr(x, "eos_token_id") for x in stopping_criteria)
        )
        running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        while True:
            self.history.append(state.cache.num_physical)
            tokens = choice.next_tokens(input_ids, state.next_logits, running)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            running &= ~stopping_criteria(input_ids, choice.shown(choice.scores))
            if not bool(running.any()):
                break
            self._feed(model, state, tokens[:, None], None if bool(running.all()) else running[:, None])
        self.final_context = state
        if self.num_dropped:
            logger.warning("%d cache entries were dropped to stay within the budget", self.num_dropped)
        if not generation_config.return_dict_in_generate:
            return input_ids
        shown = {"scores": choice.shown(choice.scores), "logits": choice.shown(choice.logits)}
        return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=state.cache, **shown)

    def _start(self, input_ids: Tensor) -> CompressedContext:
        """Return a fork of the context, repeated for several answers to each row, or an empty one."""
        batch_size = input_ids.shape[0]
        if self.context is None:
            start = torch.zeros(batch_size, dtype=torch.int64, device=input_ids.device)
            return CompressedContext(EvictingCache(), self.sentinels, start, torch.empty(batch_size, 0))
        rows = self.context.next_position.shape[0]
        if batch_size % rows:
            raise ValueError(f"the prompt has {batch_size} rows, the context {rows}; give each row of the context one")
        state = self.context.fork()
        if batch_size != rows:
            state.repeat(batch_size // rows)
        return state

    def _prefill(self, model: Any, state: CompressedContext, ids: Tensor, valid: Tensor | None) -> None:
        """Feed the prompt; a context may be continued without one."""
        if not ids.shape[1] and self.context is None:
            raise ValueError("the prompt is empty; pass at least one token to generate")
        size = self.prefill_chunk or max(1, ids.shape[1])
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            self._feed(model, state, ids[:, part], None if valid is None else valid[:, part])

    def _feed(self, model: Any, state: CompressedContext, ids: Tensor, valid: Tensor | None) -> None:
        """Feed plain tokens ``[B, T]`` and fold until every row is within the budget; `valid` False feeds nothing."""
        count = torch.ones_like(ids) if valid is None else valid.long()
        positions = (state.next_position[:, None] + count.cumsum(1) - 1).clamp(min=0)
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        logits = feed(model, state.cache, Columns.plain(ids, positions, valid), logits_to_keep=last)[:, -1]
        logits = suppress(logits.to(device=ids.device, dtype=torch.float32), self.sentinels)
        if valid is not None and state.next_logits.shape[1]:
            logits = torch.where(valid[:, -1:], logits, state.next_logits)
        state.next_logits, state.next_position = logits, state.next_position + count.sum(1)
        self.shorten(model, state, num_fed=ids.shape[1])


def left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move the padding of a prompt ``[B, T]`` to the left; returns ids and valid, None where there is no padding."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return input_ids, None
    valid = attention_mask != 0
    order = torch.argsort(valid.to(torch.int8), dim=1, stable=True)
    return input_ids.gather(1, order), valid.gather(1, order)


@dataclass
class _Choice:
    """How transformers asks for tokens to be chosen, and what it wants to see of it."""

    processor: LogitsProcessorList
    config: GenerationConfig
    stops_at_end: bool
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def next_tokens(self, input_ids: Tensor, logits: Tensor, running: Tensor) -> Tensor:
        """Return the next token of each row ``[B]``, padding where a row has ended."""
        scores = self.processor(input_ids, logits.clone())
        if self.config.return_dict_in_generate:
            self.scores += [scores] * bool(self.config.output_scores)
            self.logits += [logits] * bool(self.config.output_logits)
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if not self.stops_at_end:
            return tokens
        return torch.where(running, tokens, self.config._pad_token_tensor.to(tokens.device))

    @staticmethod
    def shown(steps: list[Tensor]) -> tuple[Tensor, ...] | None:
        """Return what was collected, None if nothing was asked for."""
        return tuple(steps) or None


def _check(config: GenerationConfig, past: Any) -> None:
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    if mode not in MODES:
        raise ValueError(f"a folding cache serves greedy search and sampling, got {mode}; set num_beams=1")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "attentions and hidden states of folded tokens are gone; turn output_attentions and "
            "output_hidden_states off"
        )
    if past is not None and past.get_seq_length():
        raise ValueError("past_key_values cannot be continued here; pass context=CompressedContext to the generator")
