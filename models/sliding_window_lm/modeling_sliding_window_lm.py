"""The baseline language model: blocks of window attention with ALiBi, no landmarks, no retrieval.

Legend: B batch, T tokens, M model width.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from kernels.context_parallel import Cut, SequencePart
from models.blocks import BlockShape, DecoderBlock, EarlierKeys, Window, alibi_slopes
from models.causal_lm import CausalLanguageModel, check_documents, check_inputs, check_part
from models.flops import FORWARD_AND_BACKWARD, attention_flops, block_flops, mean_window_keys
from models.part_window import PartWindow
from models.rms_norm import RMSNorm
from models.rows import RowProgress, align, document_numbers, restore
from models.sliding_window_lm.cache import SlidingWindowCache
from models.sliding_window_lm.configuration_sliding_window_lm import SlidingWindowLMConfig


class SlidingWindowModel(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: SlidingWindowLMConfig) -> None:
        super().__init__()
        self.config = config
        shape = BlockShape.of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(DecoderBlock(shape, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        *,
        offsets: Tensor | None,
        document_ids: Tensor | None,
        earlier: EarlierKeys | None,
        hidden_states: list[Tensor] | None,
    ) -> Tensor:
        """Return normed hidden states ``[B, T, M]``; rows are moved left by ``offsets`` inside."""
        window = Window(
            self.config.window_size,
            alibi_slopes(self.config.num_attention_heads, input_ids.device),
            document_ids=document_ids,
            earlier=earlier,
            implementation=self.config.attention_implementation,
        )
        x = align(self.embed_tokens(input_ids), offsets)
        states = [x]
        for layer in self.layers:
            x = layer(x, window)
            if hidden_states is not None:
                states.append(x)
        x = restore(self.norm(x), offsets)
        if hidden_states is not None:
            hidden_states.extend([*(restore(state, offsets) for state in states[:-1]), x])
        return x


class SlidingWindowLMForCausalLM(CausalLanguageModel):
    """Sliding-window language model with a head tied to the embedding."""

    config_class = SlidingWindowLMConfig
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _reference_prefixes = ("module.", "language_model.")

    def __init__(self, config: SlidingWindowLMConfig) -> None:
        super().__init__(config)
        self.model = SlidingWindowModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def sequence_cut(self) -> Cut:
        """Where a sequence may be cut: anywhere, a window's reach apart."""
        return Cut(least=self.config.window_size - 1)

    def num_flops_per_token(self, context_length: int) -> float:
        """Return matrix-product FLOPs of forward and backward per token of a sequence of ``context_length``.

        3 x forward; forward = layers x (projections and MLP + 4 M x mean keys in the window) + 2 M V.
        """
        config = self.config
        kv_share = config.num_kv_heads / config.num_attention_heads
        keys = mean_window_keys(context_length, config.window_size)
        block = block_flops(config.hidden_size, config.intermediate_size, kv_share)
        layers = config.num_hidden_layers * (block + attention_flops(config.hidden_size, keys))
        return FORWARD_AND_BACKWARD * (layers + 2 * config.hidden_size * config.vocab_size)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: SlidingWindowCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        part: SequencePart | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with labels the loss.

        Args:
            input_ids: Tokens ``[B, T]``.
            attention_mask: ``[B, T]``, with a cache ``[B, past + T]``; zeros at the left and right of a row only.
            labels: Un-shifted ``[B, T]``, -100 ignored.
            document_ids: ``[B, T]``, packed documents: a new one begins where the value changes.
            past_key_values: Cache to continue.
            use_cache: None = in evaluation mode without labels, as ``config.use_cache`` says.
            logits_to_keep: Return only the last so many logits (0 = all), or those at these positions.
            output_hidden_states: Return the embeddings and the output of every block, the last one normed.
            part: ``input_ids`` are this part of a sequence; the processes of its group call with the others. The loss
                is the caller's, who knows the first token of the next part.
            num_items_in_batch: Divisor of the summed loss; None = the number of counted targets.
            **kwargs: ``return_dict``; anything that cannot be honoured is refused.

        Raises:
            ValueError: If an argument does not fit the others or cannot be supported.
        """
        input_ids = check_inputs(input_ids, kwargs)
        beside: dict[str, Any] = {"past_key_values": past_key_values}
        check_documents(document_ids, input_ids, **beside)
        beside |= {"attention_mask": attention_mask, "document_ids": document_ids, "labels": labels}
        check_part(part, input_ids, **beside)
        cache = None
        if document_ids is None and part is None and self.caches(use_cache, labels, past_key_values):
            cache = self._cache(past_key_values)
        states = self.recorded(output_hidden_states)
        offsets, key_ids, documents = self._rows(input_ids, attention_mask, document_ids, cache=cache)
        earlier = self._earlier_keys(cache, part)
        hidden = self.model(input_ids, offsets=offsets, document_ids=key_ids, earlier=earlier, hidden_states=states)
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
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        *,
        cache: SlidingWindowCache | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the first column of each row, the document of each key, and the document of each token."""
        if cache is not None:
            spans, key_ids = cache.begin(input_ids, attention_mask)
        elif attention_mask is None and document_ids is None:
            return None, None, None
        else:
            spans, key_ids = RowProgress().spans(input_ids.shape, attention_mask), None
        if document_ids is not None:
            documents = document_numbers(document_ids, attention_mask)
            return None, documents, documents
        return spans.shift(input_ids.device), key_ids, spans.documents(input_ids)

    def _earlier_keys(self, cache: SlidingWindowCache | None, part: SequencePart | None) -> EarlierKeys | None:
        if part is not None:
            return PartWindow(part, self.config.window_size)
        return None if cache is None else cache.ring

    def _cache(self, past_key_values: Any) -> SlidingWindowCache:
        if past_key_values is None:
            return SlidingWindowCache(self.config)
        if not isinstance(past_key_values, SlidingWindowCache):
            raise ValueError(f"past_key_values must be a SlidingWindowCache, got {type(past_key_values).__name__}")
        return past_key_values
