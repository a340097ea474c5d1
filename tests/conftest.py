"""Shared fixtures: a small corpus on disk, one thread."""

import json
import random
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads on shared cores spin against each other; one is faster and repeatable."""
    torch.set_num_threads(1)


def write_text_folder(folder: Path, num_files: int = 12) -> Path:
    """A folder of small text files: word salad with repeats, the same on every machine."""
    draw = random.Random(5)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(200)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        text = " ".join(draw.choices(words, k=400))
        (folder / f"{'validation' if number < 2 else 'train'}_{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A corpus folder of byte tokens with train and validation splits."""
    from preprocess.corpora import ensure_corpus

    folder = tmp_path_factory.mktemp("tiny_corpus")
    return ensure_corpus(str(folder / "corpus"), source=str(write_text_folder(folder / "text")), tokenizer="bytes")


def write_pairs(path: Path, count: int, *, seed: int = 0) -> Path:
    """A file of json lines with documents and summaries of word salad, the same on every machine."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 6))) for _ in range(draw.randint(5, 40))]
        rows.append({"id": f"n{number}", "document": " ".join(words), "summary": " ".join(words[: draw.randint(1, 4)])})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def summary_folder(tmp_path_factory):
    """Documents with their summaries as byte tokens: 23 pairs to train on, 7 to validate, 6 to test."""
    from preprocess.summarization import ensure_summaries

    folder = tmp_path_factory.mktemp("summaries")
    for seed, (split, count) in enumerate((("train", 23), ("validation", 7), ("test", 6))):
        write_pairs(folder / "pairs" / f"{split}.jsonl", count, seed=seed)
    return Path(ensure_summaries(folder / "store", source=str(folder / "pairs"), tokenizer="bytes"))
