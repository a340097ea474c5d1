"""Perplexity by degree in validation: the numbers of the dense forward, and training that does not notice."""

import math
from types import SimpleNamespace

import pytest
import torch
from parallel_dense import dense_tail

from callbacks.parallel_perplexity import ParallelPerplexity, text_rows
from patches.parallel_context import APE, ParallelContext, SelectiveAttention

OPTIONS = {"keep_tail": 4, "prefix": None}


def reference(module, data, degree, *, prefix=(), keep_tail=4, strip=0):
    found = []
    for batch in data.val_dataloader()[0]:
        for row in batch["input_ids"].tolist():
            context, query = row[strip : -keep_tail - 1], row[-keep_tail - 1 :]
            pieces = ParallelContext(degree=degree).split(context)
            found.append(dense_tail(module.model, prefix, pieces, query, keep_tail=keep_tail))
    return [sum(column) for column in zip(*found, strict=True)]


def test_sums_are_those_of_the_dense_forward(lab, make_trainer):
    callback, module, data = ParallelPerplexity((1, 3), **OPTIONS), lab["Module"](lab["tiny_llama"]()), lab["Data"]()
    trainer = make_trainer(callback)
    trainer.validate(module, datamodule=data, verbose=False)
    for degree in (1, 3):
        nll, targets, entropy = reference(module, data, degree)
        result = callback.results[degree]
        assert result["nll_sum"] == pytest.approx(nll, rel=1e-5) and result["num_targets"] == targets == 24
        assert result["entropy"] == pytest.approx(entropy / targets, rel=1e-4)
        assert result["perplexity"] == pytest.approx(math.exp(nll / targets), rel=1e-5)
        logged = trainer.callback_metrics
        assert logged[f"parallel_perplexity/degree_{degree}"].item() == pytest.approx(result["perplexity"], rel=1e-6)
        assert logged[f"parallel_entropy/degree_{degree}"].item() == pytest.approx(result["entropy"], rel=1e-6)
    assert callback.last_result["parallel_perplexity"]["3"] == callback.results[3]
    again = ParallelPerplexity((1, 3), **OPTIONS)
    again.load_state_dict(callback.state_dict())
    assert again.last_result == callback.last_result


def test_one_piece_is_the_ordinary_perplexity(lab, make_trainer):
    callback, module, data = ParallelPerplexity((1,), **OPTIONS), lab["Module"](lab["tiny_llama"]()), lab["Data"]()
    make_trainer(callback).validate(module, datamodule=data, verbose=False)
    ids = torch.cat([batch["input_ids"] for batch in data.val_dataloader()[0]])
    logits = module.model.eval()(ids).logits[:, -5:-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -4:].flatten(), reduction="sum")
    assert callback.results[1]["nll_sum"] == pytest.approx(nll.item(), rel=1e-5)


def test_training_is_bit_identical(assert_changes_nothing):
    options = {"prefix": None, "selection": SelectiveAttention(top_k=1)}
    assert_changes_nothing(ParallelPerplexity((1, 4), keep_tail=4, **options))


def test_a_row_is_not_given_a_second_bos(lab, make_trainer):
    module, data = lab["Module"](lab["tiny_llama"]()), lab["Data"]()
    module.model.config.bos_token_id = 30
    first = list(data.val_dataloader()[0])
    for batch in first:
        batch["input_ids"][0, 0] = 30
    data.val_dataloader = lambda: [data.loader(first)]
    callback = ParallelPerplexity((2,), keep_tail=4)
    make_trainer(callback).validate(module, datamodule=data, verbose=False)
    wanted = 0.0
    for batch in first:
        for row in batch["input_ids"].tolist():
            context = row[1 if row[0] == 30 else 0 : -5]
            pieces = ParallelContext(degree=2).split(context)
            wanted += dense_tail(module.model, [30], pieces, row[-5:], keep_tail=4)[0]
    assert callback.results[2]["nll_sum"] == pytest.approx(wanted, rel=1e-5)


def test_a_patch_is_kept_but_for_its_degree(lab, make_trainer):
    patch = ParallelContext(prefix=None, ape=APE(0.8, 0.7), position_mode="ML")
    callback = ParallelPerplexity((1, 2), keep_tail=4, patch=patch)
    assert [p.degree for p in callback.patches.values()] == [1, 2]
    assert {(p.ape, p.position_mode, p.prefix) for p in callback.patches.values()} == {(APE(0.8, 0.7), "ML", None)}
    callback = ParallelPerplexity((2,), keep_tail=4, patch=patch, max_batches=1)
    make_trainer(callback).validate(lab["Module"](lab["tiny_llama"]()), datamodule=lab["Data"](), verbose=False)
    assert callback.results[2]["num_targets"] == 8


def test_padding_is_left_out():
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    counted = torch.ones(2, 3, dtype=torch.bool)
    assert text_rows({"input_ids": ids, "attention_mask": mask}, counted) == [[5, 6], [8, 9, 3]]
    assert text_rows({"input_ids": ids}, counted) == ids.tolist()
    valid = torch.tensor([[True, False], [False, True]])  # the second row begins with a token that is no target
    assert text_rows({"input_ids": ids, "valid": valid}, valid) == [[5, 6], [8, 9, 3]]


def test_rows_that_a_rank_repeats_are_not_scored_again(lab, make_trainer):
    module, data = lab["Module"](lab["tiny_llama"]()), lab["Data"]()
    first = list(data.val_dataloader()[0])
    repeated = {name: value.clone() for name, value in first[0].items()}
    repeated["labels"].fill_(-100)
    repeated["next_token"].fill_(-100)
    found = []
    for batches in (first, [*first, repeated]):
        data.val_dataloader = lambda batches=batches: [data.loader(batches)]
        callback = ParallelPerplexity((1, 2), **OPTIONS)
        make_trainer(callback).validate(module, datamodule=data, verbose=False)
        found.append(callback.results)
    assert found[0] == found[1]


def test_two_ranks_add_up(lab, make_trainer, monkeypatch):
    """What a rank hands to the reduction are its sums: two ranks with these batches have twice of each."""
    callback = ParallelPerplexity((1, 2), **OPTIONS)
    module, data = lab["Module"](lab["tiny_llama"]()), lab["Data"]()
    make_trainer(callback).validate(module, datamodule=data, verbose=False)
    one, trainer = callback.results, make_trainer(callback)
    monkeypatch.setattr(type(trainer.strategy), "reduce", lambda self, x, *a, reduce_op="mean", **k: 2 * x)
    trainer.validate(module, datamodule=data, verbose=False)
    for degree, result in callback.results.items():
        assert result["nll_sum"] == 2 * one[degree]["nll_sum"]
        assert result["num_targets"] == 2 * one[degree]["num_targets"]
        assert result["perplexity"] == one[degree]["perplexity"] and result["entropy"] == one[degree]["entropy"]


def test_nothing_is_scored_in_a_sanity_check(lab):
    callback = ParallelPerplexity((1,), **OPTIONS)
    trainer = SimpleNamespace(sanity_checking=True)
    callback.on_validation_epoch_start(trainer, None)
    callback.on_validation_batch_end(trainer, None, None, {}, 0)
    callback.on_validation_epoch_end(trainer, None)
    assert callback.last_result is None and not callback.results


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"degrees": ()}, "degrees must be different"),
        ({"degrees": (2, 2)}, "degrees must be different"),
        ({"degrees": (0,)}, "degree must be an integer of at least 1"),
        ({"keep_tail": 0}, "keep_tail must be at least 1"),
        ({"unsplit": 0}, "unsplit must be at least 1"),
        ({"max_batches": 0}, "max_batches must be at least 1"),
        ({"position_mode": "XX"}, "XX"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ParallelPerplexity(**options)


def test_rows_without_a_context_are_left_out(lab, make_trainer):
    callback = ParallelPerplexity((1, 2), keep_tail=15, prefix=None)
    with pytest.warns(UserWarning, match="scored nothing: no validation row is longer than 16 tokens"):
        make_trainer(callback).validate(lab["Module"](lab["tiny_llama"]()), datamodule=lab["Data"](), verbose=False)
    assert callback.last_result is None and not callback.results


def test_models_that_do_not_fit_are_refused(lab, fit, tmp_path):
    module = lab["Module"](lab["tiny_llama"]())
    module.model.config.model_type = "opt"
    with pytest.raises(ValueError, match=r"no parallel context for model type 'opt'.*~callbacks\.parallel_perplexity"):
        fit(ParallelPerplexity((1,), **OPTIONS), module=module)
    with pytest.raises(ValueError, match="finds no tokenizer in"):
        fit(ParallelPerplexity((1,), tokenizer=str(tmp_path), **OPTIONS))
