"""Models of this suite, patched or as they are, in lm-evaluation-harness: ``lm_eval.simple_evaluate(model=...)``.

Notable: under a patch all but the last tokens of a context are its pieces; plainly the context is one prompt, cut on
the left where it is longer than the model takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from evaluation.loading import max_positions
from evaluation.runner.answering import Answer, answerer
from evaluation.runner.prompts import Prompt
from patches.parallel_context import ParallelContext

DEFAULT_LENGTH, DEFAULT_NEW_TOKENS = 2048, 256


def import_lm_eval() -> Any:
    """Return the package ``lm_eval``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.api.model
    except ImportError:
        raise ValueError(
            "lm-eval is not installed: pip install lm-eval, or use the tasks of this suite (recipe=longbench, say)"
        ) from None
    return lm_eval


class Harness:
    """What lm-eval asks of a model: log-likelihoods of continuations and of texts, and generated text.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        patch: how contexts are read; None: as the model is.
        batch_size: requests answered together.
        query_tokens: under a patch, last tokens of a context that are the query.
        max_length: tokens of context and continuation; None: what the model was made for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        patch: ParallelContext | None = None,
        *,
        batch_size: int = 1,
        query_tokens: int = 64,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1 or query_tokens < 1:
            raise ValueError(f"batch_size and query_tokens must be at least 1, got {batch_size} and {query_tokens}")
        self.model, self.tokenizer, self.patch = model, tokenizer, patch
        self.batch_size, self.query_tokens = batch_size, query_tokens
        self.max_length = max_length or max_positions(model.config) or DEFAULT_LENGTH
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.first_token: int | None = next((token for token in found if token is not None), None)

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """Return for (context, continuation) the log-likelihood of the continuation and whether it is the likeliest."""
        pairs = [self._pair(*request.args) for request in requests]
        answers = self._force(pairs)
        return [(-float(answer.nll_sum or 0.0), bool(answer.all_argmax)) for answer in answers]

    def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
        """Return the log-likelihood of whole texts, each token scored once, windows of ``max_length`` one by one."""
        sums = []
        for request in requests:
            tokens = self._ids(request.args[0])
            pairs = [pair for start in range(0, len(tokens), self._window) for pair in self._blocks(tokens, start)]
            sums.append(-sum(answer.nll_sum or 0.0 for answer in self._force(pairs)))
        return sums

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """Return greedy continuations of contexts, cut at the first of the texts in ``until``.

        Raises:
            ValueError: a task wants samples.
        """
        wanted = [(request.args[0], dict(request.args[1])) for request in requests]
        if any(options.get("do_sample") for _, options in wanted):
            raise ValueError("these models answer greedily here: set do_sample=false in the task's generation_kwargs")
        texts: list[str] = []
        with answerer(self.model, self.tokenizer, self.patch) as engine:
            for context, options in wanted:
                count = int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS))
                prompt = self._prompt(self._ids(context) or self._start(), count)
                (answer,) = engine.generate([prompt], count).answers
                until = options.get("until") or []
                texts.append(_cut(answer.text, [until] if isinstance(until, str) else until))
        return texts

    @property
    def _window(self) -> int:
        return max(1, self.max_length - 1)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start(self) -> list[int]:
        if self.first_token is None:
            raise ValueError("the tokenizer has neither BOS nor EOS to stand in front of a text without context")
        return [self.first_token]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return context and continuation as tokens; spaces between them belong to the continuation."""
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        whole, front = self._ids(context + continuation), self._ids(context)
        # A token over the seam counts to the continuation.
        if whole[: len(front)] != front:
            return front or self._start(), self._ids(continuation)
        return front or self._start(), whole[len(front) :]

    def _blocks(self, tokens: list[int], start: int) -> Iterator[tuple[list[int], list[int]]]:
        """Yield what is scored behind what, of the window that begins at ``start``."""
        window = tokens[start : start + self._window]
        size = len(window) if self.patch is None else self.query_tokens
        for first in range(0, len(window), size):
            yield self._start() + window[:first], window[first : first + size]

    def _prompt(self, context: list[int], num_new: int) -> Prompt:
        if self.patch is None:
            kept = context[-max(1, self.max_length - num_new) :]
            return Prompt([], [], kept, len(kept))
        split = max(0, len(context) - self.query_tokens)
        front, query = context[:split], context[split:]
        splits = self.patch.degree is not None or self.patch.max_piece_tokens is not None
        pieces = self.patch.split(front) if front and splits else [front] if front else []
        return Prompt([], pieces, query, len(front))

    def _force(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Answer]:
        answers: list[Answer] = []
        with answerer(self.model, self.tokenizer, self.patch) as engine:
            for batch in self._batches(pairs):
                prompts = [self._prompt(context, len(target)) for context, target in batch]
                answers += engine.force(prompts, [target for _, target in batch]).answers
        return answers

    def _batches(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
        """Yield batches; contexts of one token stand alone."""
        batch: list[tuple[list[int], list[int]]] = []
        for pair in pairs:
            if batch and (len(batch) == self.batch_size or len(pair[0]) == 1 or len(batch[0][0]) == 1):
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch


def lm_eval_model(harness: Harness) -> Any:
    """Return a harness as the class that lm-eval takes.

    Raises:
        ValueError: lm-eval is not installed.
    """
    base = import_lm_eval().api.model.LM

    class SuiteModel(base):  # type: ignore[misc, valid-type]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return harness.loglikelihood(requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return harness.loglikelihood_rolling(requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return harness.generate_until(requests)

    return SuiteModel()


def _cut(text: str, ends: Iterable[str]) -> str:
    for end in ends:
        text = text.split(end, 1)[0] if end else text
    return text
