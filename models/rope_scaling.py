"""Rotary positions beyond the trained length, without training: NTK, dynamic NTK and YaRN, as transformers has them.

Notable: transformers' dynamic NTK remembers the longest prompt that it has seen, so that an answer would depend on the
prompts before it; here every prompt begins anew.

Legend: d rotary dimensions of a head, f factor, n trained length, t tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from models.pretrained import one_rope_setting, rebuild_rotary, unscaled_rope

_OPTIONS = {
    "ntk": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "truncate"}),
}


def check_rope(rope: Mapping[str, Any]) -> None:
    """Refuse rotary settings that are none of those of `scale_rope`.

    Raises:
        ValueError: an unknown type, a factor that does not extend, or an option that the type has not.
    """
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind not in _OPTIONS:
        raise ValueError(f"model.rope.rope_type is one of {', '.join(_OPTIONS)}, got {kind!r}")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 < factor < float("inf"):
        raise ValueError(f"model.rope.factor must be a number above 1, got {factor!r}")
    unknown = sorted(set(rope) - {"rope_type"} - _OPTIONS[kind])
    if unknown:
        allowed = ", ".join(sorted(_OPTIONS[kind]))
        raise ValueError(f"model.rope has no option {', '.join(unknown)} with rope_type={kind}: it takes {allowed}")


def scale_rope(config: PreTrainedConfig, rope: Mapping[str, Any]) -> None:
    """Edit the rotary positions of a configuration in place, for a model that was trained with plain ones.

    ``ntk``: base f^(d / (d - 2)) times the base. ``dynamic``: beyond n, base (f t / n - f + 1)^(d / (d - 2)) times the
    base. ``yarn`` (arXiv 2309.00071): frequencies divided by f where they turn seldom within n, with its
    ``attention_factor``, ``beta_fast`` and ``beta_slow``. ntk and yarn make the model's length n f.

    Args:
        config: of a model that is built afterwards; for a finished one see `scale_model_rope`.
        rope: ``rope_type`` and ``factor``, and further options of yarn.

    Raises:
        ValueError: as `check_rope`, or the model has no rotary positions, several settings, or scaled ones.
    """
    check_rope(rope)
    before = one_rope_setting(config, "model.rope")
    if before.get("rope_type", "default") != "default":
        raise ValueError(
            f"this model's rotary positions are scaled already ({before['rope_type']}): leave model.rope out, or take "
            "a model with plain ones"
        )
    kind, factor, trained = rope["rope_type"], float(rope["factor"]), config.max_position_embeddings
    after = unscaled_rope(before)
    if kind == "ntk":
        size = rotary_size(config, before)
        after |= {"rope_type": "default", "rope_theta": before["rope_theta"] * factor ** (size / (size - 2))}
    else:
        after |= dict(rope) | {"factor": factor}
    if kind == "yarn":
        after["original_max_position_embeddings"] = trained
    if kind != "dynamic":
        config.max_position_embeddings = int(trained * factor)
    config.rope_parameters = after


def rotary_size(config: PreTrainedConfig, rope: Mapping[str, Any]) -> int:
    """Return d, the rotary dimensions of a head."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def scale_model_rope(model: PreTrainedModel, rope: Mapping[str, Any]) -> None:
    """`scale_rope` for a finished model: its rotary modules are built again from the edited configuration.

    Raises:
        ValueError: as `scale_rope`, or the rotary modules of this class cannot be built from a configuration.
    """
    scale_rope(model.config, rope)
    for module in rebuild_rotary(model):
        if rope["rope_type"] == "dynamic":
            module.register_forward_pre_hook(_begin_anew, with_kwargs=True)


def _begin_anew(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forget the longest sequence so far where a prompt begins."""
    positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if int(positions.min()) == 0:
        module.max_seq_len_cached = module.original_max_seq_len
        module.register_buffer("inv_freq", module.original_inv_freq.to(positions.device), persistent=False)  # type: ignore[operator, union-attr]
