"""Options of selective attention, of keeping pieces and of adaptive temperature; wrong values raise at construction."""

import warnings
from dataclasses import dataclass
from typing import Literal

from patches.parallel_context.checks import check_choice, check_count, check_flag, check_positive, check_share

AGGREGATES = ("layer", "head", "query")


@dataclass(frozen=True)
class SelectiveAttention:
    """Let query tokens attend to the pieces that matter (arXiv 2412.16545).

    The score of a piece is the sum of the `score_top_k` largest attention weights on it.
    """

    top_k: int = 2
    """Pieces kept (hard selection); 0, or the number of pieces and more: no selection."""
    score_top_k: int = 5
    """Weights summed to the score of a piece; 0: the mean over the piece."""
    aggregate: tuple[str, ...] = ()
    """Dimensions of "layer", "head", "query" that share one choice."""
    aggregate_top_k: int = 5
    """Scores summed over the aggregated dimensions; 0: their mean."""
    two_pass: bool = False
    """Collect the scores of all layers in a first pass without selection."""
    momentum: float = 0.0
    """Weight of the scores of the previous call of a generation."""
    soft_temperature: float | None = None
    """Give every piece a share softmax(log(score) / temperature) instead of a hard choice; `top_k` is then ignored."""
    soft_mass: Literal["context", "published"] = "context"
    """What is shared out: the attention mass on the pieces, or 1 (rows then sum to more than 1; parity only)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregate", tuple(self.aggregate))
        check_count("top_k", self.top_k, 0)
        check_count("score_top_k", self.score_top_k, 0)
        check_count("aggregate_top_k", self.aggregate_top_k, 0)
        for name in self.aggregate:
            check_choice("aggregate", name, AGGREGATES)
        if len(set(self.aggregate)) < len(self.aggregate):
            raise ValueError(f"aggregate names each dimension once, got {self.aggregate}")
        check_flag("two_pass", self.two_pass)
        if "layer" in self.aggregate and not self.two_pass:
            raise ValueError("aggregate over 'layer' needs the scores of all layers first: set two_pass=True")
        check_share("momentum", self.momentum)
        if self.soft_temperature is not None:
            check_positive("soft_temperature", self.soft_temperature)
        check_choice("soft_mass", self.soft_mass, ("context", "published"))
        if self.soft_mass != "context" and self.soft_temperature is None:
            warnings.warn("soft_mass has no effect without soft_temperature", stacklevel=3)
        if not self.top_k and self.soft_temperature is None:
            warnings.warn("SelectiveAttention(top_k=0) without soft_temperature selects nothing", stacklevel=3)

    def keeps_all(self, num_pieces: int) -> bool:
        """Say whether so many pieces, or fewer, are all kept as they are."""
        return num_pieces <= 1 or (self.soft_temperature is None and not 0 < self.top_k < num_pieces)


@dataclass(frozen=True)
class KeepPieces:
    """Keep the best whole pieces, each judged by the query read behind prefix and that piece alone.

    "nll": the lowest mean negative log-likelihood of the query per token (arXiv 2502.14317). "attention": the greatest
    mean attention of the query on the piece, over layers, heads and query tokens; longer pieces get more of it.
    """

    keep: int = 3
    score: Literal["nll", "attention", "random"] = "nll"
    query_tokens: int | None = None
    """Look only at the last tokens of the query; None: at all."""
    order: Literal["best", "worst"] = "best"
    """"worst" keeps the worst pieces: a control."""
    seed: int = 0
    """Seed of "random"."""

    def __post_init__(self) -> None:
        check_count("keep", self.keep)
        check_choice("score", self.score, ("nll", "attention", "random"))
        if self.query_tokens is not None:
            check_count("query_tokens", self.query_tokens)
        check_choice("order", self.order, ("best", "worst"))
        check_count("seed", self.seed, 0)
        if self.score == "random" and (self.query_tokens is not None or self.order != "best"):
            warnings.warn("query_tokens and order have no effect on random scores", stacklevel=3)

    @property
    def needs_query(self) -> bool:
        """Whether encoding needs the query."""
        return self.score != "random"

    def rank(self, score: float) -> float:
        """Return a number that is lower for pieces that are kept first."""
        return score if (self.score == "nll") == (self.order == "best") else -score


@dataclass(frozen=True)
class APE:
    """Sharpen and rescale the attention on the pieces (adaptive parallel encoding, arXiv 2502.05431).

    With logits x of the pieces ``lse = scale temperature logsumexp(x / temperature)``, inside softmax(x / temperature).
    """

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_positive("scale", self.scale)
