"""Continue prompts with a model folder; the work behind ``generate.py``."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from evaluation.loading import load_model, load_tokenizer, max_positions
from evaluation.results import write_text
from evaluation.scoring import choose_device

Dtype = Literal["float32", "bfloat16", "float16"]


class TextGeneration:
    """Sample continuations of one prompt.

    Args:
        model_path: Hugging Face folder or hub name, with its tokenizer.
        prompt: text to continue; exactly one of ``prompt`` and ``prompt_file``.
        prompt_file: UTF-8 file with the text to continue.
        max_new_tokens: tokens to add at most; generation stops at the end-of-text token.
        temperature: 0 is greedy, else the sampling temperature.
        top_p: nucleus of the sampling, in (0, 1].
        num_samples: continuations to draw (1 when greedy).
        seed: seed of the sampling.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.
        dtype: dtype of the weights.

    Raises:
        ValueError: no prompt or two, an empty or undecodable one, or an option out of range.
        FileNotFoundError: the model folder or the prompt file does not exist.
    """

    def __init__(
        self,
        model_path: str,
        *,
        prompt: str | None = None,
        prompt_file: str | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
        device: str = "auto",
        dtype: Dtype = "float32",
    ):
        if (prompt is None) == (prompt_file is None):
            raise ValueError("pass one of prompt='TEXT' and prompt_file=PATH")
        is_path = Path(model_path).is_dir() or model_path.startswith((".", "/", "runs/"))
        if is_path and not (Path(model_path) / "config.json").is_file():
            raise FileNotFoundError(f"model.path={model_path} is no model folder: it has no config.json")
        self.model_path = model_path
        self.prompt = prompt if prompt_file is None else _read(prompt_file)
        self.max_new_tokens, self.num_samples, self.seed = max_new_tokens, num_samples, seed
        self.temperature, self.top_p = temperature, top_p
        self._check_numbers()
        if not self.prompt:
            raise ValueError("the prompt is empty: give at least one character")
        self.device, self.dtype = choose_device(device, dtype), getattr(torch, dtype)

    def _check_numbers(self) -> None:
        if self.max_new_tokens < 1 or self.num_samples < 1:
            numbers = f"{self.max_new_tokens} and {self.num_samples}"
            raise ValueError(f"max_new_tokens and num_samples must be at least 1, got {numbers}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie between 0 and 2**63 - 1, got {self.seed}")
        if self.temperature == 0 and (self.num_samples > 1 or self.top_p < 1):
            raise ValueError("num_samples and top_p need sampling: pass temperature above 0, 0.8 say")

    def run(self, output: Path | None = None) -> dict[str, Any]:
        """Generate; return ``{"samples": [...]}`` and write ``generations.jsonl`` when a folder is given.

        Raises:
            ValueError: the model has no tokenizer, or the prompt no token or more than the model takes.
        """
        tokenizer = load_tokenizer(self.model_path)
        if tokenizer is None:
            raise ValueError(f"{self.model_path} has no tokenizer (tokenizer.json): put that of its text there")
        inputs = self._encode(tokenizer)
        model = load_model(self.model_path, dtype=self.dtype, device=self.device)
        inputs = inputs.to(self.device)
        samples = []
        for index in range(self.num_samples):
            torch.manual_seed(self.seed + index)
            started = time.perf_counter()
            tokens = self._generate(model, inputs)
            seconds = time.perf_counter() - started
            samples.append(
                {
                    "prompt": self.prompt,
                    "continuation": tokenizer.decode(tokens, skip_special_tokens=True),
                    "num_prompt_tokens": inputs.shape[1],
                    "num_tokens": len(tokens),
                    "seconds": seconds,
                }
            )
        if output is not None:
            write_text(output / "generations.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        return {"samples": samples}

    def _encode(self, tokenizer: Any) -> torch.Tensor:
        """Return the prompt's ids ``[1, T]``."""
        ids = tokenizer(self.prompt, add_special_tokens=False).input_ids
        limit = max_positions(AutoConfig.from_pretrained(self.model_path))
        if not ids:
            raise ValueError("the prompt has no token: the tokenizer of the model drops all of its characters")
        if limit is not None and len(ids) + self.max_new_tokens > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and {self.max_new_tokens} are to be added, but the model takes "
                f"{limit} in all: shorten the prompt or max_new_tokens"
            )
        return torch.tensor([ids])

    def _generate(self, model: Any, inputs: torch.Tensor) -> list[int]:
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        options = sampling if self.temperature else {"do_sample": False}
        padding, ends = model.config.pad_token_id, model.config.eos_token_id
        if padding is None:  # never used with one row, but generate() warns without
            padding = ends[0] if isinstance(ends, list) else ends or 0
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=padding,
                **options,
            )
        return out[0, inputs.shape[1] :].tolist()


def _read(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompt_file={path} does not exist")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={path} is not UTF-8 text (byte {error.start}): convert it") from error
