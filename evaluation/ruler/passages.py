"""Questions over given passages: the passages of one record among those of others."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.ruler.draft import Draft, draft_rng, fit
from evaluation.templates import cut, fill, load_templates


def make_qa_examples(
    records: Sequence[Mapping[str, Any]], *, num_examples: int, num_tokens: int, tokenizer: Any, seed: int = 42
) -> list[dict[str, Any]]:
    """Return questions whose passages are hidden among the passages of other records.

    Args:
        records: each with ``question``, ``answers`` and ``passages`` (texts that hold the answer).
        num_examples: how many, from the first record on.
        num_tokens: tokens of prompt and answer, at most.
        tokenizer: a tokenizer of transformers.
        seed: of the choice and the order of the other passages.

    Raises:
        ValueError: fewer records than examples, a record without passages, or too few tokens for one's own passages.
    """
    if num_examples > len(records):
        raise ValueError(f"{num_examples} examples need as many records, got {len(records)}")
    result = []
    for index in range(num_examples):
        record = fit(_draft(records, seed, index), num_tokens, tokenizer)
        result.append({"index": index, "task": "qa"} | record)
    return result


def _draft(records: Sequence[Mapping[str, Any]], seed: int, index: int) -> Draft:
    texts = load_templates("ruler")["templates"]["qa"]
    rng = draft_rng("qa", seed, index)
    own = list(records[index]["passages"])
    if not own:
        raise ValueError(f"record {index} has no passages")
    known = set(own)
    others = list(dict.fromkeys(text for record in records for text in record["passages"] if text not in known))
    rng.shuffle(others)
    depths = [rng.random() for _ in own]

    def context(size: int) -> str:
        passages = others[: size - len(own)]
        for depth, passage in sorted(zip(depths, own, strict=True)):
            passages.insert(int(depth * (len(passages) + 1)), passage)
        return "\n\n".join(f"Document {number}:\n{passage}" for number, passage in enumerate(passages, 1))

    before, after = cut(texts["template"])
    return Draft(
        before,
        context,
        fill(after, {"query": records[index]["question"]}),
        texts["answer_prefix"],
        [str(answer) for answer in records[index]["answers"]],
        texts["max_new_tokens"],
        least=len(own),
        most=len(own) + len(others),
        guess=len(own) + 10,
    )
