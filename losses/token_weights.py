"""Weights of targets from two losses of each: one with the full context, one with a short context.

Legend: B sequences, T targets of a sequence, n_i valid targets of row i, L loss with the full context (``long_nll``),
S loss with the short context (``base_nll``), r score, w weight.

Notable: rows are independent, and a target that is not valid takes part in nothing, whatever it holds. Token weighting
is from Findings of NAACL 2025 (arXiv 2503.09202), LongCE from ICLR 2025 (arXiv 2410.23771).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from losses.token_weight_masks import Generators, keep_largest
from losses.token_weight_rules import canonical_transforms, find_problems, shift_of

# Keeps a quotient of losses finite.
QUOTIENT_EPSILON = 1e-5
PRESETS: dict[str, dict[str, Any]] = {
    "dense": {"transforms": ("absolute",), "normalization": "L1", "interpolation": 0.75},
    "sparse": {"transforms": ("absolute",), "normalization": "L1", "sparsity": 0.2},
    "longce": {"transforms": ("minus", "exp"), "truncation": 5.0},
    "ppmi": {"transforms": ("minus", "shift 1", "max"), "normalization": "L1"},
    "npmi": {"transforms": ("shift 1", "max"), "normalization": "L1"},
    "ce": {"transforms": ("absolute",), "normalization": "L1", "interpolation": 1.0},
}


@dataclass(frozen=True)
class TokenWeighting:
    """How two losses of a target become its weight; the steps run in the order of the fields.

    Attributes:
        compare: ``"difference"`` r = L - S, or ``"quotient"`` r = (L + 1e-5) / (S + 1e-5).
        transforms: left to right, ``"absolute"`` abs(r), ``"minus"`` -r, ``"exp"`` e^r, ``"max"`` max(r, 0),
            ``"shift x"`` r - log x.
        truncation: r = min(r, truncation).
        sparsity: r = 1 for this share of the largest scores of a row, 0 for the others.
        normalization: ``"L1"`` w = n_i r / sum(r), ``"softmax"`` w = n_i softmax(r), None w = r. A row without any
            nonzero score has weights of 1.
        interpolation: w = interpolation + (1 - interpolation) w.
        zero_fill: what becomes of the budget of ``sparsity`` that exceeds the nonzero scores: ``"none"`` nothing,
            ``"random"`` it goes to zero scores drawn from the generator.
        parity: draw them as the published code does (the zeros of all rows as soon as any row has too many).

    Raises:
        ValueError: a field out of range, or a combination of which a part would have no effect or no meaning.
    """

    compare: Literal["difference", "quotient"] = "difference"
    transforms: tuple[str, ...] = ()
    truncation: float | None = None
    sparsity: float | None = None
    normalization: Literal["L1", "softmax"] | None = None
    interpolation: float | None = None
    zero_fill: Literal["none", "random"] = "none"
    parity: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", canonical_transforms(self.transforms))
        if problems := find_problems(self):
            raise ValueError("; ".join(problems))
        for name in ("truncation", "sparsity", "interpolation"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def preset(cls, name: str, **options: Any) -> Self:
        """Return a named weighting: dense, sparse, longce, ppmi, npmi, ce.

        Args:
            name: which.
            **options: fields that differ from the preset's; ``shift`` (default 1) for ppmi and npmi.

        Raises:
            ValueError: an unknown preset or option, or a shift where there is none.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        chosen = dict(PRESETS[name])
        if "shift" in options:
            if name not in ("ppmi", "npmi") or "transforms" in options:
                raise ValueError(f"shift belongs to the transforms of ppmi and npmi, got shift for preset {name!r}")
            text = f"shift {options.pop('shift')}"
            chosen["transforms"] = tuple(text if part == "shift 1" else part for part in chosen["transforms"])
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"preset {name!r} has no option {', '.join(unknown)}: choose among {', '.join(known)}")
        return cls(**(chosen | options))

    @property
    def needs_base_nll(self) -> bool:
        """False if the weights are 1 whatever the scores are."""
        all_kept = self.sparsity == 1 and self.normalization == "L1" and self.zero_fill == "random"
        return not (self.interpolation == 1 or all_kept)

    @torch.no_grad()
    def weights(
        self,
        long_nll: Tensor,
        base_nll: Tensor | None,
        valid: Tensor | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Return the weights of a batch, detached; computed in the wider of the two dtypes, rounded once.

        Args:
            long_nll: L, ``[B, T]`` float32 or float64.
            base_nll: S, the same; NaN where there is no score, which counts as S = L. None only if it is not needed.
            valid: ``[B, T]`` bool, targets that count; None = all. The others get weight 0 and have no influence.
            generator: source of the random filling, one or a sequence of one for each row.

        Returns:
            w, ``[B, T]`` float32.

        Raises:
            ValueError: shapes or dtypes that do not fit, or a missing ``base_nll`` or generator.
        """
        self._check(long_nll, base_nll, valid, generator)
        counts = torch.ones_like(long_nll, dtype=torch.bool) if valid is None else valid
        if base_nll is None or not self.needs_base_nll:
            return counts.float()
        dtype = torch.promote_types(long_nll.dtype, base_nll.dtype)
        scores = self._scores(long_nll.to(dtype), base_nll.to(dtype), counts)
        if self.sparsity is not None:
            source = generator if self.zero_fill == "random" else None
            scores = keep_largest(scores, counts, sparsity=self.sparsity, generator=source, joint_fill=self.parity)
        weights = self._normalise(scores.masked_fill(~counts, 0.0), counts)
        if self.interpolation is not None:
            weights = self.interpolation + (1 - self.interpolation) * weights
        return weights.masked_fill(~counts, 0.0).float()

    def _scores(self, long_nll: Tensor, base_nll: Tensor, valid: Tensor) -> Tensor:
        """Compare, transform and truncate ``[B, T]``; targets that are not valid take part as L = S = 0."""
        base_nll = torch.where(base_nll.isnan(), long_nll, base_nll).masked_fill(~valid, 0.0)
        long_nll = long_nll.masked_fill(~valid, 0.0)
        if self.compare == "difference":
            scores = long_nll - base_nll
        else:
            scores = (long_nll + QUOTIENT_EPSILON) / (base_nll + QUOTIENT_EPSILON)
        for transform in self.transforms:
            scores = _transformed(scores, transform)
        return scores if self.truncation is None else scores.clamp_max(self.truncation)

    def _normalise(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Turn scores ``[B, T]``, 0 where not valid, into weights."""
        empty = (scores == 0).all(dim=1, keepdim=True)
        scores = torch.where(empty & valid, 1.0, scores)
        size = valid.sum(dim=1, keepdim=True).clamp_min(1)
        if self.normalization == "L1":
            # Divided first: n r may exceed what sum(r) does not.
            return scores / scores.sum(dim=1, keepdim=True).masked_fill(~valid.any(dim=1, keepdim=True), 1.0) * size
        if self.normalization == "softmax":
            return scores.masked_fill(~valid, -math.inf).softmax(dim=1) * size
        return scores

    def _check(self, long_nll: Tensor, base_nll: Tensor | None, valid: Tensor | None, generator: Any) -> None:
        if base_nll is None and self.needs_base_nll:
            raise ValueError("base_nll is missing: the weights depend on it, pass the short-context losses [B, T]")
        for name, tensor in (("long_nll", long_nll), ("base_nll", base_nll)):
            if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} must be float32 or float64 (16 bit lose the scores), got {tensor.dtype}")
        if valid is not None and valid.dtype != torch.bool:
            raise ValueError(f"valid must be a bool tensor, got {valid.dtype}")
        for name, tensor in (("base_nll", base_nll), ("valid", valid)):
            if long_nll.dim() != 2 or (tensor is not None and tensor.shape != long_nll.shape):
                shape = "None" if tensor is None else list(tensor.shape)
                raise ValueError(f"long_nll and {name} must both be [B, T], got {list(long_nll.shape)} and {shape}")
        if self.zero_fill == "random" and self.needs_base_nll:
            _check_generator(generator, len(long_nll), one=self.parity)


def _transformed(scores: Tensor, transform: str) -> Tensor:
    if transform == "absolute":
        return scores.abs()
    if transform == "minus":
        return -scores
    if transform == "exp":
        return scores.exp()
    if transform == "max":
        return scores.clamp_min(0.0)
    return scores - math.log(shift_of(transform) or 1.0)


def _check_generator(generator: Any, num_rows: int, *, one: bool) -> None:
    if generator is None:
        raise ValueError("generator is missing: zero_fill='random' draws from a torch.Generator, pass one")
    if isinstance(generator, torch.Generator):
        return
    if one:
        raise ValueError("generator must be a single torch.Generator with parity, as in the published code")
    if not isinstance(generator, Sequence) or len(generator) != num_rows:
        raise ValueError(f"generator must be one torch.Generator or a list of {num_rows}, one for each row")


def weighted_nll_sum(nll: Tensor, weights: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return sum w L over the valid targets as a float32 scalar, and their number as an int64 scalar.

    The gradient with respect to L is exactly w; targets that are not valid contribute nothing, not even NaN.

    Args:
        nll: L, ``[B, T]``.
        weights: w, ``[B, T]``; no gradient flows into them.
        valid: ``[B, T]`` bool, None = all.
    """
    counts = torch.ones_like(nll, dtype=torch.bool) if valid is None else valid
    if nll.shape != weights.shape or nll.shape != counts.shape:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (nll, weights, counts))
        raise ValueError(f"nll, weights and valid must have one shape, got {shapes}")
    kept = weights.detach().float().masked_fill(~counts, 0.0)
    return (nll.float().masked_fill(~counts, 0.0) * kept).sum(), counts.sum()


@torch.no_grad()
def weight_statistics(weights: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Return mean, population std, max, share of zeros, effective share (sum w)^2 / (n sum w^2) of valid targets.

    Args:
        weights: w, ``[B, T]`` float32.
        valid: ``[B, T]`` bool, None = all.

    Returns:
        Float32 scalars on the device of ``weights``; all 0 without a valid target.
    """
    counts = torch.ones_like(weights, dtype=torch.bool) if valid is None else valid
    kept = weights.float().masked_fill(~counts, 0.0)
    number = counts.sum().clamp_min(1)
    mean = kept.sum() / number
    squares = kept.square().sum()
    return {
        "mean": mean,
        "std": ((kept - mean).square().masked_fill(~counts, 0.0).sum() / number).sqrt(),
        "max": weights.float().masked_fill(~counts, -math.inf).amax().clamp_min(0.0),
        "zero_share": ((kept == 0) & counts).sum() / number,
        "effective_share": kept.sum().square() / (number * squares).clamp_min(torch.finfo(torch.float32).tiny),
    }
