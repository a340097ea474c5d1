"""How windows of short context are laid out for one pass of a decoder, and how their states are found again.

Legend: B sequences, C tokens of a sequence, n windows of a pass, L tokens of its longest window, S tokens of all its
windows together, N scored targets, M model width.

Notable: a packed row ends with the first tokens of its first window once more. Had the windows of the row seen each
other, the two could not come out alike; so a model that ignores the layout is found out in the pass itself.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.output_head import causal_lm_of, hidden_states
from losses.windows import Window

Layout = Literal["auto", "batched", "packed"]
_CANARY_TOKENS = 8
_CANARY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_CANARY_TOLERANCE_16_BIT = 0.1


class RowWindow(NamedTuple):
    """A window of a row of the batch."""

    row: int
    window: Window

    @property
    def length(self) -> int:
        """Tokens that are fed."""
        return self.window.end - self.window.start


def is_packed(model: nn.Module, layout: Layout) -> bool:
    """Resolve a layout: ``"auto"`` is packed where attention takes windows of any length in one row.

    Raises:
        ValueError: an unknown layout, or packed for a model that cannot be told where windows begin.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if layout == "auto":
        return _uses_flash(model) and _positions_name(model) is not None
    if layout == "packed" and _positions_name(model) is None:
        raise ValueError(
            f"layout='packed' needs position_ids or document_ids, which {type(causal_lm_of(model)).__name__} "
            "does not take; use layout='batched'"
        )
    return layout == "packed"


def run_windows(
    model: nn.Module, input_ids: Tensor, windows: Sequence[RowWindow], *, bos_token_id: int | None, packed: bool
) -> Tensor:
    """Return the states ``[N, M]`` that predict the scored targets of the windows, in their order.

    Args:
        model: Hugging Face causal LM in evaluation mode.
        input_ids: ``[B, C]`` int64.
        windows: at least one.
        bos_token_id: replaces the first token of every window in the rows that begin with it.
        packed: one row ``[1, S]`` instead of a batch ``[n, L]`` with the shorter ones padded at their end.

    Raises:
        ValueError: packed windows see each other.
    """
    hidden = (_packed_states if packed else _batched_states)(model, input_ids, windows, bos_token_id)
    lengths = [item.length for item in windows]
    offsets = _offsets(lengths) if packed else [index * max(lengths) for index in range(len(windows))]
    scored = [
        torch.arange(offset + first - 1 - start, offset + end - 1 - start)
        for offset, (_, (start, first, end)) in zip(offsets, windows, strict=True)
    ]
    return hidden[torch.cat(scored).to(hidden.device)]


def _batched_states(
    model: nn.Module, input_ids: Tensor, windows: Sequence[RowWindow], bos_token_id: int | None
) -> Tensor:
    """Return ``[n L, M]``. What pads a shorter window comes after its last target and is never seen by it."""
    longest = max(item.length for item in windows)
    rows = [F.pad(tokens, (0, longest - len(tokens))) for tokens in _window_tokens(input_ids, windows, bos_token_id)]
    return hidden_states(model, torch.stack(rows)).flatten(0, 1)


def _packed_states(
    model: nn.Module, input_ids: Tensor, windows: Sequence[RowWindow], bos_token_id: int | None
) -> Tensor:
    """Return ``[S, M]``."""
    tokens = _window_tokens(input_ids, windows, bos_token_id)
    canary = tokens[0][:_CANARY_TOKENS]
    row = torch.cat([*tokens, canary])[None]
    hidden = hidden_states(model, row, **_packed_inputs(model, [*map(len, tokens), len(canary)], row.device))[0]
    first, again = hidden[: len(canary)].float(), hidden[-len(canary) :].float()
    error = (first - again).norm() / first.norm()
    if error > _CANARY_TOLERANCE.get(hidden.dtype, _CANARY_TOLERANCE_16_BIT):
        raise ValueError(
            f"packed windows see each other in {type(causal_lm_of(model)).__name__} (equal windows differ by "
            f"{error.item():.1e}); use layout='batched'"
        )
    return hidden[: -len(canary)]


def _window_tokens(input_ids: Tensor, windows: Sequence[RowWindow], bos_token_id: int | None) -> list[Tensor]:
    """Return the tokens of each window, its first one replaced by the BOS where its row begins with it."""
    pieces = [input_ids[row, window.start : window.end] for row, window in windows]
    if bos_token_id is None:
        return pieces
    begins = input_ids[:, :1] == bos_token_id
    firsts = [
        torch.where(begins[row], bos_token_id, piece[:1]) for (row, _), piece in zip(windows, pieces, strict=True)
    ]
    return [torch.cat([first, piece[1:]]) for first, piece in zip(firsts, pieces, strict=True)]


def _packed_inputs(model: nn.Module, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Return what tells a model where windows begin. No attention mask: with one, transformers looks for no windows."""
    if _positions_name(model) == "document_ids":
        numbers = [torch.full((length,), number) for number, length in enumerate(lengths)]
        return {"document_ids": torch.cat(numbers)[None].to(device)}
    inputs: dict[str, Any] = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device)}
    if _uses_flash(model):
        # Otherwise they are derived from the positions, and the host waits for the device.
        borders = torch.tensor([*_offsets(lengths), sum(lengths)], dtype=torch.int32).to(device)
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return inputs


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _positions_name(model: nn.Module) -> str | None:
    """Return the argument by which a model learns where windows begin."""
    names = inspect.signature(causal_lm_of(model).forward).parameters
    return next((name for name in ("document_ids", "position_ids") if name in names), None)


def _uses_flash(model: nn.Module) -> bool:
    return "flash" in str(getattr(causal_lm_of(model).config, "_attn_implementation", None))
