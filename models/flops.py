"""Matrix-product FLOPs of the parts that the models share.

Counted as 2 per multiply-add; training costs three forward passes (one forward, two for the gradients).

Legend: M model width, I width of the MLP, H heads, G kv heads, W window.
"""

FORWARD_AND_BACKWARD = 3


def block_flops(hidden_size: int, intermediate_size: int, kv_share: float) -> float:
    """Return forward FLOPs of the projections of one block at one position: 2 (2 M^2 + 2 M^2 G / H + 3 M I)."""
    return 2 * (2 * hidden_size**2 * (1 + kv_share) + 3 * hidden_size * intermediate_size)


def attention_flops(hidden_size: int, keys: float) -> float:
    """Return forward FLOPs of scores and weighted values of one query: 4 M keys."""
    return 4 * hidden_size * keys


def mean_window_keys(length: float, window: int) -> float:
    """Return the mean over positions i < length of min(i + 1, window)."""
    reached = min(length, window)
    return (reached * (reached + 1) / 2 + (length - reached) * window) / length
