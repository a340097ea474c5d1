"""The published methods that parallel encoding is ranked against: over one piece at equal capacity, over windows."""

from typing import Literal

from patches.parallel_context.checks import check_choice, check_count
from patches.parallel_context.eviction import TokenEviction
from patches.parallel_context.options import APE
from patches.parallel_context.patch import ParallelContext

PARALLEL = ("pcw", "ape")
BASELINES = ("full", "streaming", "snapkv", "h2o", "pyramidkv", "random", *PARALLEL)


def baseline(
    name: Literal["full", "streaming", "snapkv", "h2o", "pyramidkv", "random", "pcw", "ape"],
    *,
    capacity: int | None = None,
    degree: int | None = None,
    max_piece_tokens: int | None = None,
) -> ParallelContext:
    """Return a published method as a patch.

    Args:
        name: Over one piece: "full": ordinary attention, no capacity. "streaming": StreamingLLM, sinks and a window in
            all layers. "snapkv", "pyramidkv", "random": slots dropped after the query (observation 32, kernel 7,
            maximum). "h2o": half heavy hitters by the attention of all rows of prompt and query, half recent.
            Over several: "pcw" (2212.10947): windows at the same positions behind one BOS, the query behind the
            longest. "ape" (2502.05431): the same, with temperature and scale 0.9 on the windows.
        capacity: Slots that stay per layer and kv head ("streaming" to "random").
        degree: Windows of "pcw" and "ape".
        max_piece_tokens: Their greatest size, instead of the number.

    Raises:
        ValueError: On an unknown name, or an option that is missing or is not the method's.
    """
    check_choice("name", name, BASELINES)
    if name in PARALLEL:
        if capacity is not None:
            raise ValueError(f"{name} keeps every slot: leave capacity={capacity} out")
        if (degree is None) == (max_piece_tokens is None):
            raise ValueError(
                f"{name} needs degree or max_piece_tokens, one of them, got {degree} and {max_piece_tokens}"
            )
        ape = APE(temperature=0.9, scale=0.9) if name == "ape" else None
        return ParallelContext(degree=degree, max_piece_tokens=max_piece_tokens, position_mode="ML", ape=ape)
    if degree is not None or max_piece_tokens is not None:
        raise ValueError(f"{name} reads one piece: degree and max_piece_tokens belong to {' and '.join(PARALLEL)}")
    if name == "full":
        return ParallelContext(degree=1)
    check_count("capacity", capacity)
    assert capacity is not None
    if name == "streaming":
        return ParallelContext(degree=1, eviction=TokenEviction("streaming", capacity=capacity))
    eviction = TokenEviction(name, capacity=capacity, observation=32, kernel=7, pool="max", stage="query")  # type: ignore[arg-type]
    return ParallelContext(degree=1, eviction=eviction)
