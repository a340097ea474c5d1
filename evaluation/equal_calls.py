"""Ranks that share the weights of a model run its parts equally often, whatever their rows look like.

Notable: a part whose weights lie in slices on all ranks is gathered by all of them together when it is called. A rank
that went elsewhere meanwhile would leave the others waiting, so it is not enough to count calls and make up for them
afterwards: before every call the ranks agree on which part comes next.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from transformers import PreTrainedModel

from losses.output_head import causal_lm_of, evaluation_mode

# In the order in which ranks with different wishes take them.
_DECODER, _HEAD, _NOTHING = 0, 1, 2


def shares_weights(strategy: Strategy | None) -> bool:
    """Whether the ranks must meet in every call of a module, because each holds a part of its weights."""
    zero_3 = getattr(strategy, "zero_stage_3", False)
    return bool(zero_3) or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


class EqualCalls:
    """While inside, no rank calls decoder or head alone; `meet` lets ranks that have no more calls wait for the others.

    A rank without a use for the call that comes next makes one on a single token. Rows of other lengths make other
    numbers of calls. Where every rank holds all weights nothing is done.

    Args:
        strategy: the trainer's; None: the model is this process' own.
        model: the causal language model, PEFT-wrapped or not.
        head_is_read: the weight of the head is read after every call of the decoder, before the head is called, as
            `losses.output_head` does. ZeRO-3 gathers what is read, too.
    """

    def __init__(self, strategy: Strategy | None, model: Any, *, head_is_read: bool = False) -> None:
        self.strategy, self.model, self.active = strategy, model, shares_weights(strategy)
        self._making_up = False
        self._hooks: list[Any] = []
        if self.active:
            base = causal_lm_of(model)
            # A body with arguments of its own is run by the whole model, see `losses.output_head.hidden_states`; the
            # head is then part of the call.
            apart = isinstance(base.base_model, PreTrainedModel)
            self._decoder = base.get_decoder() if apart else base
            self._head: Any = base.get_output_embeddings()
            self._calls_head, self._reads_head = apart, head_is_read
            self._width, self._device = base.config.get_text_config().hidden_size, base.device

    def __enter__(self) -> EqualCalls:
        if self.active:
            self._hooks = [
                module.register_forward_pre_hook(self._before(part), prepend=True)  # what gathers is a hook, too
                for part, module in ((_DECODER, self._decoder), (_HEAD, self._head))[: 1 + self._calls_head]
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def meet(self) -> None:
        """Wait until no rank has calls to make, taking part in theirs; every rank calls it at the same places."""
        if self.active:
            self._take_part_until(_NOTHING)

    def _before(self, part: int) -> Any:
        def agree(module: nn.Module, arguments: Any) -> None:
            if not self._making_up:
                self._take_part_until(part)

        return agree

    @torch.no_grad()
    def _take_part_until(self, wish: int) -> None:
        """Make the calls that other ranks wish for until it is the turn of this one's wish."""
        assert self.strategy is not None
        while (turn := self._turn(wish)) != wish:
            self._making_up = True
            with evaluation_mode(self.model):  # nothing is drawn
                if turn == _DECODER:
                    token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
                    self._decoder(input_ids=token, use_cache=False)
                    _ = self._head.weight if self._reads_head else None
                else:
                    self._head(torch.zeros(1, self._width, dtype=self._head.weight.dtype, device=self._device))
            self._making_up = False

    def _turn(self, wish: int) -> int:
        """The first of what the ranks wish for."""
        assert self.strategy is not None
        wishes = torch.tensor(-float(wish), device=self._device)
        found: Any = self.strategy.reduce(wishes, reduce_op="max")
        return int(-found.item())
