"""Turn a checkpoint into a Hugging Face model folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from callbacks.checkpoint import checkpoint_step, named_checkpoint, read_checkpoint
from configuration.precision import precision_of
from configuration.run_folder import other_owner, read_config, run_of
from configuration.targets import build
from lightning_modules.lora import MergedModel


def save_model_folder(model: PreTrainedModel | MergedModel, folder: Path, *, tokenizer: Path | None) -> None:
    """Write config, safetensors weights and tokenizer; the folder appears complete or not at all.

    Raises:
        FileExistsError: there is something at ``folder`` that is not a model folder, and would be lost.
    """
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        new, old = Path(place) / "new", Path(place) / "old"
        model.save_pretrained(new)
        if tokenizer is not None:
            shutil.copytree(tokenizer, new, dirs_exist_ok=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)


# What a run draws and holds its weights in, where that is not float32.
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make a floating-point type the default of torch for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def restored_module(config: dict[str, Any], checkpoint: Path) -> Any:
    """The Lightning module of a run with the weights of a checkpoint, on the CPU, in one piece.

    What a checkpoint of adapters leaves out is drawn or loaded in the precision of the run, and so as the run had it.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    loaded = read_checkpoint(checkpoint)
    module = build(config["module"], "module")
    with default_dtype(_DTYPES.get(precision_of(config["trainer"]), torch.float32)):
        module.configure_model()
    module.on_load_checkpoint(loaded)
    module.load_state_dict(loaded["state_dict"])
    return module


def refuse_foreign(folder: Path) -> None:
    """Raise FileExistsError unless ``folder`` is absent, empty, or a model folder and nothing else."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    model_files = {name for name in names if name.endswith((".json", ".safetensors", ".model", ".txt", ".jinja"))}
    if names and ("config.json" not in names or names != model_files):
        raise FileExistsError(f"{folder} exists and is no model folder: pass another output=")


class CheckpointExport:
    """Export a run's checkpoint as a Hugging Face folder, on the CPU.

    Args:
        checkpoint: a run folder (its newest checkpoint) or one ``.ckpt`` inside it, a file or a folder of shards.
        output: the model folder to write; default ``<run>/model_step_N``.
        dtype: dtype of the saved weights.

    Raises:
        FileNotFoundError: no run or no checkpoint there.
        ValueError: the folder is that of another command.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        output: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ):
        path = Path(checkpoint)
        folder = run_of(path) if path.is_file() or path.suffix == ".ckpt" else path
        if folder is None or not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"{checkpoint} is no run folder nor a checkpoint of one: no config.yaml beside it")
        self.run_folder = folder
        owner = other_owner(self.run_folder, "train")
        if owner:
            raise ValueError(f"{self.run_folder} holds {owner}, no run: pass a folder of train.py")
        found = self.checkpoint = named_checkpoint(path)
        step = checkpoint_step(found)
        self.output = Path(output) if output else self.run_folder / f"model_step_{found.stem if step is None else step}"
        refuse_foreign(self.output)
        self.dtype = dtype

    def run(self, output: Path | None) -> dict[str, Any]:
        """Write the folder (the one given at construction; ``output`` is the same) and return what was written.

        Adapters are added to the weights of the model that they were trained on, which is loaded from where the run
        had it.

        Raises:
            ValueError: that model is another one now.
        """
        import models  # noqa: F401 - registers the suite's models

        module = restored_module(read_config(self.run_folder), self.checkpoint)
        model = module.model_to_export().to(getattr(torch, self.dtype))
        tokenizer = self.run_folder / "tokenizer"
        save_model_folder(model, self.output, tokenizer=tokenizer if tokenizer.is_dir() else None)
        merged = isinstance(model, MergedModel)
        parameters = model.num_saved if merged else sum(p.numel() for p in module.model.parameters())
        return {"model": str(self.output), "checkpoint": str(self.checkpoint), "parameters": parameters}
