"""Needles in a haystack: templates, where they go, and the sample made of them.

Notable: everything random comes from ``numpy.random.default_rng([seed, index])``, so a sample depends on its haystack
and these two numbers alone, not on workers, ranks or the version of Python. The haystack is cut, never overwritten.

Letters: L tokens of a sample, S tokens of a chunk, n needles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from datamodules.batch import IGNORED

Int64Array = npt.NDArray[np.int64]
Kind = Literal["single", "multihop", "multi"]
DEFAULT_HOPS = {"single": 0, "multihop": 2, "multi": 1}
DEFAULT_DISTRACTORS = {"single": 0, "multihop": 1, "multi": 5}
NEEDLES = {
    "single": ("|", "The passkey is:", 0, "|"),
    "multihop": ("|DEF", 0, "->", 1, "|"),
    "multi": ("|One of the special magic numbers for ", 0, " is ", 1, "|"),
}
QUESTIONS = {
    "single": ("|What is the passkey? The passkey is",),
    "multihop": ("|The path from", 0, "is"),
    "multi": ("|The value of ", 0, "is"),
}


@dataclass(frozen=True)
class NeedleSample:
    """One window with its needles, question and answer; spans are [start, stop) in the window.

    Attributes:
        input_ids: int64 ``[L]``.
        labels: int64 ``[L]`` un-shifted, -100 behind the answer.
        attention_mask: int64 ``[L]``, 0 behind the answer.
        question_start: first question token.
        answer_start: first answer token.
        answer_length: answer tokens.
        scored_position: the one token that the published evaluation scores.
        needle_spans: ``[n, 2]`` in text order.
        values: ``[num_values, key_length]``, the random ids.
    """

    input_ids: Int64Array
    labels: Int64Array
    attention_mask: Int64Array
    question_start: int
    answer_start: int
    answer_length: int
    scored_position: int
    needle_spans: Int64Array
    values: Int64Array

    @property
    def answer(self) -> Int64Array:
        """The answer's tokens ``[answer_length]``."""
        return self.input_ids[self.answer_start : self.answer_start + self.answer_length]


class NeedleTask:
    """Plant needles of one kind into text and ask for one of them.

    ``single`` asks for the one passkey, ``multihop`` for the chain that begins at a value, ``multi`` for the value of
    one key among several. With an aligned question its last token is the first of the last chunk, so that the
    landmark before has seen the rest, and padding fills that chunk behind the answer.

    Args:
        kind: ``"single"``, ``"multihop"`` or ``"multi"``.
        encode: text to token ids without special tokens; called once for each string of the templates.
        chunk_size: S, text tokens of a chunk of the model.
        key_length: tokens of a value.
        num_hops: needles of a chain; None is 2 for ``multihop`` and 1 for ``multi``.
        num_distractors: chains that are not asked for; None is 1 for ``multihop`` and 5 for ``multi``.
        vocab_range: values are drawn from these ids, the upper end excluded.
        align_question: end the question on the first token of the last chunk; else the answer ends the sample.
        pad_token_id: what follows an aligned answer.

    Raises:
        ValueError: an option out of range, or an aligned answer that does not fit a chunk.
    """

    def __init__(
        self,
        kind: Kind,
        encode: Callable[[str], Sequence[int]],
        *,
        chunk_size: int,
        key_length: int = 5,
        num_hops: int | None = None,
        num_distractors: int | None = None,
        vocab_range: tuple[int, int] = (0, 50256),
        align_question: bool = True,
        pad_token_id: int = 50257,
    ):
        if kind not in get_args(Kind):
            raise ValueError(f"kind is one of {', '.join(get_args(Kind))}, got {kind!r}")
        self.kind, self.chunk_size, self.key_length = kind, chunk_size, key_length
        self.num_hops = DEFAULT_HOPS[kind] if num_hops is None else num_hops
        self.num_distractors = DEFAULT_DISTRACTORS[kind] if num_distractors is None else num_distractors
        self.vocab_range = (int(vocab_range[0]), int(vocab_range[1]))
        self.align_question, self.pad_token_id = align_question, pad_token_id
        self._check_options()
        texts = {part for part in (*NEEDLES[kind], *QUESTIONS[kind], ",") if isinstance(part, str)}
        self._tokens = {text: np.asarray(encode(text), np.int64).reshape(-1) for text in sorted(texts)}
        if align_question and self.answer_length > chunk_size - 1:
            raise ValueError(
                f"the answer has {self.answer_length} tokens, an aligned one has room for chunk_size - 1 = "
                f"{chunk_size - 1}: use a smaller key_length or align_question=False"
            )

    def _check_options(self) -> None:
        for name in ("chunk_size", "key_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind == "single" and (self.num_hops or self.num_distractors):
            raise ValueError("num_hops and num_distractors have no effect on kind=single, leave them out")
        if self.kind != "single" and (self.num_hops < 1 or self.num_distractors < 0):
            raise ValueError(
                f"num_hops must be at least 1 and num_distractors at least 0, got {self.num_hops} and "
                f"{self.num_distractors}"
            )
        low, high = self.vocab_range
        if not 0 <= low < high:
            raise ValueError(f"vocab_range must be ids [low, high), got {list(self.vocab_range)}")

    @property
    def num_values(self) -> int:
        """Random values of a sample, chain by chain."""
        return (self.num_hops + 1) * (self.num_distractors + 1)

    @property
    def num_needles(self) -> int:
        """Needles of a sample."""
        return max(1, self.num_hops * (self.num_distractors + 1))

    @property
    def answer_length(self) -> int:
        """Tokens of the answer."""
        hops = max(1, self.num_hops if self.kind == "multihop" else 1)
        return hops * self.key_length + (hops - 1) * len(self._tokens[","])

    @property
    def question_length(self) -> int:
        """Tokens of the question."""
        return self._length(QUESTIONS[self.kind])

    @property
    def needle_length(self) -> int:
        """Tokens of a needle."""
        return self._length(NEEDLES[self.kind])

    def identity(self) -> dict[str, object]:
        """Everything a sample depends on besides haystack, seed and index, as plain values."""
        names = ("kind", "chunk_size", "key_length", "num_hops", "num_distractors", "align_question", "pad_token_id")
        templates = {text: tokens.tolist() for text, tokens in self._tokens.items()}
        plain = {name: getattr(self, name) for name in names}
        return plain | {"vocab_range": list(self.vocab_range), "templates": templates}

    def room(self, length: int) -> int:
        """Return how many haystack places needles of a sample of ``length`` tokens may lie before.

        Raises:
            ValueError: the needles do not fit.
        """
        size, question, needles = self.chunk_size, self.question_length, self.num_needles * self.needle_length
        if self.kind == "single":
            # The published room leaves two chunks; a question longer than one needs more.
            room = length - needles - max(2 * size, length - self._question_start(length))
        elif self.align_question:
            room = length - needles - (size - 1 + question)
        else:
            room = length - needles - (question + self.answer_length)
        if room < self.num_needles:
            raise ValueError(
                f"needles do not fit: {self.num_needles} of {self.needle_length} tokens, a question of {question} and "
                f"chunks of {size} need a length of {length - room + self.num_needles}, got {length}"
            )
        return room

    def assemble(
        self,
        haystack: Int64Array,
        values: Int64Array,
        positions: Sequence[int],
        order: Sequence[int] | None = None,
    ) -> NeedleSample:
        """Build the sample of given values and places.

        Args:
            haystack: ``[L]`` tokens; what does not fit beside needles and question is cut off its end.
            values: ``[num_values, key_length]``.
            positions: ascending haystack indices; needle ``order[i]`` goes before ``positions[i]``.
            order: which needle comes where; None is 0, 1, ...
        """
        haystack, values = np.asarray(haystack, np.int64), np.asarray(values, np.int64)
        order = range(self.num_needles) if order is None else order
        length = len(haystack)
        question = self._fill(QUESTIONS[self.kind], values[0], values[0])
        answer = self._answer(values)
        question_start = self._question_start(length)
        parts: list[Int64Array] = []
        spans, done, taken = np.empty((len(positions), 2), np.int64), 0, 0
        for i, (position, number) in enumerate(zip(positions, order, strict=True)):
            needle = self._needle(int(number), values)
            parts += [haystack[taken:position], needle]
            spans[i] = done + position - taken, done + position - taken + len(needle)
            done, taken = int(spans[i, 1]), int(position)
        if done > question_start:
            raise ValueError(f"needles end at {done}, behind the start of the question at {question_start}")
        parts += [haystack[taken : taken + question_start - done], question, answer]
        answer_start = question_start + len(question)
        stop = answer_start + len(answer)
        input_ids = np.concatenate([*parts, np.full(length - stop, self.pad_token_id, np.int64)])
        valid = np.arange(length) < stop
        return NeedleSample(
            input_ids=input_ids,
            labels=np.where(valid, input_ids, IGNORED),
            attention_mask=valid.astype(np.int64),
            question_start=question_start,
            answer_start=answer_start,
            answer_length=len(answer),
            scored_position=answer_start if self.kind == "single" else stop - 1,
            needle_spans=spans,
            values=values,
        )

    def build(self, haystack: Int64Array, *, seed: int, index: int = 0, depth: float | None = None) -> NeedleSample:
        """Draw values and places for a haystack ``[L]`` and build the sample.

        Args:
            haystack: tokens of the text.
            seed: of the task.
            index: number of the sample.
            depth: place of a single needle between 0 (start) and 1 (right before the last chunks); None draws it.

        Raises:
            ValueError: the needles do not fit, or a depth out of range or for several needles.
        """
        if depth is not None and (self.kind != "single" or not 0 <= depth <= 1):
            raise ValueError(f"depth lies between 0 and 1 and needs kind=single, got {depth} with kind={self.kind}")
        generator = np.random.default_rng([seed, index])
        room = self.room(len(haystack))
        values = generator.integers(*self.vocab_range, size=(self.num_values, self.key_length))
        if self.kind == "single":
            place = int(generator.integers(room)) if depth is None else round(depth * (room - 1))
            return self.assemble(haystack, values, [place])
        order = generator.permutation(self.num_needles)
        positions = np.sort(generator.choice(room, self.num_needles, replace=False))
        return self.assemble(haystack, values, positions.tolist(), order.tolist())

    def _question_start(self, length: int) -> int:
        if self.align_question:
            return length - self.chunk_size + 1 - self.question_length
        return length - self.question_length - self.answer_length

    def _needle(self, number: int, values: Int64Array) -> Int64Array:
        if self.kind == "single":
            return self._fill(NEEDLES["single"], values[0], values[0])
        chain, hop = divmod(number, self.num_hops)
        first = chain * (self.num_hops + 1) + hop
        return self._fill(NEEDLES[self.kind], values[first], values[first + 1])

    def _answer(self, values: Int64Array) -> Int64Array:
        if self.kind == "single":
            return values[0]
        if self.kind == "multi":
            return values[1]
        parts = [values[1]]
        for value in values[2 : self.num_hops + 1]:
            parts += [self._tokens[","], value]
        return np.concatenate(parts)

    def _fill(self, template: tuple[str | int, ...], *values: Int64Array) -> Int64Array:
        parts = [self._tokens[part] if isinstance(part, str) else values[part] for part in template]
        return np.concatenate(parts)

    def _length(self, template: tuple[str | int, ...]) -> int:
        return sum(len(self._tokens[part]) if isinstance(part, str) else self.key_length for part in template)
