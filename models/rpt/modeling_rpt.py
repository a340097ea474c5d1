"""A language model that reads what a frozen retriever finds, after Rubin and Berant's Retrieval-Pretrained Transformer.

The same layers as a DRT's, but which chunks are read is decided outside and by their text alone, and their scores take
no part. Retrieval happens on the fly inside the sequence a call sees: a chunk's neighbours lie before everything that
the window attention covers.

Legend: B batch, T tokens, S tokens of a chunk, R complete chunks of a call, E stored chunks, K neighbours, M model
width.
"""

import torch
from torch import Tensor, nn

from models.blocks import BlockShape, DecoderBlock, Window, alibi_slopes
from models.drt.encoder import EncoderBlock
from models.flops import FORWARD_AND_BACKWARD, attention_flops, block_flops, mean_window_keys
from models.rms_norm import RMSNorm, product_input
from models.rotary import rotary_at
from models.row_lm import RowCall, RowLanguageModel
from models.rpt.cache import RPTCache
from models.rpt.configuration_rpt import RPTConfig
from models.rpt.encoders import DenseRetriever, MeanPooledEncoder
from models.rpt.reading import Neighbours, QueryGroups, ReadingBlock
from models.rpt.retrievers import BM25Retriever, RandomRetriever, Retriever


def configured_retriever(config: RPTConfig, device: torch.device) -> Retriever:
    """Build the retriever that a configuration names.

    Raises:
        OSError: there is no such encoder or tokenizer.
    """
    if config.retriever == "bm25":
        return BM25Retriever()
    if config.retriever == "random":
        return RandomRetriever(config.retriever_seed)
    from transformers import AutoTokenizer

    assert config.retriever_encoder is not None
    named = config.retriever_tokenizer
    encoder = MeanPooledEncoder.from_pretrained(config.retriever_encoder, text=named is not None)
    encoder.model.to(device)
    return DenseRetriever(encoder, AutoTokenizer.from_pretrained(named) if named is not None else None)


class NeighbourEncoder(nn.Module):
    """Bidirectional blocks over single chunks, without positions, and a final norm."""

    def __init__(self, shape: BlockShape, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderBlock(shape) for _ in range(num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head_dim = shape.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """Encode every chunk of ``[B, S, M]`` by itself."""
        # Every token at position 0: the rotation is none.
        table = rotary_at(torch.zeros(1, device=x.device), self.head_dim, theta=1.0)
        for layer in self.layers:
            x = layer(x, table)
        return self.norm(x)


class RPTModel(nn.Module):
    """Embedding, lower blocks, chunk memory, upper blocks that read it, final norm."""

    def __init__(self, config: RPTConfig, retriever: Retriever | None) -> None:
        super().__init__()
        self.config, self.retriever = config, retriever
        size, lower = config.hidden_size, config.num_lower_layers
        shape = BlockShape.of(config)
        encoder_shape = shape.bidirectional(config.encoder_rms_norm_eps)
        kv_size = config.num_kv_heads * config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.lower_layers = nn.ModuleList(DecoderBlock(shape, index) for index in range(lower))
        self.encoder_pre_norm = RMSNorm(size, config.rms_norm_eps)
        self.encoder = NeighbourEncoder(encoder_shape, config.num_encoder_layers)
        self.chunk_k_proj = nn.Linear(size, kv_size, bias=False)
        self.chunk_v_proj = nn.Linear(size, kv_size, bias=False)
        upper = range(lower, config.num_hidden_layers)
        self.upper_layers = nn.ModuleList(ReadingBlock(shape, index) for index in upper)
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, call: RowCall) -> Tensor:
        """Return normed hidden states ``[B, T, M]``."""
        config, cache = self.config, call.cache
        window = Window(
            config.window_size,
            alibi_slopes(config.num_attention_heads, input_ids.device),
            document_ids=None if cache is None else cache.begin(input_ids, call),
            earlier=None if cache is None else cache.ring,
            implementation=config.attention_implementation,
        )
        x = self.embed_tokens(input_ids)
        call.record(x)
        for block in self.lower_layers:
            x = block(x, window)
            call.record(x)
        options = {"chunk_size": config.chunk_size, "device": x.device}
        groups = QueryGroups(call.past, input_ids.shape[1], **options)
        found = self.neighbours(x, input_ids, groups, call)
        tensors = () if found is None else (found.keys, found.values, found.real)
        for block in self.upper_layers:
            x = block(x, *tensors, window=window, groups=groups)
            call.record(x)
        return self.norm(x)

    def neighbours(self, x: Tensor, input_ids: Tensor, groups: QueryGroups, call: RowCall) -> Neighbours | None:
        """Remember the chunks that lower outputs ``[B, T, M]`` complete; return what the groups read."""
        cache, size = call.cache, self.config.chunk_size
        if cache is None:
            number = input_ids.shape[1] // size
            if number <= self.config.chunks_in_window:
                return None
            keys, values = self.encode(x[:, : number * size].unflatten(1, (number, size)))
            indices = self.retrieve(input_ids[:, : number * size].unflatten(1, (number, size)))
        else:
            chunks, done, counts = cache.complete_chunks(x, call)
            if max(counts):
                keys, values, tokens = cache.store(*self.encode(chunks), done, counts)
                cache.neighbours = self.retrieve(tokens)
            if cache.neighbours is None or cache.neighbours.shape[1] <= self.config.chunks_in_window:
                return None
            if not max(counts):
                keys, values = cache.keys, cache.values
            indices = cache.neighbours
        number = groups.chunks.clamp(0, indices.shape[1] - 1)[..., None].expand(-1, -1, indices.shape[2])
        read = indices.gather(1, number).masked_fill((groups.chunks < 0)[..., None], -1)
        return Neighbours.gather(keys, values, read)

    def encode(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values ``[B, R, S, G, D]`` of chunks ``[B, R, S, M]``."""
        encoded = self.encoder(self.encoder_pre_norm(chunks).flatten(0, 1)).unflatten(0, chunks.shape[:2])
        encoded = product_input(encoded)
        heads = (-1, self.config.head_dim)
        return self.chunk_k_proj(encoded).unflatten(-1, heads), self.chunk_v_proj(encoded).unflatten(-1, heads)

    @torch.no_grad()
    def retrieve(self, chunk_tokens: Tensor) -> Tensor:
        """Return the neighbours ``[B, E, K]`` of all chunks ``[B, E, S]``, none from within the window."""
        if self.retriever is None:
            self.retriever = configured_retriever(self.config, chunk_tokens.device)
        number = torch.arange(chunk_tokens.shape[1], device=chunk_tokens.device)
        last = (number - self.config.chunks_in_window).clamp_min(0)
        visible = torch.stack([torch.zeros_like(last), last], dim=1).expand(len(chunk_tokens), -1, -1)
        return self.retriever(chunk_tokens, self.config.chunk_top_k, visible)


class RPTForCausalLM(RowLanguageModel):
    """Language model with a frozen retriever, and a head tied to the embedding.

    Args:
        config: Sizes, and the name of the retriever.
        retriever: Another retriever than the configured one; it is not saved with the model.
    """

    config_class = RPTConfig
    cache_class = RPTCache
    _no_split_modules = ["DecoderBlock", "EncoderBlock", "ReadingBlock"]  # noqa: RUF012

    def __init__(self, config: RPTConfig, retriever: Retriever | None = None) -> None:
        super().__init__(config)
        self.model = RPTModel(config, retriever)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def num_flops_per_token(self, context_length: int) -> float:
        """Return matrix-product FLOPs of forward and backward per token of a sequence of ``context_length``.

        3 x forward; forward = blocks + window attention + upper layers x (2 x 2 M^2 + 4 M S k) + encoder
        + 2 x 2 M^2 G / H (chunk keys and values) + 2 M V, where k is the mean number of neighbours. The retriever is
        not counted: what it costs is its own affair.
        """
        config, size = self.config, self.config.hidden_size
        kv_share = config.num_kv_heads / config.num_attention_heads
        keys = mean_window_keys(context_length, config.window_size)
        num_chunks = max(1, context_length // config.chunk_size)
        visible = [max(0, number - config.chunks_in_window) for number in range(num_chunks)]
        read = sum(min(count, config.chunk_top_k) for count in visible) / num_chunks * config.chunk_size
        blocks = config.num_hidden_layers * (
            block_flops(size, config.intermediate_size, kv_share) + attention_flops(size, keys)
        )
        cross = config.num_upper_layers * (4 * size**2 + attention_flops(size, read))
        encoder = config.num_encoder_layers * (
            block_flops(size, config.intermediate_size, 1.0) + attention_flops(size, config.chunk_size)
        )
        memory = 4 * size**2 * kv_share
        return FORWARD_AND_BACKWARD * (blocks + cross + encoder + memory + 2 * size * config.vocab_size)
