"""Cut a context into pieces: by tokens, by passages, or at separator tokens.

Notable: the separator rule looks positions up by bisection, so that a long text is scanned once per separator set.
"""

import itertools
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

SplitBy = Literal["tokens", "passages", "separator"]
SPLITS = ("tokens", "passages", "separator")


def split_context(
    tokens: Any,
    degree: int,
    *,
    by: SplitBy = "tokens",
    overlap: int = 0,
    balanced: bool = False,
    separators: Sequence[Collection[int]] | None = None,
    guard: int = 3,
    joiner: Iterable[int] = (),
) -> list[list[int]]:
    """Cut ``tokens`` into at most ``degree`` pieces (more with an overlap); no piece is empty.

    Args:
        tokens: Token ids, list or 1-D tensor; with ``by="passages"`` a list of passages.
        degree: Number of pieces asked for; short inputs give fewer.
        by: "tokens": pieces of ceil(n / degree), the last one shorter. "passages": whole passages dealt in order.
            "separator": halve the longest piece near its middle, at a separator.
        overlap: Tokens a piece shares with the one before it (by tokens).
        balanced: Sizes that differ by at most 1, longer ones first (by tokens).
        separators: Sets of token ids in order of preference (by separator).
        guard: Tokens at either end of a piece where it is never cut (by separator).
        joiner: Ids put between the passages of a piece (by passages).

    Returns:
        The pieces in document order.

    Raises:
        ValueError: On a degree below 1, an unknown ``by``, an overlap outside [0, size), an option of another ``by``.
    """
    joint = list(joiner)
    _check(degree, by, overlap, balanced=balanced, separators=separators, guard=guard, joiner=joint)
    if by == "passages":
        return _deal([token_list(passage) for passage in tokens], degree, joint)
    ids = token_list(tokens)
    if not ids:
        return []
    if by == "separator":
        cuts = _separator_cuts(ids, degree, [frozenset(group) for group in separators or ()], guard)
    elif balanced:
        cuts = _even_cuts(len(ids), min(degree, len(ids)))
    else:
        return _strides(ids, degree, overlap)
    return [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def token_list(tokens: Any) -> list[int]:
    """Return token ids, given as a list or a 1-D tensor, as a list of integers."""
    values = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    if not all(isinstance(value, int) for value in values):
        raise ValueError("tokens must be a flat list or 1-D tensor of token ids; lists of passages need by='passages'")
    return values


def _check(
    degree: int,
    by: str,
    overlap: int,
    *,
    balanced: bool,
    separators: Sequence[Collection[int]] | None,
    guard: int,
    joiner: list[int],
) -> None:
    if by not in SPLITS:
        raise ValueError(f"unknown split by={by!r}, use one of {', '.join(SPLITS)}")
    if degree < 1:
        raise ValueError(f"degree counts pieces and must be at least 1, got {degree}")
    if overlap < 0:
        raise ValueError(f"overlap must be at least 0 and below the piece size, got {overlap}")
    if guard < 0:
        raise ValueError(f"guard must be at least 0, got {guard}")
    if by == "separator" and separators is None:
        raise ValueError("by='separator' needs separators, a list of token-id sets in order of preference")
    uses = {"overlap": (overlap, "tokens"), "balanced": (balanced, "tokens")}
    uses |= {"separators": (separators, "separator"), "joiner": (joiner, "passages")}  # type: ignore[dict-item]
    for name, (value, home) in uses.items():
        if value and by != home:
            raise ValueError(f"{name} has an effect with by={home!r} only, got by={by!r}; leave it out")
    if balanced and overlap:
        raise ValueError("overlap and balanced cannot be combined; choose one")


def _strides(ids: list[int], degree: int, overlap: int) -> list[list[int]]:
    size = -(-len(ids) // degree)
    if overlap >= size:
        raise ValueError(f"overlap must lie in [0, size) = [0, {size}), got {overlap}; lower it or the degree")
    # The first piece that reaches the end is the last one.
    last = max(-(-(len(ids) - size) // (size - overlap)), 0)
    return [ids[start : start + size] for start in range(0, (last + 1) * (size - overlap), size - overlap)]


def _even_cuts(length: int, parts: int) -> list[int]:
    """Return where to cut ``length`` items into parts that differ by at most 1, longer ones first."""
    size, longer = divmod(length, parts)
    return [number * size + min(number, longer) for number in range(1, parts)]


def _deal(passages: list[list[int]], degree: int, joiner: list[int]) -> list[list[int]]:
    kept = [passage for passage in passages if passage]
    if not kept:
        return []
    cuts = _even_cuts(len(kept), min(degree, len(kept)))
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, len(kept)], strict=True):
        piece = list(kept[start])
        for passage in kept[start + 1 : stop]:
            piece += joiner + passage
        pieces.append(piece)
    return pieces


def _separator_cuts(ids: list[int], degree: int, groups: list[frozenset[int]], guard: int) -> list[int]:
    places = [[place for place, token in enumerate(ids) if token in group] for group in groups]
    borders = [0, len(ids)]
    while len(borders) - 1 < degree:
        candidates = [(start, stop) for start, stop in itertools.pairwise(borders) if stop - start > 2 * guard + 1]
        if not candidates:
            break
        start, stop = max(
            candidates,
            key=lambda piece: (
                bool(groups) and _inside(places[0], piece[0] + guard, piece[1] - guard),
                piece[1] - piece[0],
                -piece[0],
            ),
        )
        borders.append(_cut(ids, start, stop, groups=groups, places=places, guard=guard))
        borders.sort()
    return borders[1:-1]


def _inside(places: list[int], start: int, stop: int) -> bool:
    found = bisect_left(places, start)
    return found < len(places) and places[found] < stop


def _cut(
    ids: list[int], start: int, stop: int, *, groups: list[frozenset[int]], places: list[list[int]], guard: int
) -> int:
    """Return where to cut ``[start, stop)``: after the separator nearest to its middle, else at the middle."""
    middle = (start + stop) // 2
    for group, known in zip(groups, places, strict=True):
        if not _inside(known, start + guard, stop - guard):
            continue
        after = bisect_left(known, middle)
        near = [place for place in known[max(after - 1, 0) : after + 1] if start + guard <= place < stop - guard]
        cut = min(near, key=lambda place: (abs(place - middle), -place)) + 1
        while cut < stop - guard and ids[cut] in group:
            cut += 1
        return min(cut, stop - 1)  # without a guard the last token may be a separator: no piece is empty
    return middle
