"""Ranks that share the weights of a model run its parts equally often, whatever their rows look like."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from losses.output_head import evaluation_mode
from patches.parallel_context.families import causal_lm, text_config


def shares_weights(strategy: Strategy | None) -> bool:
    """Whether the ranks must meet in every call of a module, because each holds a part of its weights."""
    zero_3 = getattr(strategy, "zero_stage_3", False)
    return bool(zero_3) or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


class EqualCalls:
    """Count the calls of decoder and head while inside; `meet` lets ranks that had fewer make up for them.

    Rows of other lengths make other numbers of micro-batches, and a rank without its share of calls would leave the
    others waiting. Where every rank holds all weights nothing is counted.

    Args:
        strategy: the trainer's; None: the model is this process' own.
        model: the causal language model.
    """

    def __init__(self, strategy: Strategy | None, model: Any) -> None:
        self.strategy, self.model, self.active = strategy, model, shares_weights(strategy)
        self._calls = [0, 0]
        if self.active:
            base = causal_lm(model)
            self._decoder, self._head = base.get_decoder(), base.get_output_embeddings()
            self._width, self._device = text_config(base).hidden_size, base.device
        self._hooks: list[Any] = []

    def __enter__(self) -> EqualCalls:
        if self.active:
            self._hooks = [
                module.register_forward_pre_hook(self._counter(index))
                for index, module in enumerate((self._decoder, self._head))
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def meet(self) -> None:
        """Make the numbers of calls equal on all ranks; every rank calls it at the same places."""
        if not self.active:
            return
        assert self.strategy is not None
        done = torch.tensor(self._calls, device=self._device)
        most: torch.Tensor = self.strategy.reduce(done.clone(), reduce_op="max")  # type: ignore[assignment]
        decoder_calls, head_calls = (most - done).tolist()
        with evaluation_mode(self.model):  # nothing is drawn
            for _ in range(int(decoder_calls)):
                self._decoder(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self._device), use_cache=False)
            for _ in range(int(head_calls)):
                self._head(torch.zeros(1, self._width, dtype=self._head.weight.dtype, device=self._device))
        self._calls = most.tolist()

    def _counter(self, index: int) -> Any:
        def count(module: nn.Module, arguments: Any) -> None:
            self._calls[index] += 1

        return count
