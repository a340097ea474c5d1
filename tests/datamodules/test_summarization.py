"""Rows of documents with their summaries: stored values, alignment, what is cut, what is counted."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules.summarization import SummaryLayout, format_summarization
from datamodules.summary_store import SummaryStore, open_summaries

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "summarization" / "rows.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["options"]))
def test_stored_rows(case):
    row = format_summarization(case["document"], case["summary"], marker=case["marker"], **case["options"])
    assert row["prompt_length"] == case["prompt_length"]
    for name in ("input_ids", "labels", "attention_mask"):
        assert row[name].dtype == np.int64 and row[name].tolist() == case[name]


@pytest.mark.parametrize("alignment", ["pad", "trim", "none"])
@pytest.mark.parametrize("loss_on", ["all", "summary"])
def test_every_row_is_whole(alignment, loss_on):
    draw, marker = random.Random(1), (91, 92, 93)
    for _ in range(300):
        size, longest = draw.randint(1, 9), draw.randint(1, 12)
        length = longest + size + 3 + draw.randint(0, 40)
        options = {"chunk_size": None if alignment == "none" else size, "alignment": alignment, "loss_on": loss_on}
        layout = SummaryLayout(marker, length, longest, pad_token_id=0, eos_token_id=99, **options)
        document, summary = list(range(100, 100 + draw.randint(0, 60))), list(range(300, 300 + draw.randint(0, 20)))
        row = layout.row(document, summary)
        ids, prompt, stop = row["input_ids"].tolist(), row["prompt_length"], int(row["attention_mask"].sum())
        assert len(ids) == length and ids[prompt - 3 : prompt] == list(marker)
        if alignment != "none":
            assert prompt % size == 1 % size  # the colon opens a chunk
        pads = next(i for i, token in enumerate(ids) if token)
        kept = ids[pads : prompt - 3]
        first = document.index(kept[0]) if kept else 0
        assert kept == document[first : first + len(kept)] and (alignment == "trim" or first == 0)
        assert ids[prompt : stop - 1] == summary[: stop - 1 - prompt] and ids[stop - 1] == 99
        assert stop - prompt == min(len(summary) + 1, longest) and set(ids[stop:]) <= {0}
        # Nothing of the document is given up that would fit.
        free = length - stop
        assert alignment == "trim" or len(kept) == len(document) or free < (1 if alignment == "none" else size)
        scored = np.flatnonzero(row["labels"] != -100)
        assert scored.tolist() == list(range(prompt if loss_on == "summary" else pads, stop))
        assert layout.num_targets(len(document), len(summary)) == int((row["labels"][1:] != -100).sum())


def test_a_prompt_that_is_aligned_already_gets_no_padding():
    row = format_summarization(
        range(14), [5], marker=[1, 2, 3], max_length=64, max_summary_length=8, chunk_size=8, pad_token_id=0
    )
    assert row["prompt_length"] == 17 and row["input_ids"][0] == 0 and row["input_ids"][1] == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alignment": "left"}, "alignment is one of pad, trim, none"),
        ({"loss_on": "target"}, "loss_on is one of all, summary"),
        ({"chunk_size": None}, "alignment=pad needs the chunk_size"),
        ({"chunk_size": 0}, "must be at least 1"),
        ({"max_summary_length": 0}, "must be at least 1"),
        ({"max_summary_length": 60}, "the marker alone needs 9"),
        ({"max_length": 12}, "the marker alone needs 9"),
    ],
)
def test_impossible_rows_are_explained(options, sentence):
    fine = {"marker": [1, 2, 3], "max_length": 64, "max_summary_length": 8, "chunk_size": 8}
    with pytest.raises(ValueError, match=sentence):
        format_summarization([1] * 9, [2], **(fine | options))


def test_a_store_gives_back_what_was_written(summary_folder):
    store = open_summaries(summary_folder, split="test")
    source = (summary_folder.parent / "pairs" / "test.jsonl").read_text().splitlines()
    assert len(store) == len(source) == 6
    for number, (line, text) in enumerate(zip(source, store.texts(), strict=True)):
        row = json.loads(line)
        assert bytes(store.documents.document(number).tolist()).decode() == row["document"]
        assert bytes(store.reference(number)).decode() == row["summary"] == text["summary"]
        assert text["id"] == row["id"]
    assert bytes(store.marker).decode() == "|Summary:"
    assert store.misfit(vocab_size=258, eos_token_ids=[256]).startswith("the summaries have 259 token ids")
    assert store.misfit(vocab_size=259, eos_token_ids=[7]).startswith("the summaries end with token 256")
    assert store.misfit(vocab_size=259, eos_token_ids=[256, 7]) == ""
    assert store.contains(ord("|")) and store.contains(ord("e")) and not store.contains(ord("z"))


def test_prompts_leave_room_and_do_not_know_the_reference(summary_folder):
    store = open_summaries(summary_folder, split="test")
    prompts = store.prompts(6, max_length=64, max_new_tokens=20, chunk_size=8, alignment="pad", pad_token_id=257)
    assert {len(prompt) % 8 for prompt in prompts} == {1} and max(map(len, prompts)) <= 44
    assert all(bytes(prompt[-9:].tolist()).decode() == "|Summary:" for prompt in prompts)


@pytest.mark.parametrize("damage", ["meta.json", "texts.jsonl", "documents"])
def test_damaged_stores_are_refused(summary_folder, tmp_path, damage):
    shutil.copytree(summary_folder / "test", tmp_path / "test")
    if damage == "documents":
        shutil.rmtree(tmp_path / "test" / "documents")
        shutil.copytree(summary_folder / "validation" / "documents", tmp_path / "test" / "documents")
    else:
        file = tmp_path / "test" / damage
        file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(ValueError, match=r"damaged|changed after it was written"):
        SummaryStore(tmp_path / "test").texts()


def test_a_missing_split_names_those_that_are_there(summary_folder):
    with pytest.raises(FileNotFoundError, match="it has test, train, validation"):
        open_summaries(summary_folder, split="dev")
    with pytest.raises(FileNotFoundError, match=r"python -m preprocess.summarization"):
        open_summaries(summary_folder / "train", split="dev")
