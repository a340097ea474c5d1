"""A check that no logit depends on a later token: its gradient with respect to them must be exactly zero.

B batch, T tokens, M model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from evaluation.scoring import scoring_mode


class CausalityError(ValueError):
    """Raised when a logit depends on a later token."""


class CausalityMonitor(pl.Callback):
    """At validations, differentiate the logits of one text position with respect to all text embeddings.

    With w random weights, ``d (w . logits[0, t]) / d embedding[0, s]`` must be exactly 0 for all s > t. The window is
    the beginning of the first validation batch, t a function of (seed, step). Gradients, mode and random state of
    the model are left alone. The model's input embedding must embed the text ids ``[B, T]`` in one call.

    Args:
        every_n_validations: check at each n-th validation, the first included.
        max_tokens: longest window; at least 2.
        seed: of position and weights.
    """

    def __init__(self, *, every_n_validations: int = 1, max_tokens: int = 1024, seed: int = 0) -> None:
        if every_n_validations < 1 or max_tokens < 2:
            raise ValueError(
                f"every_n_validations must be at least 1 and max_tokens at least 2, got {every_n_validations} "
                f"and {max_tokens}"
            )
        self.every_n_validations, self.max_tokens, self.seed = every_n_validations, max_tokens, seed
        self._validations = 0
        self._window: Tensor | None = None

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first window."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._window = batch["input_ids"][:1, : self.max_tokens]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check, and stop the run on every rank if one of them saw a leak."""
        window, self._window = self._window, None
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        leak = ""
        if window is not None and window.shape[1] > 1:
            with trainer.precision_plugin.forward_context():
                leak = find_leak(pl_module.model, window, [self.seed, trainer.global_step])
        flag = torch.tensor(float(bool(leak)), device=pl_module.device)
        if float(trainer.strategy.reduce(flag, reduce_op="sum")) > 0:
            raise CausalityError(leak or "another rank saw a logit that depends on a later token")

    def state_dict(self) -> dict[str, Any]:
        """Keep the count, so that a resumed run checks at the same validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self._validations = state_dict["validations"]


def find_leak(model: Any, window: Tensor, seed: list[int]) -> str:
    """Return a sentence about the first later token a logit of ``window`` ``[1, T]`` depends on, or an empty string.

    Raises:
        ValueError: the model's input embedding was not called with the text, so nothing could be checked.
    """
    draw = np.random.default_rng(seed)
    length = window.shape[1]
    position = int(draw.integers(length - 1))
    gradient = _embedding_gradient(model, window, position, draw)
    if not bool(gradient[position].any()):
        raise ValueError("the logits do not depend on the text embeddings: the causality monitor is blind here")
    later = gradient[position + 1 :].float().abs().amax(dim=-1)
    # NaN counts as a leak: it is not exactly zero.
    leaking = (later != 0).nonzero().flatten().tolist()
    if not leaking:
        return ""
    return (
        f"causality is broken: the logits at position {position} of a window of {length} tokens depend on "
        f"{len(leaking)} later tokens, the first at position {position + 1 + leaking[0]} "
        f"(largest gradient {float(later.max()):.3g}, must be exactly 0)"
    )


def _embedding_gradient(model: Any, window: Tensor, position: int, draw: np.random.Generator) -> Tensor:
    """Return ``[T, M]``, the gradient of the weighted logits at a position with respect to the text embeddings."""
    leaves: list[Tensor] = []

    def watch(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if output.shape[:-1] != window.shape or leaves:
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    # Lightning validates in inference mode; tensors made there cannot take part in a gradient, hence the copy.
    # A compiled model would be compiled anew because of the hook, hence the eager stance.
    eager = torch.compiler.set_stance("force_eager")
    with scoring_mode(model, None), torch.inference_mode(False), torch.enable_grad(), eager:
        handle = model.get_input_embeddings().register_forward_hook(watch)
        try:
            logits = model(input_ids=window.clone(), use_cache=False).logits[0, position].float()
        finally:
            handle.remove()
        if not leaves:
            raise ValueError("the input embedding was never called with the text ids: nothing to monitor")
        weights = torch.from_numpy(draw.standard_normal(logits.shape[-1])).to(logits)
        return torch.autograd.grad(logits @ weights, leaves[0])[0][0]
