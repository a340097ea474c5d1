"""Text generated at validations from fixed prompts, to see what the numbers mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import AutoTokenizer

from evaluation.scoring import scoring_mode


class SampleText(pl.Callback):
    """Generate from prompts; write ``samples/step_<n>.txt`` in the run folder and TensorBoard's text tab.

    The global random state, gradients and the model's mode are as before; all ranks generate (a sharded model
    needs them all), the first one writes.

    Args:
        prompts: texts to continue; an empty one starts from the end-of-text token.
        tokenizer: tokenizer folder; None is that of the corpus (``trainer.datamodule.tokenizer_path``).
        max_new_tokens: tokens to generate for each prompt, fewer if the text ends.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the draws; prompt i uses ``seed + i`` at every validation.
        every_n_validations: generate at each n-th validation.
        output: the run folder; None is the trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        prompts: list[str],
        *,
        tokenizer: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        every_n_validations: int = 1,
        output: str | None = None,
    ) -> None:
        if not prompts:
            raise ValueError('prompts is empty: give at least one text, or [""] to start from nothing')
        if max_new_tokens < 1 or every_n_validations < 1:
            raise ValueError(
                f"max_new_tokens and every_n_validations must be at least 1, got {max_new_tokens} "
                f"and {every_n_validations}"
            )
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (likeliest token) or above, got {temperature}")
        self.prompts, self.tokenizer_path = list(prompts), tokenizer
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.every_n_validations, self.output = every_n_validations, output
        self._tokenizer: Any = None
        self._validations = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the tokenizer before training starts, so that a missing one is reported at once."""
        path = self.tokenizer_path or getattr(trainer.datamodule, "tokenizer_path", None)
        if path is None:
            raise ValueError("SampleText needs a tokenizer: give tokenizer=FOLDER, the corpus has none")
        if not Path(path).is_dir():
            raise FileNotFoundError(f"no tokenizer folder {path}")
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer in {path} has no end-of-text token, which texts begin and end with")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generate and write."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        # A compiled model would be compiled anew for each length of a growing text.
        eager = torch.compiler.set_stance("force_eager")
        with scoring_mode(pl_module.model, None) as device, trainer.precision_plugin.forward_context(), eager:
            continuations = [self._continue(pl_module.model, i, device) for i in range(len(self.prompts))]
        if trainer.is_global_zero:
            self._write(trainer, continuations)

    def state_dict(self) -> dict[str, Any]:
        """Keep the count, so that a resumed run samples at the same validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self._validations = state_dict["validations"]

    def _continue(self, model: Any, index: int, device: torch.device) -> str:
        tokenizer = self._tokenizer
        ids = tokenizer.encode(self.prompts[index], add_special_tokens=False) or [tokenizer.eos_token_id]
        inputs = torch.tensor([ids], device=device)
        draws = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature else {}
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed + index)
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **({"do_sample": False} | draws),
            )
        return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)

    def _write(self, trainer: pl.Trainer, continuations: list[str]) -> None:
        step = trainer.global_step
        blocks = [f"prompt: {p}\n\n{text}\n" for p, text in zip(self.prompts, continuations, strict=True)]
        path = Path(self.output or trainer.default_root_dir) / "samples" / f"step_{step:08d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"\n{'-' * 80}\n".join(blocks), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for i, (prompt, text) in enumerate(zip(self.prompts, continuations, strict=True)):
                    # Four blanks in front keep the text as it is in Markdown.
                    shown = "\n".join("    " + line for line in (prompt + text).splitlines())
                    logger.experiment.add_text(f"samples/{i}", shown, step)
