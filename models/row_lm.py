"""The forward contract of the baselines: padding, packed documents and caches are undone around a plain body.

A body reads rows of one document that begin in column 0. Everything here is causal, so what stands behind the last
token of a row touches nothing, and padding needs no mask.

Legend: B batch, T tokens, M model width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from models.causal_lm import CausalLanguageModel, check_documents, check_inputs
from models.row_cache import RowCache
from models.rows import RowProgress, align, document_numbers, restore


@dataclass
class RowCall:
    """One call of a body: what its rows continue, and what it records.

    Attributes:
        past: Tokens each row has seen before.
        new: Tokens of each row in this call; columns behind them hold anything.
        cache: Where the rows are continued from and for; None: every row begins here.
        hidden_states: Takes embeddings and block outputs at the text positions ``[B, T, M]``, or None.
    """

    past: list[int]
    new: list[int]
    cache: Any = None
    hidden_states: list[Tensor] | None = None

    @classmethod
    def fresh(cls, input_ids: Tensor, hidden_states: list[Tensor] | None) -> "RowCall":
        """Begin rows ``[B, T]`` that nothing continues."""
        size, length = input_ids.shape
        return cls([0] * size, [length] * size, None, hidden_states)

    def record(self, x: Tensor) -> None:
        """Keep ``[B, T, M]`` if hidden states are wanted."""
        if self.hidden_states is not None:
            self.hidden_states.append(x)


class RowLanguageModel(CausalLanguageModel):
    """A body ``model(input_ids, call)`` that returns normed hidden states ``[B, T, M]``, and a head tied to it."""

    cache_class: ClassVar[type[RowCache]]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _reference_prefixes = ("module.", "language_model.")

    def new_cache(self) -> RowCache:
        """Return an empty cache of this model."""
        return self.cache_class(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with labels the loss.

        Args:
            input_ids: Tokens ``[B, T]``.
            attention_mask: ``[B, T]``, with a cache ``[B, past + T]``; zeros at the left and right of a row only.
            labels: Un-shifted ``[B, T]``, -100 ignored.
            document_ids: ``[B, T]``, packed documents, computed one by one: a new one begins where the value changes.
            past_key_values: Cache to continue.
            use_cache: None = in evaluation mode without labels, as ``config.use_cache`` says.
            logits_to_keep: Return only the last so many logits (0 = all), or those at these positions.
            output_hidden_states: Return the embeddings and the output of every block, the last one normed.
            num_items_in_batch: Divisor of the summed loss; None = the number of counted targets.
            **kwargs: ``return_dict``; anything that cannot be honoured is refused.

        Raises:
            ValueError: If an argument does not fit the others or cannot be supported.
        """
        input_ids = check_inputs(input_ids, kwargs)
        check_documents(document_ids, input_ids, past_key_values=past_key_values)
        states = self.recorded(output_hidden_states)
        documents: Tensor | None
        cache = None
        if document_ids is not None:
            RowProgress().spans(input_ids.shape, attention_mask)
            numbers = document_numbers(document_ids, attention_mask)
            hidden, documents = self._documents_one_by_one(input_ids, numbers, states), numbers
        else:
            if self.caches(use_cache, labels, past_key_values):
                cache = self._cache(past_key_values)
            hidden, documents = self._rows(input_ids, attention_mask, cache=cache, states=states)
        if states is not None:
            states[-1] = hidden
        logits, loss = self.score(
            hidden, labels, documents=documents, logits_to_keep=logits_to_keep, num_items=num_items_in_batch
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),
        )

    def _rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, cache: RowCache | None, states: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states ``[B, T, M]`` and the document of each token (None = no padding)."""
        progress = RowProgress() if cache is None else cache.progress
        spans = progress.spans(input_ids.shape, attention_mask)
        offsets = spans.shift(input_ids.device)
        call = RowCall.fresh(input_ids, states)
        if cache is not None:
            past = progress.lengths or call.past
            call = RowCall(past, spans.lengths, cache, states)
            progress.advance(spans, input_ids.shape[1])
        hidden = restore(self.model(align(input_ids, offsets), call), offsets)
        if states is not None:
            states[:] = [restore(state, offsets) for state in states]
        return hidden, spans.documents(input_ids)

    def _documents_one_by_one(self, input_ids: Tensor, documents: Tensor, states: list[Tensor] | None) -> Tensor:
        """Return hidden states ``[B, T, M]`` of packed documents; 0 at padding."""
        rows, recorded = [], []
        for ids, numbers in zip(input_ids, documents, strict=True):
            values, lengths = torch.unique_consecutive(numbers, return_counts=True)
            parts = []
            for number, tokens in zip(values.tolist(), ids.split(lengths.tolist()), strict=True):
                own: list[Tensor] | None = None if states is None else []
                # Padding is computed like a document of its own, so that shapes and records stay those of the others.
                x = self.model(tokens[None], RowCall.fresh(tokens[None], own))
                parts.append([x * (number >= 0), *(own or [])])
            rows.append(torch.cat([part[0] for part in parts], dim=1))
            recorded.append([torch.cat(state, dim=1) for state in list(zip(*parts, strict=True))[1:]])
        if states is not None:
            states.extend(torch.cat(state) for state in zip(*recorded, strict=True))
        return torch.cat(rows)

    def _cache(self, past_key_values: Any) -> RowCache:
        if past_key_values is None:
            return self.new_cache()
        if not isinstance(past_key_values, self.cache_class):
            raise ValueError(
                f"past_key_values must be a {self.cache_class.__name__}, got {type(past_key_values).__name__}"
            )
        return past_key_values
