"""What every evaluation of losses needs: the token stream, the model's mode and device, the means of summed losses."""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class Corpus(Protocol):
    """What is needed of a token corpus on disk; `datamodules.packed_text.TokenCorpus` has it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""

    @property
    def identity(self) -> str:
        """Hash of content and options."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start..stop - 1`` as int64."""


@dataclass
class TokenStream:
    """The tokens to score with their identity, read window by window."""

    source: Any
    num_tokens: int
    identity: str
    bytes_per_token: float | None = None

    @classmethod
    def open(cls, tokens: Any, max_tokens: int | None = None) -> "TokenStream":
        """Wrap a corpus or one-dimensional ids, cut to the first ``max_tokens``."""
        if isinstance(tokens, Corpus):
            size, length = getattr(tokens, "num_bytes", None), tokens.num_tokens
            ratio = size / length if size and length else None
            return cls(tokens, min(length, max_tokens or length), tokens.identity, ratio)
        array = np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"tokens must be one-dimensional integers, got {array.dtype} of shape {array.shape}")
        array = array.astype(np.int64)
        identity = "sha256:" + hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()
        return cls(array, min(array.size, max_tokens or array.size), identity)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start..stop - 1`` as int64."""
        return self.source[start:stop] if isinstance(self.source, np.ndarray) else self.source.read(start, stop)


def mean_report(nll_sum: float, num_targets: int, bytes_per_token: float | None) -> dict[str, float | None]:
    """Return ``loss`` (nats per target), ``perplexity`` and ``bits_per_byte``.

    ``bits_per_byte = nll_sum / ln 2 / (num_targets * bytes_per_token)`` with the bytes per token of the whole split;
    None where the bytes are not known.
    """
    loss = nll_sum / num_targets if num_targets else math.nan
    bits = loss / math.log(2) / bytes_per_token if bytes_per_token else None
    return {"loss": loss, "perplexity": perplexity_of(loss), "bits_per_byte": bits}


def perplexity_of(loss: float) -> float:
    """Return exp(loss) of a mean loss in nats; an untrained or broken model has an infinite one, not an error."""
    return math.exp(loss) if not loss > 700 else math.inf  # exp(710) exceeds a float64


@contextlib.contextmanager
def scoring_mode(model: Any, dtype: torch.dtype | None) -> Iterator[torch.device]:
    """Put a model in eval mode without gradients, under autocast where asked; yield its device, put the mode back.

    Without a dtype the caller's autocast, if any, stays in force.
    """
    device = next(model.parameters()).device
    precision = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), precision:
            yield device
    finally:
        for module, mode in modes:
            module.training = mode


def choose_device(name: str, dtype: str) -> torch.device:
    """Return the device called ``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: no such device, or float16 on a CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "cpu" and dtype == "float16":
        raise ValueError("float16 is unusably slow on a CPU: choose dtype=float32 or bfloat16")
    return device
