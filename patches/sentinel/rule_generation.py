"""Generation under the rule of a baseline, over a cache that forgets what its rule no longer shows.

A rule that hides an entry from a query hides it from all later ones; so after every forward call what the next query
would not see can leave, and no mask is needed while decoding.

Legend: B batch, T tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from patches.rules import Rule, as_attention_mask, local, scattered, scattered_keep
from patches.rules_kinds import PLAIN
from patches.sentinel.cache import HOLE, EvictingCache
from patches.sentinel.context import CompressedContext
from patches.sentinel.decoding import ForgettingDecoding
from patches.sentinel.sentinels import Sentinels, suppress


class RuleGenerator(ForgettingDecoding):
    """Decoding loop for ``model.generate(ids, custom_generate=RuleGenerator(...), ...)`` under a rule over positions.

    Args:
        rule: A rule that never shows again what it has hidden: `causal`, `local`, `streaming`, `scattered`,
            `sinks_and_share`.
        context: What was read before, see `read_under`.
    """

    def __init__(self, rule: Rule, *, context: CompressedContext) -> None:
        super().__init__(context.sentinels, context=context)
        self.rule = rule

    def shorten(self, model: Any, state: CompressedContext, *, num_fed: int) -> None:
        """Evict what the next query does not see."""
        forget(state.cache, self.rule, state.next_position)


@torch.no_grad()
def read_under(model: nn.Module, input_ids: Tensor, rule: Rule, *, sentinels: Sentinels | None) -> CompressedContext:
    """Read rows in one pass under a rule and keep what the next query sees.

    Args:
        model: Decoder, PEFT-wrapped or not.
        input_ids: ``[B, T]`` without padding.
        rule: See `RuleGenerator`.
        sentinels: Ids that are never predicted; None = none.
    """
    batch_size, num_tokens = input_ids.shape
    positions = torch.arange(num_tokens, device=input_ids.device).expand(batch_size, -1)
    cache, row = EvictingCache(), torch.zeros_like(input_ids)
    cache.append(kind=row + PLAIN, span=row, position_ids=positions)
    mask = as_attention_mask(model, rule, query_index=positions)
    options = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
    logits = model(input_ids=input_ids, attention_mask=mask, **options).logits[:, -1]
    next_position = positions[:, -1] + 1
    forget(cache, rule, next_position)
    return CompressedContext(cache, sentinels, next_position, suppress(logits, sentinels))


def forget(cache: EvictingCache, rule: Rule, query: Tensor) -> None:
    """Evict the entries that queries ``[B]`` at these positions do not see."""
    batch = torch.arange(query.shape[0], device=query.device)[:, None]
    seen = rule(batch, torch.zeros_like(batch), query[:, None], cache.position_ids.clamp(min=0))
    keep = seen.expand_as(cache.index) & (cache.index != HOLE)
    if not bool(keep.all()):
        cache.evict(keep)


def sinks_and_share(num_sinks: int, compression_ratio: float) -> Rule:
    """Return the rule of attention sinks and a window that grows: a query sees as many keys as under `local`.

    ``key < num_sinks`` or ``int(query * ratio) + num_sinks <= key <= query``.

    Args:
        num_sinks: First tokens of a row, always visible.
        compression_ratio: Fraction of the past that is removed, in [0, 1).
    """
    newest = local(compression_ratio)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = newest(batch, head, query, (key - num_sinks).clamp(min=0)) & (key >= num_sinks)
        return ((key < num_sinks) | inside | (key == query)) & (key <= query)

    return visible


def scattered_share(
    num_tokens: int,
    num_more: int,
    compression_ratio: float,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Rule:
    """Return the rule of scattered attention over a prefix and what follows it, for all rows alike.

    Of the prefix exactly the share is kept; each further token is kept with that probability.

    Args:
        num_tokens: Tokens of the prefix.
        num_more: Tokens that may follow.
        compression_ratio: Fraction of the past that is removed, in [0, 1).
        generator: Source of randomness, on the CPU.
        device: Where the rule is used.
    """
    prefix = scattered_keep(1, num_tokens, compression_ratio, generator=generator)
    more = scattered_keep(1, num_more, compression_ratio, generator=generator, exact=False)
    return scattered(torch.cat([prefix, more], 1)[0].to(device))
