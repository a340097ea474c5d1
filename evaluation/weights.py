"""The weights that are loaded: dtype, INT8 or INT4 by one of two packages, rotary positions that are scaled."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from evaluation.model_paths import HUB
from evaluation.model_sources import SweepModel
from models.rope_scaling import check_rope, scale_model_rope
from patches.parallel_context import ParallelContext

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
Backend = Literal["bitsandbytes", "torchao"]


@dataclass(frozen=True)
class Weights:
    """How a model is loaded.

    Attributes:
        dtype: of weights and arithmetic.
        device: where it stands.
        quantization: int8 or int4 weights; None: as they are.
        backend: the package that quantises.
        rope: rotary positions beyond the trained length (`models.rope_scaling.scale_rope`); None: the model's own.

    Raises:
        ValueError: an option out of range, or weights that this machine cannot load.
    """

    dtype: Dtype
    device: torch.device
    quantization: Quantization | None = None
    backend: Backend = "bitsandbytes"
    rope: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.rope is not None:
            check_rope(self.rope)
        if self.quantization is not None:
            check_quantization(self.quantization, self.backend, self.device)

    def check(self, patch: ParallelContext | None, batch_size: int) -> None:
        """Refuse batches whose rows would change each other.

        Raises:
            ValueError: rotary angles that follow the longest row.
        """
        if self.rope is not None and self.rope["rope_type"] == "dynamic" and patch is None and batch_size > 1:
            raise ValueError(
                f"dynamic rotary angles follow the longest row of a batch: pass batch_size=1, got {batch_size}"
            )

    def load(self, model: SweepModel) -> Any:
        """Return a model in evaluation mode."""
        dtype = getattr(torch, self.dtype)
        if self.quantization is None:
            loaded = model.load(dtype=dtype, device=self.device)
        else:
            name = str(model.source)
            loaded = load_quantized(name, self.quantization, self.backend, dtype=dtype, device=self.device)
        if self.rope is not None:
            # A model that was built here stays as it is for the next run.
            loaded = loaded if isinstance(model.source, str) else deepcopy(loaded)
            scale_model_rope(loaded, self.rope)
        return loaded


def check_quantization(quantization: str, backend: str, device: torch.device) -> None:
    """Refuse what this machine cannot load, before anything is read.

    Raises:
        ValueError: an unknown name, a package that is not installed, or no device for it.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"model.quantization is null, int8 or int4, got {quantization!r}")
    if backend not in get_args(Backend):
        raise ValueError(f"model.quantization_backend is one of {', '.join(get_args(Backend))}, got {backend!r}")
    needed = [name for name in (backend, "accelerate") if importlib.util.find_spec(name) is None]
    if needed:
        raise ValueError(
            f"model.quantization={quantization} needs {' and '.join(needed)}: pip install {' '.join(needed)}, "
            "or leave model.quantization out"
        )
    if backend == "bitsandbytes" and device.type != "cuda":
        raise ValueError("bitsandbytes computes on CUDA devices: pass model.quantization_backend=torchao on a CPU")


def load_quantized(
    name: str, quantization: Quantization, backend: Backend, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """Load a causal language model with quantised weights, in evaluation mode.

    Args:
        name: model folder or ``hub:NAME``.
        quantization: int8, or int4 (nf4 with double quantisation under bitsandbytes).
        backend: the package.
        dtype: of the arithmetic and of the cache.
        device: where to.
    """
    model = AutoModelForCausalLM.from_pretrained(
        name.removeprefix(HUB),
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization_config(quantization, backend, dtype),
    )
    return model.eval()


def quantization_config(quantization: Quantization, backend: Backend, dtype: torch.dtype) -> Any:
    """Return the configuration that transformers loads with."""
    if backend == "torchao":
        from torchao import quantization as torchao

        kind = "Int8WeightOnlyConfig" if quantization == "int8" else "Int4WeightOnlyConfig"
        return TorchAoConfig(getattr(torchao, kind)())
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
