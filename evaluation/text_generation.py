"""Continue prompts with a model folder; the work behind ``generate.py``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
        ValueError: no prompt or two, or an option out of range.
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
        if max_new_tokens < 1 or num_samples < 1:
            raise ValueError(f"max_new_tokens and num_samples must be at least 1, got {max_new_tokens}, {num_samples}")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature}, {top_p}")
        if temperature == 0 and (num_samples > 1 or top_p < 1):
            raise ValueError("num_samples and top_p need sampling: pass temperature above 0, 0.8 say")
        if prompt_file is not None and not Path(prompt_file).is_file():
            raise FileNotFoundError(f"prompt_file={prompt_file} does not exist")
        if model_path.startswith((".", "/", "runs/")) and not (Path(model_path) / "config.json").is_file():
            raise FileNotFoundError(f"model.path={model_path} is no model folder: it has no config.json")
        self.model_path = model_path
        self.prompt = prompt if prompt_file is None else Path(prompt_file).read_text(encoding="utf-8")
        self.max_new_tokens, self.num_samples, self.seed = max_new_tokens, num_samples, seed
        self.temperature, self.top_p = temperature, top_p
        if not self.prompt:
            raise ValueError("the prompt is empty: give at least one character")
        self.device, self.dtype = choose_device(device, dtype), getattr(torch, dtype)

    def run(self, output: Path | None = None) -> dict[str, Any]:
        """Generate; return ``{"samples": [...]}`` and write ``generations.jsonl`` when a folder is given."""
        tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=self.dtype).to(self.device).eval()
        inputs = tokenizer(self.prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(self.device)
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

    def _generate(self, model: Any, inputs: torch.Tensor) -> list[int]:
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        options = sampling if self.temperature else {"do_sample": False}
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=model.config.pad_token_id or model.config.eos_token_id or 0,
                **options,
            )
        return out[0, inputs.shape[1] :].tolist()
