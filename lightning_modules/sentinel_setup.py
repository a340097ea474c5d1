"""The model of KV compression: rows for the sentinels, LoRA on the attention projections, and what is saved of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from lightning_modules import lora as adapters
from lightning_modules.fine_tuning import build_model
from lightning_modules.lora import MergedModel, add_lora
from patches.sentinel.sentinels import FILE_NAME, Sentinels, add_sentinels

__all__ = ["ATTENTION_PROJECTIONS", "MergedModel", "attention_projections", "build_compressed_model", "save_adapter"]

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
_OUT_PROJ = ("q_proj", "k_proj", "v_proj", "out_proj")
# Attention projections by config.model_type. A string is a pattern of whole names, where a bare name would match more.
ATTENTION_PROJECTIONS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _LLAMA),
    "phi3": ("qkv_proj", "o_proj"),
    "gpt_neox": r".*\.attention\.(query_key_value|dense)",
    "bloom": r".*\.self_attention\.(query_key_value|dense)",
    "opt": _OUT_PROJ,
    "gptj": _OUT_PROJ,
    "codegen": ("qkv_proj", "out_proj"),
    "gpt2": r".*\.attn\.(c_attn|c_proj)",
}


def build_compressed_model(
    model: str | PreTrainedModel | Callable[[], PreTrainedModel],
    *,
    sentinels: Sentinels | None,
    lora: Mapping[str, Any] | None,
    train_rows: bool,
    seed: int,
    row_init: Literal["mean", "zero"] = "mean",
) -> Any:
    """Return the model to train.

    A model that is loaded or built gets rows for the sentinels, unless its folder says that it has them; a model that
    is given must have them.

    Args:
        model: folder or hub name, a function that builds the model, or the model itself.
        sentinels: their ids, None for none.
        lora: options of ``peft.LoraConfig``; None trains the whole model.
        train_rows: train the input rows of the sentinels besides the adapters.
        seed: of the new rows.
        row_init: what they start as, see `add_sentinels`.

    Raises:
        ValueError: the ids do not follow those of the model, a row is missing, or PEFT refuses the options.
    """
    rope = {"rope_theta": None, "context_length": None, "keep_rope_scaling": False}
    built = build_model(model, lora=None, **rope)
    if sentinels is not None:
        has_rows = isinstance(model, PreTrainedModel) or (isinstance(model, str) and _saved(model) == sentinels)
        if not has_rows:
            add_sentinels(built, sentinels.open_id, slots=sentinels.slots, init=row_init, seed=seed)
        num_rows = built.get_input_embeddings().weight.shape[0]
        if max(sentinels.ids) >= num_rows:
            raise ValueError(f"{sentinels} lie beyond the {num_rows} rows of the embedding: call add_sentinels first")
    if lora is None:
        return built
    options: dict[str, Any] = {"bias": "none", "target_modules": None} | dict(lora)
    if options["target_modules"] is None:
        options["target_modules"] = attention_projections(built.config.model_type)
    if train_rows and sentinels is not None:
        options["trainable_token_indices"] = list(sentinels.ids)
    return add_lora(built, options)


def attention_projections(model_type: str) -> list[str] | str:
    """Return the attention projections of a family, as ``target_modules`` of ``peft.LoraConfig``.

    Raises:
        ValueError: an unknown family.
    """
    if model_type not in ATTENTION_PROJECTIONS:
        raise ValueError(
            f"the attention projections of {model_type!r} are not known: pass lora.target_modules=[...]; "
            f"known families: {', '.join(ATTENTION_PROJECTIONS)}"
        )
    found = ATTENTION_PROJECTIONS[model_type]
    return found if isinstance(found, str) else list(found)


def save_adapter(model: Any, sentinels: Sentinels | None, folder: str | Path) -> None:
    """Write a PEFT adapter folder and ``sentinels.json``; errors as `lightning_modules.lora.save_adapter`."""
    adapters.save_adapter(model, folder)
    if sentinels is not None:
        sentinels.save(folder)


def _saved(folder: str) -> Sentinels | None:
    return Sentinels.load(folder) if (Path(folder) / FILE_NAME).is_file() else None
