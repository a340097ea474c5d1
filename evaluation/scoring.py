"""Reading, scoring and summing windows of a token stream: the parts under `evaluation.perplexity`.

B batch, T tokens of a window (the BOS included), V vocabulary, R scored positions of a window (its last ones).
"""

import contextlib
import hashlib
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from evaluation.positions import position_report
from losses.cross_entropy import IGNORE_INDEX, next_token_nll

Window = tuple[int, int, int]


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


@dataclass
class WindowTally:
    """Running float64 sums; they stay on the model's device until they are reported, so nothing waits for the host."""

    window: int
    published: bool = False
    windows: list[Window] = field(default_factory=list)
    window_sums: list[Tensor] = field(default_factory=list)
    published_means: list[Tensor] = field(default_factory=list)
    position_sums: list[tuple[slice, Tensor]] = field(default_factory=list)
    position_counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.position_counts = np.zeros(self.window, dtype=np.int64)

    def add(self, batch: list[Window], nll: Tensor, length: int) -> None:
        """Add losses ``[B, R]`` of windows of ``length`` inputs, of which the last R positions were scored."""
        nll = nll.double()
        scored = slice(length - nll.shape[1], length)
        if self.position_sums and self.position_sums[-1][0] == scored:
            self.position_sums[-1][1].add_(nll.sum(0))
        else:
            self.position_sums.append((scored, nll.sum(0)))
        self.position_counts[scored] += len(batch)
        self.windows += batch
        self.window_sums.append(nll.sum(1))
        if self.published and self.window > 1:
            # A published window is x[start:start + window]: the successor of its last token lies outside.
            self.published_means.append(nll[:, : self.window - 1].mean(1))

    def report(self, bytes_per_token: float | None) -> dict[str, Any]:
        """Return sums, means and the exponential as plain numbers."""
        sums = torch.cat(self.window_sums).tolist()
        positions = np.zeros(self.window)
        for scored, values in self.position_sums:
            positions[scored] += values.cpu().numpy()
        nll_sum, num_targets = math.fsum(sums), int(self.position_counts.sum())
        report = {
            "nll_sum": nll_sum,
            "num_targets": num_targets,
            **mean_report(nll_sum, num_targets, bytes_per_token),
            **position_report(positions, self.position_counts),
            "windows": [[*window, value] for window, value in zip(self.windows, sums, strict=True)],
        }
        if self.published:
            report["published_mean_loss"] = float(torch.cat(self.published_means).mean())
        return report


def mean_report(nll_sum: float, num_targets: int, bytes_per_token: float | None) -> dict[str, float | None]:
    """Return ``loss`` (nats per target), ``perplexity`` and ``bits_per_byte``.

    ``bits_per_byte = nll_sum / ln 2 / (num_targets * bytes_per_token)`` with the bytes per token of the whole split;
    None where the bytes are not known.
    """
    loss = nll_sum / num_targets if num_targets else math.nan
    # exp(710) exceeds a float64: an untrained or broken model reports infinity, not an error.
    perplexity = math.exp(loss) if not loss > 700 else math.inf
    bits = loss / math.log(2) / bytes_per_token if bytes_per_token else None
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits}


def window_batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Group neighbouring windows of one shape (inputs and scored targets) into batches."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == batch_size or _shape(window) != _shape(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def score_windows(
    model: Any, stream: TokenStream, batch: list[Window], bos_token_id: int | None, device: torch.device
) -> tuple[Tensor, int]:
    """Return losses ``[B, R]`` float32 of the targets of equal windows, and T, the inputs per window."""
    rows = torch.from_numpy(np.stack([stream.read(start, stop + 1) for start, stop, _ in batch]))
    if bos_token_id is not None:
        rows = torch.cat([rows.new_full((len(batch), 1), bos_token_id), rows], dim=1)
    _check_vocabulary(model, rows)
    rows = rows.to(device)
    inputs, length = rows[:, :-1], rows.shape[1] - 1
    num_scored = _shape(batch[0])[1]
    named = inspect.signature(model.forward).parameters
    options = {name: value for name, value in (("use_cache", False), ("logits_to_keep", num_scored)) if name in named}
    output = model(input_ids=inputs, **options)
    logits = (output if isinstance(output, Tensor) else output.logits)[:, -num_scored:]
    # labels[:, t + 1] is the target at t; the column before the first target is never one.
    labels = torch.nn.functional.pad(rows[:, length - num_scored + 1 : length], (1, 0), value=IGNORE_INDEX)
    nll, _ = next_token_nll(logits, labels, next_token=rows[:, -1])
    return nll, length


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


def _shape(window: Window) -> tuple[int, int]:
    start, stop, first_target = window
    return stop - start, stop - first_target + 1


def _check_vocabulary(model: Any, rows: Tensor) -> None:
    size, largest = getattr(getattr(model, "config", None), "vocab_size", None), int(rows.max())
    if size is not None and largest >= size:
        raise ValueError(
            f"the text holds token id {largest}, but the model's vocabulary ends at {size - 1}; "
            "score with the tokens of the model's own tokenizer"
        )


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
