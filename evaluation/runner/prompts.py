"""Examples as token ids: instruction, context in pieces and query, truncated and put into a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from evaluation.tasks.base import Example
from patches.parallel_context import ParallelContext, split_context

Truncation = Literal["none", "middle", "left", "right"]
Place = Literal["prefix", "pieces", "query"]
MARKER = "<<context>>"


@dataclass(frozen=True)
class PromptOptions:
    """How examples become tokens.

    Attributes:
        max_context_tokens: tokens of the context at most; None: no limit.
        truncation: what a longer context loses: ``middle``, ``left`` (its beginning), ``right`` (its end), or
            ``none``, which refuses it.
        instruction: where the instruction stands: in the shared ``prefix``, in front of all ``pieces``, or in front of
            the ``query``.
        chat_template: whether the prompt is put into the tokenizer's chat template; None: where task and tokenizer
            want it.
        max_prompt_tokens: tokens of instruction, query and context (of one piece, where the context is split by
            ``max_piece_tokens``) at most; None: no limit.
    """

    max_context_tokens: int | None = None
    truncation: Truncation = "none"
    instruction: Place = "prefix"
    chat_template: bool | None = None
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.truncation not in get_args(Truncation):
            raise ValueError(f"truncation is one of {', '.join(get_args(Truncation))}, got {self.truncation!r}")
        if self.instruction not in get_args(Place):
            raise ValueError(f"instruction is one of {', '.join(get_args(Place))}, got {self.instruction!r}")
        for name in ("max_context_tokens", "max_prompt_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.truncation != "none" and self.max_context_tokens is None and self.max_prompt_tokens is None:
            raise ValueError(f"truncation={self.truncation} needs max_context_tokens or max_prompt_tokens")


@dataclass(frozen=True)
class Prompt:
    """Token ids of one example."""

    prefix: list[int]
    """Behind the patch's own prefix."""
    pieces: list[list[int]]
    query: list[int]
    num_context_tokens: int

    @property
    def tokens(self) -> list[int]:
        """The whole prompt as one sequence."""
        return [*self.prefix, *(token for piece in self.pieces for token in piece), *self.query]


def truncate(tokens: Sequence[int], limit: int | None, how: Truncation) -> list[int]:
    """Return at most ``limit`` tokens: ``middle`` keeps limit - limit // 2 in front and limit // 2 behind.

    ``left`` drops the beginning, ``right`` the end; ``none``, or no limit, keeps all.

    Raises:
        ValueError: another way to truncate, or a limit below 1.
    """
    if how not in get_args(Truncation):
        raise ValueError(f"truncation is one of {', '.join(get_args(Truncation))}, got {how!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    ids = list(tokens)
    if how == "none" or limit is None or len(ids) <= limit:
        return ids
    front = {"middle": limit - limit // 2, "left": 0, "right": limit}[how]
    return ids[:front] + ids[len(ids) - (limit - front) :]


class PromptMaker:
    """Makes the prompts of one task for one tokenizer and patch."""

    def __init__(
        self, tokenizer: Any, patch: ParallelContext | None, options: PromptOptions, *, chat: bool = False
    ) -> None:
        self.tokenizer, self.patch, self.options, self.chat = tokenizer, patch, options, chat

    def make(self, example: Example) -> Prompt:
        """Return the token ids of an example.

        Raises:
            ValueError: the context is above its limit and nothing is truncated, or there is nothing to ask.
        """
        instruction, query, head = example.instruction, example.query, ""
        if self.chat:
            head, instruction, query = self._rendered(instruction, query)
        place = self.options.instruction
        first, front = self._ids(instruction), self._ids(head)
        asked = self._ids(instruction + query) if place == "query" else self._ids(query)
        prefix = self._ids(head + instruction) if place == "prefix" else front
        room = self._room(example, len(prefix) + len(asked) + (len(first) if place == "pieces" else 0))
        pieces = self._pieces(example, room)
        total = sum(map(len, pieces))
        if not pieces and not asked:
            raise ValueError(f"example {example.id} has neither context nor query")
        if place == "pieces":
            prefix = prefix if pieces else prefix + first
            pieces = [first + piece for piece in pieces]
        return Prompt(prefix, pieces, asked, total)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _room(self, example: Example, taken: int) -> int | None:
        """Return how many tokens of context (of one piece) go beside the rest of the prompt; None: any number."""
        limit = self.options.max_prompt_tokens
        if limit is None:
            return None
        if taken >= limit:
            raise ValueError(
                f"example {example.id} has {taken} tokens of instruction and query, max_prompt_tokens={limit} leaves "
                "none for the context"
            )
        return limit - taken

    def _pieces(self, example: Example, room: int | None) -> list[list[int]]:
        passages = [ids for ids in map(self._ids, example.passages) if ids]
        by_size = self.patch is not None and self.patch.max_piece_tokens is not None
        limits = [self.options.max_context_tokens, None if by_size else room]
        limit = min((number for number in limits if number is not None), default=None)
        how, total = self.options.truncation, sum(map(len, passages))
        if limit is not None and total > limit and how == "none":
            raise ValueError(
                f"example {example.id} has a context of {total} tokens, above the limit of {limit}: "
                "choose truncation=middle, left or right"
            )
        if len(passages) != 1:
            passages = _drop(passages, limit, how)
            return split_context(passages, self._degree(passages, room), by="passages")
        ids = truncate(passages[0], limit, how)
        by = "tokens" if self.patch is None or self.patch.split_by == "passages" else self.patch.split_by
        overlap = 0 if self.patch is None else self.patch.overlap
        return split_context(ids, self._degree([ids], room), by=by, overlap=overlap)

    def _degree(self, passages: list[list[int]], room: int | None) -> int:
        patch = self.patch
        if patch is None:
            return 1
        if patch.max_piece_tokens is None:
            return patch.degree or 1
        size = min(patch.max_piece_tokens, room or patch.max_piece_tokens)
        return max(1, -(-sum(map(len, passages)) // size))

    def _rendered(self, instruction: str, query: str) -> tuple[str, str, str]:
        """Return the head of the chat template, the instruction, and the query with the template's end."""
        message = [{"role": "user", "content": instruction + MARKER + query}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(MARKER)
        if not found:
            raise ValueError("the chat template does not pass the user's message on: leave chat_template=false")
        kept = instruction if before.endswith(instruction) else instruction.lstrip()  # templates strip messages
        return before.removesuffix(kept), kept, after


def _drop(passages: list[list[int]], limit: int | None, how: Truncation) -> list[list[int]]:
    """Drop whole passages until the rest fits, from the end that ``how`` names; the last one left is cut."""
    kept = list(passages)
    while len(kept) > 1 and limit is not None and sum(map(len, kept)) > limit:
        kept.pop({"middle": len(kept) // 2, "left": 0, "right": -1}[how])
    return [truncate(kept[0], limit, how)] if len(kept) == 1 else kept
