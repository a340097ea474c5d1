"""The published methods that parallel encoding is ranked against, at equal capacity."""

from typing import Literal

from patches.parallel_context.checks import check_choice, check_count
from patches.parallel_context.eviction import TokenEviction
from patches.parallel_context.patch import ParallelContext

BASELINES = ("full", "streaming", "snapkv", "h2o", "pyramidkv", "random")


def baseline(
    name: Literal["full", "streaming", "snapkv", "h2o", "pyramidkv", "random"], *, capacity: int | None = None
) -> ParallelContext:
    """Return a published method as a patch over one piece.

    Args:
        name: "full": ordinary attention, no capacity. "streaming": StreamingLLM, sinks and a window in all layers.
            "snapkv", "pyramidkv", "random": slots dropped after the query (observation 32, kernel 7, maximum). "h2o":
            half heavy hitters by the attention of all rows of prompt and query, half recent.
        capacity: Slots that stay per layer and kv head.

    Raises:
        ValueError: On an unknown name, or a capacity that is missing.
    """
    check_choice("name", name, BASELINES)
    if name == "full":
        return ParallelContext(degree=1)
    check_count("capacity", capacity)
    assert capacity is not None
    if name == "streaming":
        return ParallelContext(degree=1, eviction=TokenEviction("streaming", capacity=capacity))
    eviction = TokenEviction(name, capacity=capacity, observation=32, kernel=7, pool="max", stage="query")
    return ParallelContext(degree=1, eviction=eviction)
