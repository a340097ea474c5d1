"""DeepSpeed without a second division by the accumulation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
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
