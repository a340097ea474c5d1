"""What scores generated texts beside their references: a judge model and BERTScore, loaded when first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evaluation.generation_quality.bert_score import BertScore
from evaluation.generation_quality.scores import Judge, judge_perplexity, score_generations
from evaluation.kv_compression.models import Model, built, identity, tokenizer_of
from evaluation.loading import load_model, tokenizer_identity
from evaluation.model_paths import HUB
from evaluation.results import digest, model_identity

ROBERTA = "roberta-large"


class Scorers:
    """Scores of texts.

    Args:
        judge: causal LM that scores texts: folder, ``hub:NAME`` or function; None: no judge.
        bertscore: options of `BertScore`; None: no BERTScore.
        tokenizer: of a judge that is built.
        seed: of its weights.
        dtype: of the judge's weights and arithmetic.
        device: where both run.

    Raises:
        ValueError: a judge that is built without a tokenizer.
    """

    def __init__(
        self,
        judge: Model | None,
        bertscore: Mapping[str, Any] | None,
        *,
        tokenizer: Model | None,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.judge, self.bertscore = judge, dict(bertscore) if bertscore else None
        self.tokenizer = judge if isinstance(judge, str) else tokenizer
        if judge is not None and self.tokenizer is None:
            raise ValueError("a judge that is built needs task.tokenizer")
        self.seed, self.dtype, self.device = seed, dtype, device

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on besides the texts."""
        found = {"judge": self.judge and identity(self.judge, self.seed), "bertscore": self.bertscore}
        if self.tokenizer is not None and self.judge is not None:
            found["judge_tokenizer"] = tokenizer_identity(tokenizer_of(self.tokenizer))
        if self.bertscore is not None:
            name = str(self.bertscore.get("encoder", ROBERTA))
            found["bertscore"] = self.bertscore | {"encoder": name, "identity": _content(Path(name))}
        return found

    def score(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Return the scores of texts, each with its reference."""
        return score_generations(texts, references, judge=self._judge, bertscore=self._likeness)

    @cached_property
    def _judge(self) -> Judge | None:
        if self.judge is None:
            return None
        if isinstance(self.judge, str):
            model = load_model(self.judge.removeprefix(HUB), dtype=self.dtype, device=self.device)
        else:
            model = built(self.judge, self.seed).to(self.device).eval()
        assert self.tokenizer is not None
        tokenizer = tokenizer_of(self.tokenizer)
        return lambda texts: judge_perplexity(
            model, [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        )

    @cached_property
    def _likeness(self) -> BertScore | None:
        return None if self.bertscore is None else BertScore(**{"device": str(self.device)} | self.bertscore)


def _content(encoder: Path) -> str:
    """Return what tells the content of an encoder's folder apart; the name of one of the hub."""
    if not encoder.is_dir():
        return str(encoder)
    file = encoder / "tokenizer.json"
    return digest([model_identity(encoder), file.read_text(encoding="utf-8") if file.is_file() else None])
