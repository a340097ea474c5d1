"""FLOPs of a DRT.

Legend: S text tokens of a chunk, C = S + 1, N chunks, K retrieved chunks, M model width, V vocabulary.
"""

from models.drt.configuration_drt import DRTConfig
from models.flops import FORWARD_AND_BACKWARD, attention_flops, block_flops, mean_window_keys


def flops_per_token(config: DRTConfig, context_length: int) -> float:
    """Return matrix-product FLOPs of forward and backward per text token of a sequence of ``context_length`` tokens.

    3 x forward; forward = (C / S) x (blocks + window attention + upper layers x (2 x 2 M^2 + 4 M S k) + encoder)
    + 2 x 2 M^2 Gc / H (chunk keys and values) + groups x 2 M e / S (retrieval scores) + 2 M V (head), where k is the
    mean number of chunks a position reads, e the mean number of visible chunks, and the window attention counts the
    keys a position really has. Landmarks are positions that are computed, hence C / S.
    """
    size, chunk = config.hidden_size, config.chunk_size
    per_text = (chunk + 1) / chunk
    num_chunks = max(1, -(-context_length // chunk))
    readable = [max(0, number - 1) for number in range(num_chunks)]
    chunks_read = sum(min(count, config.chunk_top_k) for count in readable) / num_chunks
    chunks_visible = sum(readable) / num_chunks
    kv_share = config.num_kv_heads / config.num_attention_heads
    num_upper = sum(config.layers_per_group)
    window = attention_flops(size, mean_window_keys(context_length * per_text, config.window_size))
    blocks = config.num_hidden_layers * (block_flops(size, config.intermediate_size, kv_share) + window)
    cross = num_upper * (4 * size**2 + attention_flops(size, chunks_read * chunk))
    encoder = config.num_encoder_layers * (
        block_flops(size, config.intermediate_size, 1.0) + attention_flops(size, chunk + 1)
    )
    memory = 4 * size**2 * config.chunk_num_kv_heads / config.num_attention_heads
    scores = len(config.layers_per_group) * 2 * size * chunks_visible / chunk
    head = 2 * size * config.vocab_size
    return FORWARD_AND_BACKWARD * (per_text * (blocks + cross + encoder) + memory + scores + head)
