"""Losses of targets that see a short context only: overlapping windows, all of them in one pass of the decoder.

Legend: B sequences, C tokens of a sequence, T = C - 1 targets (index t is the token at t + 1).

Notable: only the targets that a window is there for reach the output head, and their logits are never stored. Scores
are float32 whatever the model computes in; 16 bit would turn small differences of two losses into ties.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.output_head import evaluation_mode, output_head
from losses.rotary_state import fresh_rotary, rotary_depends_on_length
from losses.window_layouts import Layout, RowWindow, is_packed, run_windows
from losses.windows import Tail, Window, plan_windows

__all__ = ["Window", "pack_scores", "plan_windows", "score_base_nll", "unpack_scores"]

IGNORE_INDEX = -100


def score_base_nll(
    model: nn.Module,
    input_ids: Tensor,
    *,
    base_length: int,
    base_stride: int,
    tail: Tail = "align",
    first_window: bool = False,
    bos_token_id: int | None = None,
    valid: Tensor | None = None,
    layout: Layout = "auto",
    windows_per_forward: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Score every target in the window that `plan_windows` gives it; the plan depends on C alone.

    The model is read in evaluation mode without gradients, and left as it was: modes of its modules, generators,
    rotary frequencies.

    Args:
        model: Hugging Face causal LM, PEFT-wrapped or not; `losses.output_head.verify_head` tells whether it will do.
        input_ids: ``[B, C]`` int64, right-padded.
        base_length: tokens of a window.
        base_stride: distance of two windows.
        tail: a last window that does not fit is moved (``"align"``), cut off (``"short"``) or refused (``"strict"``).
        first_window: score the first window, too, where short and full context are the same.
        bos_token_id: replaces the first token of every window in the rows that begin with it.
        valid: ``[B, T]`` bool, None = all. Other targets are not scored.
        layout: ``"batched"``: windows are rows of a batch; ``"packed"``: they follow each other in one row, for
            variable-length flash attention; ``"auto"``: packed with such an attention, else batched.
        windows_per_forward: bound of the windows of a pass, None = all. Windows of different length take passes of
            their own where the rotary embedding depends on the length.
        chunk_size: rows whose logits exist at once.

    Returns:
        ``[B, T]`` float32, NaN where nothing was scored.

    Raises:
        ValueError: sizes or shapes that do not fit, or a model that cannot do the layout.
    """
    packed = is_packed(model, layout)
    _check(input_ids, valid, windows_per_forward)
    windows = plan_windows(input_ids.shape[1], base_length, base_stride, tail)
    wanted = _row_windows(windows if first_window else windows[1:], len(input_ids), valid)
    targets = input_ids if valid is None else input_ids.masked_fill(~F.pad(valid, (1, 0)), IGNORE_INDEX)
    nll = torch.full_like(input_ids, torch.nan, dtype=torch.float32)
    with evaluation_mode(model), torch.no_grad(), _kept_generators(input_ids):
        for batch in _passes(wanted, windows_per_forward, alike=rotary_depends_on_length(model)):
            with fresh_rotary(model):
                hidden = run_windows(model, input_ids, batch, bos_token_id=bos_token_id, packed=packed)
            places = [torch.arange(window.first_target, window.end) + row * targets.shape[1] for row, window in batch]
            place = torch.cat(places).to(targets.device)
            losses = output_head(model).nll(
                hidden, targets.flatten()[place], ignore_index=IGNORE_INDEX, chunk_size=chunk_size
            )
            nll.view(-1)[place] = losses.float()
    return nll[:, 1:].masked_fill(targets[:, 1:] == IGNORE_INDEX, torch.nan)


def _row_windows(windows: Sequence[Window], num_rows: int, valid: Tensor | None) -> list[RowWindow]:
    """Return the windows of all rows; those without a valid target are left out."""
    every = [RowWindow(row, window) for row in range(num_rows) for window in windows]
    if valid is None or not every:
        return every
    wanted = torch.stack([valid[row, window.first_target - 1 : window.end - 1].any() for row, window in every])
    return [item for item, is_wanted in zip(every, wanted.tolist(), strict=True) if is_wanted]


def _passes(windows: list[RowWindow], bound: int | None, *, alike: bool) -> Iterator[list[RowWindow]]:
    """Cut windows into those of one pass each: at most ``bound``, and of one length if they must be alike."""
    lengths = sorted({item.length for item in windows}, reverse=True) if alike else [None]
    for length in lengths:
        group = [item for item in windows if length is None or item.length == length]
        step = bound or max(1, len(group))
        yield from (group[start : start + step] for start in range(0, len(group), step))


def _kept_generators(input_ids: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng([input_ids.device] if input_ids.is_cuda else [])


def _check(input_ids: Tensor, valid: Tensor | None, windows_per_forward: int | None) -> None:
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be [B, C] int64, got {list(input_ids.shape)} {input_ids.dtype}")
    shape = (input_ids.shape[0], input_ids.shape[1] - 1)
    if valid is not None and (valid.shape != shape or valid.dtype != torch.bool):
        raise ValueError(f"valid must be [B, C - 1] = {list(shape)} bool, got {list(valid.shape)} {valid.dtype}")
    if windows_per_forward is not None and windows_per_forward < 1:
        raise ValueError(f"windows_per_forward must be at least 1 or None, got {windows_per_forward}")


def pack_scores(scores: Tensor) -> Tensor:
    """View float32 scores ``[...]`` as int32 bits: precision plugins leave integers alone.

    Raises:
        ValueError: another dtype.
    """
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 to be packed, got {scores.dtype}")
    return scores.view(torch.int32)


def unpack_scores(bits: Tensor) -> Tensor:
    """View int32 bits ``[...]`` as the float32 scores that `pack_scores` was given.

    Raises:
        ValueError: another dtype.
    """
    if bits.dtype != torch.int32:
        raise ValueError(f"packed scores must be int32, got {bits.dtype}")
    return bits.view(torch.float32)
