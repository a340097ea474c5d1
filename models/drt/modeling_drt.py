"""DRT: a window-attention language model whose upper layers read chunks they retrieved by a differentiable score.

Hu et al., Efficient Length-Generalizable Attention via Causal Retrieval for Long-Context Language Modeling (2025).

Legend: B batch, T text tokens, P positions (text and landmarks), S text tokens of a chunk, C = S + 1 positions of a
chunk, R complete chunks, K retrieved chunks, M model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from kernels.context_parallel import Cut, SequencePart
from kernels.gca import chunk_weights, retrieve_chunks, reverse_index
from models.blocks import BlockShape, DecoderBlock, Window, alibi_slopes
from models.causal_lm import CausalLanguageModel, check_documents, check_inputs, check_part
from models.drt.cache import DRTCache
from models.drt.call import Call
from models.drt.configuration_drt import DRTConfig
from models.drt.encoder import ChunkEncoder
from models.drt.flops import flops_per_token
from models.drt.layout import Layout
from models.drt.layout_maps import plain_layout
from models.drt.part_layout import PartLayout
from models.drt.retrieval import ChunkMemory, RetrievalBlock, Retrieved, of_real_chunks
from models.rms_norm import RMSNorm, product_input


@dataclass
class DRTOutput(CausalLMOutputWithPast):
    """Output of ``DRTForCausalLM``."""

    retrieval: tuple[tuple[Tensor, Tensor], ...] | None = None
    """Per group, indices int32 and weights float32 ``[B, R, K]`` of the chunks completed in this call."""


class DRTModel(nn.Module):
    """Embedding, lower blocks, chunk memory, groups of upper blocks, final norm."""

    def __init__(self, config: DRTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        shape = BlockShape.of(config)
        encoder_shape = shape.bidirectional(config.encoder_rms_norm_eps)
        memory_size = config.chunk_num_kv_heads * config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.lower_layers = nn.ModuleList(DecoderBlock(shape, index) for index in range(config.num_lower_layers))
        self.encoder_pre_norm = RMSNorm(size, config.rms_norm_eps)
        self.encoder = ChunkEncoder(encoder_shape, config.num_encoder_layers, rope_theta=config.encoder_rope_theta)
        self.chunk_k_proj = nn.Linear(size, memory_size, bias=False)
        self.chunk_v_proj = nn.Linear(size, memory_size, bias=False)
        numbers = iter(range(config.num_lower_layers, config.num_hidden_layers))
        self.upper_layers = nn.ModuleList(
            nn.ModuleList(
                RetrievalBlock(
                    shape,
                    next(numbers),
                    softmax_off_by_one=config.softmax_off_by_one,
                    implementation=config.gca_implementation,
                )
                for _ in range(num_layers)
            )
            for num_layers in config.layers_per_group
        )
        self.query_norms = nn.ModuleList(RMSNorm(size, config.query_norm_eps) for _ in config.layers_per_group)
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, call: Call) -> Tensor:
        """Return the normed hidden states of the text, ``[B, T, M]``."""
        config, layout = self.config, call.layout
        window = Window(
            config.window_size,
            alibi_slopes(config.num_attention_heads, input_ids.device),
            document_ids=layout.document_ids,
            earlier=call.earlier_keys,
            implementation=config.attention_implementation,
        )
        text = self.embed_tokens(input_ids)
        landmark = self.embed_tokens(torch.full((1,), config.landmark_token_id, device=input_ids.device))[0]
        x = layout.insert(text, landmark)
        call.record(x)
        for block in self.lower_layers:
            x = block(x, window)
            call.record(x)
        memory = self.remember(x, call)
        for group, blocks in enumerate(self.upper_layers):
            found = self.retrieve(group, x, memory, call)
            for block in blocks:
                x = block(x, *(found or ()), window=window, layout=layout)
                call.record(x)
        x = self.norm(layout.text(x))
        if call.hidden_states is not None:
            call.hidden_states[-1] = x
        return x

    def remember(self, x: Tensor, call: Call) -> ChunkMemory | None:
        """Encode the complete chunks of the lower blocks' output ``[B, P, M]`` and add them to the cache."""
        layout, cache = call.layout, call.cache
        memory = None
        if layout.num_chunks:
            chunks = layout.chunks(x, None if cache is None else cache.pending)
            encoded = self.encoder(self.encoder_pre_norm(chunks).flatten(0, 1)).unflatten(0, chunks.shape[:2])
            text = product_input(encoded[:, :, :-1])
            heads = (-1, self.config.head_dim)
            memory = ChunkMemory(
                encoded[:, :, -1],
                self.chunk_k_proj(text).unflatten(-1, heads),
                self.chunk_v_proj(text).unflatten(-1, heads),
            )
            if isinstance(layout, PartLayout):
                memory = layout.remember(memory)
        return memory if cache is None else cache.remember(x, memory)

    def retrieve(self, group: int, x: Tensor, memory: ChunkMemory | None, call: Call) -> Retrieved | None:
        """Let the landmarks of ``[B, P, M]`` choose chunks for what follows them; None if nothing is to be read."""
        layout, config = call.layout, self.config
        if memory is None:
            return None if call.cache is None else call.cache.running(group)
        queries = self.query_norms[group](layout.landmarks(x))
        noise = config.retrieval_noise if self.training else None
        indices, scores = retrieve_chunks(
            queries,
            memory.landmarks,
            config.chunk_top_k,
            visible=layout.visible,
            first_row=layout.first_chunk,
            noise=noise,
            generator=call.noise_source(group) if noise else None,
        )
        weights = chunk_weights(scores)
        if call.retrieval is not None:
            call.retrieval.append((indices, weights.detach()))
        if call.cache is not None:
            return call.cache.serve(group, indices, weights, memory)
        if not layout.retrieves:
            return None
        assigned = layout.assign(indices, -1)
        # The fused backward walks the slots of each chunk: sorted here, once for the layers of the group.
        sort = assigned.is_cuda and torch.is_grad_enabled()
        reverse = reverse_index(assigned, memory.keys.shape[1]) if sort else None
        return Retrieved(memory.keys, memory.values, layout.assign(weights, 0.0), assigned, reverse)


class DRTForCausalLM(CausalLanguageModel):
    """DRT with a language-model head tied to the embedding."""

    config_class = DRTConfig
    _no_split_modules = ["DecoderBlock", "RetrievalBlock", "EncoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        self.model = DRTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def reference_name(name: str) -> str:
        """Return the published name of a parameter."""
        return name.replace(".query_norms.", ".lmk_norms.").replace(".encoder_pre_norm.", ".enc_prenorm.")

    @property
    def sequence_cut(self) -> Cut:
        """Where a sequence may be cut: between chunks, a window's reach apart."""
        size, reach = self.config.chunk_size, self.config.window_size - 1
        return Cut(size, -(-reach // (size + 1)) * size)

    def num_flops_per_token(self, context_length: int) -> float:
        """Return training FLOPs of one text token; see ``models.drt.flops.flops_per_token``."""
        return flops_per_token(self.config, context_length)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: DRTCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_retrieval: bool = False,
        retrieval_generator: torch.Generator | Tensor | None = None,
        part: SequencePart | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> DRTOutput:
        """Return logits of the text positions, and with labels the loss.

        Args:
            input_ids: Text tokens ``[B, T]``; landmarks are inserted inside.
            attention_mask: ``[B, T]``, with a cache ``[B, past + T]``; zeros at the left and right of a row only.
            labels: Un-shifted ``[B, T]``, -100 ignored.
            document_ids: ``[B, T]``, packed documents: a new one begins where the value changes.
            past_key_values: Cache to continue.
            use_cache: None = in evaluation mode without labels, as ``config.use_cache`` says.
            logits_to_keep: Return only the last so many logits (0 = all), or those at these positions.
            output_hidden_states: Return embeddings and block outputs at the text positions, the last one normed.
            output_retrieval: Return the retrieval of the chunks completed in this call.
            retrieval_generator: Source of the retrieval noise in training mode: a generator, or seeds of the rows,
                int64 ``[B]``, on which alone the noise of a row then depends.
            part: ``input_ids`` are this part of a sequence; the processes of its group call with the others. The loss
                is the caller's, who knows the first token of the next part.
            num_items_in_batch: Divisor of the summed loss; None = the number of counted targets.
            **kwargs: ``return_dict``; anything that cannot be honoured is refused.

        Raises:
            ValueError: If an argument does not fit the others or cannot be supported.
        """
        input_ids = check_inputs(input_ids, kwargs)
        beside: dict[str, Any] = {"past_key_values": past_key_values}
        check_documents(document_ids, input_ids, output_retrieval=output_retrieval, **beside)
        beside |= {"attention_mask": attention_mask, "document_ids": document_ids, "labels": labels}
        check_part(part, input_ids, **beside)
        self._check_noise(part, retrieval_generator)
        keeps_cache = document_ids is None and part is None and self.caches(use_cache, labels, past_key_values)
        cache = self._cache(past_key_values) if keeps_cache else None
        layout, documents = self._layout(input_ids, attention_mask, document_ids, cache=cache, part=part)
        states = self.recorded(output_hidden_states)
        call = Call(layout, cache, retrieval_generator, states, [] if output_retrieval else None)
        hidden = self.model(input_ids, call)
        logits, loss = self.score(
            hidden, labels, documents=documents, logits_to_keep=logits_to_keep, num_items=num_items_in_batch
        )
        return DRTOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),
            retrieval=None if call.retrieval is None else self._retrieval(call, input_ids),
        )

    def _check_noise(self, part: SequencePart | None, generator: torch.Generator | Tensor | None) -> None:
        noisy = self.training and self.config.retrieval_noise is not None
        if part is not None and noisy and not isinstance(generator, Tensor):
            raise ValueError("the noise of a part follows from seeds of its rows: pass them as retrieval_generator")

    def _layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        *,
        cache: DRTCache | None,
        part: SequencePart | None,
    ) -> tuple[Layout, Tensor | None]:
        """Return where everything lies, and the document of every token (None = one document without padding)."""
        if part is not None:
            return PartLayout(part, self.config.chunk_size, self.config.window_size), None
        if cache is None:
            return plain_layout(input_ids, attention_mask, document_ids, chunk_size=self.config.chunk_size)
        return cache.begin(input_ids, attention_mask), cache.document_numbers(input_ids)

    def _cache(self, past_key_values: Any) -> DRTCache:
        if past_key_values is None:
            return DRTCache(self.config, offload=self.config.offload_chunk_memory)
        if not isinstance(past_key_values, DRTCache):
            raise ValueError(f"past_key_values must be a DRTCache, got {type(past_key_values).__name__}")
        return past_key_values

    def _retrieval(self, call: Call, input_ids: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the recorded retrievals; rows of the batch with fewer chunks than others are filled with -1 and 0."""
        if not call.retrieval:
            size = (input_ids.shape[0], 0, self.config.chunk_top_k)
            none = (input_ids.new_zeros(size, dtype=torch.int32), input_ids.new_zeros(size, dtype=torch.float32))
            return (none,) * len(self.config.layers_per_group)
        counts = call.layout.row_chunks
        if counts is None:
            return tuple(call.retrieval)
        return tuple(of_real_chunks(*found, counts) for found in call.retrieval)
