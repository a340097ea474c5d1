"""Continue prompts with a model folder, behind documents where there are some; the work behind ``generate.py``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from evaluation.context_patch import ContextPatch, check_fit
from evaluation.loading import load_model, load_tokenizer, max_positions
from evaluation.results import write_text
from evaluation.scoring import choose_device
from evaluation.text_generation.documents import read_documents, read_text

Dtype = Literal["float32", "bfloat16", "float16"]


class TextGeneration:
    """Sample continuations of one prompt.

    Args:
        model_path: Hugging Face folder or hub name, with its tokenizer.
        prompt: text to continue; exactly one of ``prompt`` and ``prompt_file``.
        prompt_file: UTF-8 file with the text to continue.
        documents: files, or folders of text files, that the prompt is read behind; without a ``patch`` one after
            another, as ordinary context.
        patch: how the model reads the documents: each is a piece, unless the patch says otherwise.
        max_new_tokens: tokens to add at most; generation stops at the end-of-text token.
        temperature: 0 is greedy, else the sampling temperature.
        top_p: nucleus of the sampling, in (0, 1].
        num_samples: continuations to draw (1 when greedy).
        seed: seed of the sampling.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.
        dtype: dtype of the weights.

    Raises:
        ValueError: no prompt or two, an empty or undecodable one, a patch without documents, or an option out of range.
        FileNotFoundError: the model folder, the prompt file or a document does not exist.
    """

    def __init__(
        self,
        model_path: str,
        *,
        prompt: str | None = None,
        prompt_file: str | None = None,
        documents: str | list[str] | None = None,
        patch: ContextPatch | None = None,
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
        if patch is not None and documents is None:
            raise ValueError("a patch reads documents: pass documents=[FILE,FILE,...] or documents=FOLDER")
        is_path = Path(model_path).is_dir() or model_path.startswith((".", "/", "runs/"))
        if is_path and not (Path(model_path) / "config.json").is_file():
            raise FileNotFoundError(f"model.path={model_path} is no model folder: it has no config.json")
        self.model_path, self.patch = model_path, patch
        self.prompt = prompt if prompt_file is None else read_text(prompt_file, "prompt_file")
        self.documents = {} if documents is None else read_documents(documents)
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
            ValueError: the model has no tokenizer, the prompt no token, or prompt and documents are more than it takes.
        """
        tokenizer = load_tokenizer(self.model_path)
        if tokenizer is None:
            raise ValueError(f"{self.model_path} has no tokenizer (tokenizer.json): put that of its text there")
        query, pieces = self._encode(tokenizer)
        model = load_model(self.model_path, dtype=self.dtype, device=self.device)
        counts = {"num_documents": len(self.documents), "num_context_tokens": sum(map(len, pieces))} if pieces else {}
        counts |= {"num_pieces": len(pieces)} if self.patch is not None else {}
        samples = []
        started = time.perf_counter()
        for tokens in self._continuations(model, tokenizer, query=query, pieces=pieces):
            samples.append(
                {
                    "prompt": self.prompt,
                    "continuation": tokenizer.decode(tokens, skip_special_tokens=True),
                    "num_prompt_tokens": len(query),
                    "num_tokens": len(tokens),
                    "seconds": time.perf_counter() - started,
                    **counts,
                }
            )
            started = time.perf_counter()
        if output is not None:
            write_text(output / "generations.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        return {"samples": samples}

    def _encode(self, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of the prompt and the pieces of the documents; they fit the model."""
        query = tokenizer(self.prompt, add_special_tokens=False).input_ids
        if not query:
            raise ValueError("the prompt has no token: the tokenizer of the model drops all of its characters")
        pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in self.documents.values()]
        config = AutoConfig.from_pretrained(self.model_path)
        limit, num_new = max_positions(config), self.max_new_tokens
        if self.patch is not None:
            pieces = self.patch.split_documents(pieces)
            prefix = len(self.patch.prefix_ids(tokenizer, config.get_text_config()))
            check_fit(self.patch, pieces, prefix=prefix, query=len(query) + num_new, limit=limit)
            return query, pieces
        used = sum(map(len, pieces)) + len(query)
        if limit is not None and used + num_new > limit:
            whose = "the prompt has" if not pieces else f"the prompt and {len(pieces)} documents have"
            advice = ", or read the documents apart with patch=parallel_context" if pieces else ""
            raise ValueError(
                f"{whose} {used} tokens and {num_new} are to be added, but the model takes {limit} in all: shorten the "
                f"prompt or max_new_tokens{advice}"
            )
        return query, pieces

    def _continuations(
        self, model: Any, tokenizer: Any, *, query: list[int], pieces: list[list[int]]
    ) -> Iterator[list[int]]:
        """Yield the new tokens of each sample."""
        if self.patch is not None:
            yield from self._patched(model, tokenizer, query=query, pieces=pieces)
            return
        inputs = torch.tensor([[token for piece in pieces for token in piece] + query], device=self.device)
        for number in range(self.num_samples):
            torch.manual_seed(self.seed + number)
            yield self._generate(model, inputs)

    def _patched(self, model: Any, tokenizer: Any, *, query: list[int], pieces: list[list[int]]) -> Iterator[list[int]]:
        """Read the documents once; every sample continues the prompt behind them."""
        assert self.patch is not None
        with self.patch.bind(model, tokenizer) as bound:
            state = bound.encode(pieces, query_ids=query)
            for number in range(self.num_samples):
                sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
                options = sampling | {"seed": self.seed + number} if self.temperature else {}
                yield bound.generate(state, query, max_new_tokens=self.max_new_tokens, **options).token_ids[0]

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
