"""DeepSpeed without a second division by the accumulation, and with the gradient norm that its engine measures."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch import Tensor


class GradientsScaledOnce(DeepSpeedPrecision):
    """Tell the engine to take the loss as it is.

    Lightning 2.6 divides the returned loss by ``accumulate_grad_batches`` and DeepSpeed's engine then divides it by
    ``gradient_accumulation_steps`` again. Adam hides the factor; clipping and SGD do not.

    Args:
        precision: as the trainer's ``precision``, which is left out when this plugin is given.
    """

    def backward(self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Run the engine's backward pass with its own scaling switched off."""
        super().backward(tensor, model, optimizer, *args, **{**kwargs, "scale_wrt_gas": False})

    def optimizer_step(self, optimizer: Any, model: pl.LightningModule, closure: Any, **kwargs: Any) -> Any:
        """Let the engine step, and take the norm of the gradient over from it, as ``model.grad_norm``.

        Raises:
            ValueError: the norm is not finite, and no scaler of float16 gradients has skipped the step.
        """
        result = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        engine: Any = model.trainer.model
        norm = engine.get_global_grad_norm()
        if norm is not None:
            model.grad_norm = torch.as_tensor(float(norm))  # type: ignore[assignment]
            if not torch.isfinite(model.grad_norm) and self.precision != "16-mixed":
                raise ValueError(
                    f"the gradient of step {model.trainer.global_step + 1} is not finite: resume from the last "
                    "checkpoint with a lower learning rate, or look at the data"
                )
        return result
