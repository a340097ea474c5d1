"""What checkpoints and finished runs hold of a Lightning module's ``model``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from transformers import PreTrainedModel

from lightning_modules.adapter_checkpoint import frozen_identity, leave_frozen_out, put_frozen_back
from lightning_modules.lora import MergedModel, has_adapters, save_adapter
from lightning_modules.model_identity import refuse_other_model


class StoredModel(pl.LightningModule):
    """A module whose Hugging Face model is checkpointed with its identity, and exported.

    Attributes:
        frozen_identity: which weights the adapters stand on, of which checkpoints hold none; None without adapters.
    """

    model: PreTrainedModel
    frozen_identity: str | None = None

    def identify_frozen(self) -> None:
        """Note which weights the adapters of the new model stand on, if it has any."""
        if has_adapters(self.model):
            self.frozen_identity = frozen_identity(self)

    def model_to_export(self) -> Any:
        """What a finished run saves with ``save_pretrained``: the model, adapters added to its weights."""
        return MergedModel(self.model) if has_adapters(self.model) else self.model

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapters in PEFT's format.

        Raises:
            ValueError: the model has none.
        """
        save_adapter(self.model, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model's configuration beside its weights; of a model with adapters only what training changes."""
        checkpoint["model_config"] = self.model.config.to_json_string(use_diff=False)
        if self.frozen_identity is not None:
            leave_frozen_out(self, checkpoint, self.frozen_identity)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; put frozen weights back that it leaves out.

        Raises:
            ValueError: its configuration, its tensors or the weights that its adapters stand on are not those of this
                model.
        """
        put_frozen_back(self, checkpoint, self.frozen_identity)
        refuse_other_model(self, checkpoint)
