"""Models with INT8 or INT4 weights, by transformers and one of two packages."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from evaluation.model_paths import HUB

Quantization = Literal["int8", "int4"]
Backend = Literal["bitsandbytes", "torchao"]


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
