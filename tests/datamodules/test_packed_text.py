"""Batches: what they hold, and that neither workers, ranks nor a resumed run change them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from datamodules.loading import Share, TrainingBatches, TrainingPlan, ValidationBatches
from datamodules.packed_text import PackedTextDataModule, TokenCorpus, window_start
from datamodules.windows import validation_rows
from preprocess.index import CorpusWriter

VOCABULARY = 1000


def write_split(folder, num_documents, seed, tokenizer="sha256:x"):
    generator = np.random.default_rng(seed)
    with CorpusWriter(
        folder, dtype="uint16", tokenizer=tokenizer, vocab_size=VOCABULARY, eos_token_id=0, source="test"
    ) as writer:
        for _ in range(num_documents):
            writer.add(generator.integers(1, VOCABULARY, size=generator.integers(1, 60)))


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "corpus"
    write_split(folder / "train", 60, 0)
    write_split(folder / "validation", 20, 1)
    return folder


def make(folder, **options):
    defaults = {"context_length": 32, "batch_size": 3, "max_steps": 5, "seed": 7}
    module = PackedTextDataModule(folder, **(defaults | options))
    module.setup("fit")
    return module


def as_lists(loader):
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in loader]


def test_training_batches_are_the_windows_of_their_steps(corpus_folder):
    module = make(corpus_folder, accumulate_grad_batches=2)
    batches = list(module.train_dataloader())
    assert len(batches) == len(module.train_dataloader()) == 10
    tokens = module.train_corpus.read(0, len(module.train_corpus))
    for micro_batch, batch in enumerate(batches):
        assert set(batch) == {"input_ids", "labels", "sample_index", "window_start", "num_step_targets"}
        assert batch["num_step_targets"] == 2 * 3 * 31
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        for row in range(3):
            step, index = micro_batch // 2, micro_batch % 2 * 3 + row
            start = window_start(7, step, index, num_tokens=len(tokens), length=32)
            assert batch["window_start"][row] == start and batch["sample_index"][row] == step * 6 + index
            assert batch["input_ids"][row].tolist() == tokens[start : start + 32].tolist()
    assert torch.equal(batches[0]["input_ids"], batches[0]["labels"])
    assert batches[0]["input_ids"].data_ptr() != batches[0]["labels"].data_ptr()
    assert module.tokens_per_step == 2 * 3 * 32


def test_packed_batches_announce_the_targets_inside_documents(corpus_folder):
    batches = list(make(corpus_folder, documents="packed", accumulate_grad_batches=2).train_dataloader())
    inside = [int((b["document_ids"][:, 1:] == b["document_ids"][:, :-1]).sum()) for b in batches]
    for step in range(5):
        first, second = batches[2 * step : 2 * step + 2]
        assert first["num_step_targets"] == second["num_step_targets"] == sum(inside[2 * step : 2 * step + 2])
    assert len(set(inside)) > 1 and max(inside) < 3 * 31


@pytest.mark.parametrize("documents", ["stream", "packed"])
def test_workers_change_nothing(corpus_folder, documents):
    options = {"documents": documents, "accumulate_grad_batches": 2, "eval_lengths": [16, 32]}
    alone, helped = (make(corpus_folder, num_workers=workers, **options) for workers in (0, 2))
    assert as_lists(alone.train_dataloader()) == as_lists(helped.train_dataloader())
    for one, other in zip(alone.val_dataloader(), helped.val_dataloader(), strict=True):
        assert as_lists(one) == as_lists(other)


def test_iterating_leaves_the_global_random_state_alone(corpus_folder):
    module = make(corpus_folder)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(module.train_dataloader())
    list(module.val_dataloader()[0])
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_together_see_what_one_sees(corpus_folder):
    corpus = TokenCorpus(corpus_folder / "train")
    plan = TrainingPlan(context_length=16, batch_size=2, seed=1, max_steps=3, accumulate=2)
    wide = TrainingPlan(context_length=16, batch_size=4 * 2, seed=1, max_steps=3, accumulate=1)
    whole = TrainingBatches(corpus, wide, share=Share(), with_documents=False)
    parts = [TrainingBatches(corpus, plan, share=Share(rank, 2), with_documents=False) for rank in range(2)]
    for step in range(3):
        rows = [part[step * 2 + i]["input_ids"] for part in parts for i in range(2)]
        indices = [part[step * 2 + i]["sample_index"] for part in parts for i in range(2)]
        assert torch.equal(torch.cat(rows), whole[step]["input_ids"])
        assert torch.equal(torch.cat(indices), whole[step]["sample_index"])


def test_the_strategy_says_which_share_is_ours(corpus_folder):
    module = make(corpus_folder, accumulate_grad_batches=2)
    strategy = SimpleNamespace(distributed_sampler_kwargs={"rank": 1, "num_replicas": 2})
    module.trainer = SimpleNamespace(strategy=strategy)
    found = [batch["sample_index"].tolist() for batch in module.train_dataloader()]
    assert found[:3] == [[6, 7, 8], [9, 10, 11], [18, 19, 20]]
    assert module.tokens_per_step == 2 * 2 * 3 * 32
    # Lightning replaces any other sampler in a distributed run.
    assert isinstance(module.train_dataloader().sampler, DistributedSampler)
    assert next(iter(module.val_dataloader()[0]))["sample_index"].tolist() == [3, 4, 5]


def test_packed_windows_carry_document_numbers(corpus_folder):
    module = make(corpus_folder, documents="packed")
    numbers = np.repeat(
        np.arange(module.train_corpus.num_documents),
        [len(module.train_corpus.document(i)) for i in range(module.train_corpus.num_documents)],
    )
    for batch in module.train_dataloader():
        for start, documents in zip(batch["window_start"].tolist(), batch["document_ids"], strict=True):
            assert documents.tolist() == numbers[start : start + 32].tolist()


def scored_targets(batches, document_of=None):
    """Return corpus positions of all targets that a loss would count."""
    found = []
    for batch in batches:
        for row, start in enumerate(batch["window_start"].tolist()):
            labels = [*batch["labels"][row].tolist()[1:], batch["next_token"][row].item()]
            found += [(start + 1 + i, label) for i, label in enumerate(labels) if label != -100]
    if document_of is not None:
        found = [(target, label) for target, label in found if document_of[target] == document_of[target - 1]]
    return sorted(found)


@pytest.mark.parametrize("max_eval_tokens", [None, 100])
def test_every_length_scores_every_target_once(corpus_folder, max_eval_tokens):
    module = make(corpus_folder, eval_lengths=[32, 7, 99], eval_batch_tokens=64, max_eval_tokens=max_eval_tokens)
    corpus = module.validation_corpus
    end = len(corpus) if max_eval_tokens is None else max_eval_tokens
    expected = list(enumerate(corpus.read(1, end).tolist(), start=1))
    loaders = module.val_dataloader()
    assert len(loaders) == 3
    for loader, length in zip(loaders, module.eval_lengths, strict=True):
        batches = list(loader)
        assert len(batches) == len(loader) and all(batch["input_ids"].shape[1] <= length for batch in batches)
        assert all(batch["input_ids"].numel() <= max(64, length) for batch in batches)
        assert scored_targets(batches) == expected
        windows = torch.cat([batch["sample_index"] for batch in batches]).tolist()
        assert windows == list(range(len(windows)))


def test_packed_validation_counts_the_same_targets_at_every_length(corpus_folder):
    module = make(corpus_folder, documents="packed", eval_lengths=[32, 7])
    document_of = module.validation_corpus.document_ids(0, len(module.validation_corpus)).tolist()
    long, short = (scored_targets(loader, document_of) for loader in module.val_dataloader())
    assert long == short
    assert len(long) == len(document_of) - module.validation_corpus.num_documents
    for loader in module.val_dataloader():
        for batch in loader:
            ends = batch["window_start"] + batch["input_ids"].shape[1]
            for end, following in zip(ends.tolist(), batch["next_token"].tolist(), strict=True):
                assert (following == -100) == (document_of[end] != document_of[end - 1])


@pytest.mark.parametrize("num_ranks", [2, 3, 50])
def test_ranks_share_validation_and_call_the_model_equally_often(corpus_folder, num_ranks):
    corpus = TokenCorpus(corpus_folder / "validation")
    rows = validation_rows(len(corpus), length=32, batch_size=2)
    shares = [
        ValidationBatches(corpus, rows, share=Share(r, num_ranks), with_documents=False) for r in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [share[i] for share in shares for i in range(len(share))]
    assert scored_targets(batches) == list(enumerate(corpus.read(1, len(corpus)).tolist(), start=1))


def test_resuming_starts_at_the_step(corpus_folder):
    module = make(corpus_folder, accumulate_grad_batches=2)
    state = module.state_dict() | {"step": 3}
    resumed = make(corpus_folder, accumulate_grad_batches=2)
    resumed.load_state_dict(state)
    loader = resumed.train_dataloader()
    assert as_lists(loader) == as_lists(module.train_dataloader())[6:]
    assert len(loader) == 10
    assert all(isinstance(value, int | str) for value in state.values())


def test_resuming_with_other_data_is_refused(corpus_folder, tmp_path):
    state = make(corpus_folder).state_dict()
    with pytest.raises(ValueError, match="another seed: 7, now 8"):
        make(corpus_folder, seed=8).load_state_dict(state)
    write_split(tmp_path / "train", 61, 0)
    write_split(tmp_path / "validation", 20, 1)
    with pytest.raises(ValueError, match="another corpus identity"):
        make(tmp_path).load_state_dict(state)
    with pytest.warns(UserWarning, match="context_length was 32 and is now 16"):
        make(corpus_folder, context_length=16).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 1}, "context_length must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"eval_lengths": [32, 0]}, "every number in eval_lengths must be at least 1"),
        ({"eval_lengths": []}, "every number in eval_lengths must be at least 1"),
        ({"eval_lengths": [8, 8]}, "differ from each other"),
        ({"max_eval_tokens": 0}, "max_eval_tokens must be at least 1"),
        ({"documents": "padded"}, "stream, packed"),
        ({"seed": -1}, "must not be negative"),
        ({"context_length": 10**6}, "fewer than context_length=1000000"),
        ({"eval_lengths": [10**6]}, "evaluation length of 1000000 needs"),
        ({"max_eval_tokens": 32}, "needs 33 tokens, the validation range has 32"),
    ],
)
def test_impossible_options_are_refused(corpus_folder, options, message):
    with pytest.raises(ValueError, match=message):
        make(corpus_folder, **options)


def test_tokens_outside_the_vocabulary_are_reported_and_not_trained_on(tmp_path):
    for split in ("train", "validation"):
        write_split(tmp_path / split, 20, 0)
    module = make(tmp_path)
    np.full(len(module.train_corpus), VOCABULARY, "<u2").tofile(tmp_path / "train/tokens.bin")
    with pytest.raises(ValueError, match=f"train is damaged, it holds token id {VOCABULARY}"):
        next(iter(module.train_dataloader()))


def test_validation_alone_needs_no_training_split(corpus_folder, tmp_path):
    write_split(tmp_path / "test", 20, 1)
    module = PackedTextDataModule(tmp_path, context_length=32, batch_size=2, max_steps=1, validation_split="test")
    module.setup("validate")
    alone = as_lists(module.val_dataloader()[0])
    assert alone == as_lists(make(corpus_folder, batch_size=2).val_dataloader()[0])


def test_missing_splits_are_named(corpus_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no split books .* it has train, validation"):
        make(corpus_folder, train_split="books")
    with pytest.raises(FileNotFoundError, match=r"preprocess\.tokenize"):
        make(tmp_path / "nothing")


def test_splits_of_different_tokenizers_are_refused(tmp_path):
    write_split(tmp_path / "train", 20, 0)
    write_split(tmp_path / "validation", 20, 1, tokenizer="sha256:y")
    with pytest.raises(ValueError, match="different tokenizers"):
        make(tmp_path)


def test_the_tokenizer_folder_is_offered_when_there(corpus_folder, tmp_path):
    assert make(corpus_folder).tokenizer_path is None
    (tmp_path / "tokenizer").mkdir()
    module = PackedTextDataModule(tmp_path, context_length=2, batch_size=1, max_steps=1)
    assert module.tokenizer_path == str(tmp_path / "tokenizer")
