"""How a Hugging Face causal LM turns hidden states into logits, so that losses can be computed without logits.

Legend: B sequences, T tokens, N rows, M model width, V vocabulary.

Notable: logits are ``z = scale (hidden weight^T + bias)``, then ``softcap tanh(z / softcap)``. Whether a given model
does just that is not taken on trust: `verify_head` compares with the model's own logits, once, when it is attached.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.linear_cross_entropy import token_nll

# Largest difference between two ways to compute logits, as a share of the largest logit.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_16_BIT = 3e-2
# Far beyond every soft cap in use, so that one that is overlooked shows.
_LARGE_LOGIT = 150.0


@dataclass(frozen=True)
class OutputHead:
    """The last steps of a causal LM.

    Attributes:
        module: the linear layer, read when it is needed: its weight may be sharded in between.
        softcap: c of ``c tanh(z / c)``, None for none.
        scale: factor of the logits, before the soft cap.
    """

    module: nn.Module
    softcap: float | None = None
    scale: float = 1.0

    @property
    def weight(self) -> Tensor:
        """``[V, M]``."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """``[V]`` or None."""
        return self.module.bias

    def nll(
        self, hidden: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk_size: int | None = None
    ) -> Tensor:
        """Return ``logsumexp(z) - z[target]`` of every row, float32 ``[N]``, 0 where ignored.

        Args:
            hidden: ``[N, M]``.
            targets: ``[N]`` int64.
            ignore_index: target that does not count.
            chunk_size: rows whose logits exist at once, see `kernels.linear_cross_entropy.token_nll`.
        """

        def losses(rows: Tensor) -> Tensor:
            return token_nll(
                rows,
                self.weight,
                targets,
                bias=self._scaled(self.bias),
                softcap=self.softcap,
                ignore_index=ignore_index,
                chunk_size=chunk_size,
            )

        return self._inside(losses, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[..., V]`` of ``[..., M]``, in the dtype of the layer: the slow way, to compare with."""
        logits = self._inside(lambda rows: F.linear(rows, self.weight, self._scaled(self.bias)), hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _inside(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        # Called through the layer: ZeRO-3, and FSDP where it wraps the layer, gather a sharded weight in the layer's
        # hooks, for forward and backward alike. Outside of them the weight is empty.
        with _forward_of(self.module, forward):
            return self.module(self._scaled(hidden))

    def _scaled(self, x: Any) -> Any:
        # M numbers of a row instead of V; exact for the powers of two that most models use.
        if x is None or self.scale == 1:
            return x
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * self.scale).to(x.dtype)


def output_head(model: nn.Module) -> OutputHead:
    """Return the head of a causal LM, PEFT-wrapped or not.

    Raises:
        ValueError: no linear layer stands at the end (none at all, adapted by LoRA, quantised).
    """
    causal_lm = causal_lm_of(model)
    found = causal_lm.get_output_embeddings()
    head = _trained_copy(found)
    weight = getattr(head, "weight", None)
    if not isinstance(_unwrapped(head), nn.Linear) or weight is None or not weight.is_floating_point():
        raise ValueError(
            f"the output head of {type(causal_lm).__name__} is a {type(found).__module__}.{type(found).__name__}, "
            "not a plain linear layer with a floating-point weight; "
            "leave lm_head out of adapters and quantisation"
        )
    config = causal_lm.config.get_text_config()
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    scale = 1.0 if factor is None else float(factor)
    return OutputHead(
        head,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale if divisor is None else scale / divisor,
    )


def hidden_states(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Run a causal LM up to its head, without a cache; return the states the head reads, ``[B, T, M]``.

    Transformers' models run their decoder alone. Models whose body is a plain module with arguments of its own (DRT
    and the sliding-window model, whose body works on text and landmarks) run their own forward with no row for the
    head; the result holds text positions only.

    Args:
        model: the causal LM, PEFT-wrapped or not.
        input_ids: ``[B, T]`` int64.
        **inputs: ``attention_mask``, ``position_ids``, ``document_ids``: what the model takes.

    Raises:
        ValueError: the model has no body apart from its head.
    """
    causal_lm = causal_lm_of(model)
    body = causal_lm.base_model
    if body is causal_lm:
        raise ValueError(f"{type(causal_lm).__name__} has no body apart from its head (base_model_prefix names none)")
    if isinstance(body, PreTrainedModel):
        return _last_state(body(input_ids=input_ids, use_cache=False, **inputs))
    if "logits_to_keep" not in inspect.signature(causal_lm.forward).parameters:
        raise ValueError(f"{type(causal_lm).__name__}.forward has no logits_to_keep: its head cannot be left out")
    outputs: list[Any] = []
    hook = body.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        none = input_ids.new_empty(0)
        causal_lm(input_ids=input_ids, use_cache=False, logits_to_keep=none, **inputs)
    finally:
        hook.remove()
    return _last_state(outputs[-1])


def verify_head(model: nn.Module) -> None:
    """Compare `output_head` with the model's own logits on a few random tokens, as they are and at large logits.

    A model on the meta device has nothing to compare and passes. Sharded weights must be set up to be gathered: call
    it when the training strategy has wrapped the model.

    Raises:
        ValueError: the model does something else to its logits; its class is named.
    """
    head = output_head(model)
    if head.weight.is_meta:
        return
    causal_lm = causal_lm_of(model)
    size = min(_unwrapped(head.module).out_features, causal_lm.get_input_embeddings().num_embeddings)
    tokens = torch.randint(size, (1, 8), generator=torch.Generator().manual_seed(0)).to(head.weight.device)
    with evaluation_mode(model), torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        hidden = hidden_states(model, tokens)
        large = _LARGE_LOGIT / replace(head, softcap=None).logits(hidden).abs().max().clamp_min(1e-3).item()
        for factor in (1.0, large):
            expected = _own_logits(model, tokens, factor)
            error = (head.logits(hidden * factor).float() - expected.float()).abs().max()
            # Written so that NaN fails, too.
            if not error <= _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BIT) * expected.abs().max():
                raise ValueError(
                    f"the logits of {type(causal_lm).__name__} are not its head times its hidden states, with a scale "
                    f"(logit_scale, logits_scaling) and a soft cap (final_logit_softcapping) from its configuration: "
                    f"they differ by {error.item():.2g}; this model cannot be trained or scored without its logits"
                )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and all else that training draws off; put every module's own mode back, whatever happens.

    The flags are set one by one: a ``train()`` of somebody else's module may do more than set them.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _own_logits(model: nn.Module, tokens: Tensor, factor: float) -> Tensor:
    """Return the logits of the model's own forward, its body's result multiplied by ``factor``."""

    def multiplied(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output * factor
        if isinstance(output, tuple):
            return output[0] * factor, *output[1:]
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    hook = causal_lm_of(model).base_model.register_forward_hook(multiplied)
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()


def _last_state(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def causal_lm_of(model: nn.Module) -> Any:
    """Return the Hugging Face model inside a PEFT model; its layers hold the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trained_copy(head: Any) -> Any:
    """Return the layer in use where PEFT trains a full copy of the head (``modules_to_save``)."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    return head.original_module if head.disable_adapters else copies[head.active_adapters[0]]


def _unwrapped(head: Any) -> Any:
    return getattr(head, "_fsdp_wrapped_module", head)


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module compute ``forward`` inside its hooks."""
    inner = _unwrapped(module)
    before = vars(inner).get("forward")
    inner.forward = forward
    try:
        yield
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before
