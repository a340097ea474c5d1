"""Run a decoder with another attention function, and leave it exactly as it was.

Notable: the function is registered with transformers under a name of its own only while the engine works; there is no
mask counterpart, so transformers builds no mask and guesses no packed sequences. Nothing is set on modules except the
training flags, which are put back.

Legend: B batch, H heads, G kv heads, T tokens, D head size, M model width.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patches.parallel_context.families import attention_configs, causal_lm, model_fingerprint, text_config


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks of its attention function; keys are those of the new tokens only."""

    layer: int
    query: Tensor
    """``[B, H, T, D]``, rotated."""
    key: Tensor
    """``[B, G, T, D]``, rotated."""
    value: Tensor
    scale: float
    window: int | None
    softcap: float | None


Attend = Callable[[AttentionCall], Tensor]
"""Attention of one layer: output ``[B, H, T, D]``."""


class ModelHook:
    """A causal language model whose decoder can be run with our attention."""

    def __init__(self, model: Any) -> None:
        self.model = causal_lm(model)
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self.config = text_config(self.model)
        self.num_layers: int = self.config.num_hidden_layers
        self._name = f"longhaul_parallel_context_{id(self)}"

    @functools.cached_property
    def _configs(self) -> list[Any]:
        return attention_configs(self.model)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model."""
        return model_fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Evaluate without gradients and dropout while inside; everything is put back on the way out."""
        training = [module for module in self.model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the decoder on ``[B, T]`` ids at ``[B, T]`` positions; returns hidden states ``[B, T, M]``."""
        with self._attention(attend):
            output = self.decoder(
                input_ids=token_ids,
                position_ids=positions,
                use_cache=False,
                output_attentions=False,
                output_hidden_states=False,
                return_dict=True,
            )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states ``[..., M]`` to the vocabulary ``[..., V]``."""
        logits = self.head(hidden)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    @contextmanager
    def _attention(self, attend: Attend) -> Iterator[None]:
        def function(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **options: Any
        ) -> tuple[Tensor, None]:
            call = AttentionCall(
                int(module.layer_idx),  # type: ignore[arg-type]
                # Under autocast the rotation lifts queries and keys to float32; values show the type of the products.
                query.to(value.dtype),
                key.to(value.dtype),
                value,
                float(scaling),
                options.get("sliding_window"),
                options.get("softcap"),
            )
            with torch.autocast(query.device.type, enabled=False):  # logits stay float32 under autocast
                return attend(call).transpose(1, 2).contiguous(), None

        # The private name: the property would also overwrite the configurations of other parts of the model.
        before = [(config, config._attn_implementation_internal) for config in self._configs]
        try:
            ALL_ATTENTION_FUNCTIONS[self._name] = function
            for config, _ in before:
                config._attn_implementation_internal = self._name
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            ALL_ATTENTION_FUNCTIONS._local_mapping.pop(self._name, None)
