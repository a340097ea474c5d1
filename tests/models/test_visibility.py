"""What may influence a logit: causality, padding, prefixes, packed documents."""

import pytest
import torch
from model_cases import SMALL_MODELS, small_drt, token_ids

LENGTH = 40


@pytest.fixture(scope="module", params=SMALL_MODELS)
def model(request):
    return SMALL_MODELS[request.param]()


@pytest.fixture(scope="module")
def drt():
    return small_drt()


def _logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def test_nothing_before_an_edit_moves(model):
    ids = token_ids(1, LENGTH)
    before = _logits(model, ids)
    for place in (0, 4, 5, 23, 39):
        edited = ids.clone()
        edited[0, place] += 1
        difference = (_logits(model, edited) - before).abs().amax(-1)[0]
        assert difference[:place].max() <= 5e-6 if place else True
        assert difference[place] > 1e-3


def test_an_edit_reaches_the_chunk_after_the_next_through_retrieval_only():
    # A window of one position leaves retrieval as the only way between positions.
    model = small_drt(window_size=1, chunk_top_k=20)
    ids = token_ids(1, LENGTH)
    before = _logits(model, ids)
    for chunk in (0, 2, 5):
        edited = ids.clone()
        place = 5 * chunk + 3
        edited[0, place] += 1
        difference = (_logits(model, edited) - before).abs().amax(-1)[0]
        unseen = torch.ones(LENGTH, dtype=torch.bool)
        unseen[place] = False
        unseen[5 * (chunk + 2) :] = False
        assert difference[unseen].max() <= 5e-6
        assert difference[5 * (chunk + 2)] > 1e-4


def test_future_embeddings_get_exactly_no_gradient(model):
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(out))
    model(token_ids(1, LENGTH)).logits[0, 21].sum().backward(inputs=list(model.parameters()), retain_graph=True)
    assert seen[0].shape[:2] == (1, LENGTH)
    seen.clear()
    output = model(token_ids(1, LENGTH), use_cache=False).logits[0, 21].sum()
    gradient = torch.autograd.grad(output, seen[0])[0]
    hook.remove()
    model.zero_grad()
    assert (gradient[0, 22:] == 0).all()
    assert (gradient[0, :22].abs().sum(-1) > 0).sum() > 5


@pytest.mark.parametrize("padding", [1, 4, 5, 6, 11])
def test_padding_of_any_length_and_content_changes_nothing(model, padding):
    ids, noise = token_ids(2, LENGTH), token_ids(2, 2 * padding, seed=padding)
    expected = _logits(model, ids)
    left, right = noise.split(padding, dim=1)
    padded = torch.cat([left, ids, right], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = mask[:, padding + LENGTH :] = 0
    inside = slice(padding, padding + LENGTH)
    output = model(padded, attention_mask=mask, labels=padded)
    torch.testing.assert_close(output.logits[:, inside], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, model(ids, labels=ids).loss, atol=1e-5, rtol=0)
    only_right = padded[:, padding:]
    logits = _logits(model, only_right, attention_mask=mask[:, padding:])
    torch.testing.assert_close(logits[:, :LENGTH], expected, atol=1e-4, rtol=0)


def test_an_all_ones_mask_changes_no_bit(model):
    ids = token_ids(2, LENGTH)
    assert torch.equal(_logits(model, ids, attention_mask=torch.ones_like(ids)), _logits(model, ids))


def test_prefixes_of_any_length(model):
    ids = token_ids(1, 23)
    whole = _logits(model, ids)
    for length in range(1, 23):
        torch.testing.assert_close(_logits(model, ids[:, :length]), whole[:, :length], atol=1e-4, rtol=0)


LENGTHS = [[23, 7, 1, 33], [5, 5, 40, 14], [64], [2, 60, 2]]


def test_packed_documents_equal_separate_ones(model):
    ids = token_ids(4, 64)
    names = torch.zeros_like(ids)
    for row, lengths in enumerate(LENGTHS):
        # Names need not ascend; a new document begins where the value changes.
        names[row] = torch.repeat_interleave(torch.tensor([7, 3, 3 + row, 1][: len(lengths)]), torch.tensor(lengths))
        if row == 0:
            names[row, 30:31] = 9
    output = model(ids, document_ids=names, labels=ids)
    total, count = 0.0, 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            document = ids[row : row + 1, start : start + length]
            with torch.no_grad():
                alone = model(document, labels=document)
            got = output.logits[row : row + 1, start : start + length]
            torch.testing.assert_close(got, alone.logits, atol=1e-4, rtol=0)
            total, count, start = total + alone.loss * (length - 1), count + length - 1, start + length
    torch.testing.assert_close(output.loss, total / count, atol=1e-5, rtol=0)


def test_an_edit_in_one_document_leaves_the_others(model):
    ids = token_ids(1, 64)
    names = (torch.arange(64) >= 27).long()[None]
    edited = ids.clone()
    edited[0, :27] = token_ids(1, 27, seed=5)
    before, after = (_logits(model, tokens, document_ids=names) for tokens in (ids, edited))
    torch.testing.assert_close(after[:, 27:], before[:, 27:], atol=5e-6, rtol=0)
    assert (after[:, :27] - before[:, :27]).abs().max() > 1e-2


def test_packed_documents_with_padding(model):
    ids = token_ids(2, 40)
    names = (torch.arange(40) >= 22).long().expand(2, -1)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 37:] = 0
    output = _logits(model, ids, document_ids=names, attention_mask=mask)
    for row, (start, stop) in ((0, (3, 22)), (0, (22, 40)), (1, (0, 22)), (1, (22, 37))):
        alone = _logits(model, ids[row : row + 1, start:stop])
        torch.testing.assert_close(output[row : row + 1, start:stop], alone, atol=1e-4, rtol=0)
    assert torch.isfinite(output).all()


def test_documents_shorter_than_a_chunk(drt):
    ids = token_ids(1, 12)
    names = torch.arange(12)[None] // 3
    output = drt.train()(ids, labels=ids, document_ids=names)
    output.loss.backward()
    drt.eval()
    assert all(parameter.grad is not None for parameter in drt.parameters())
    for start in range(0, 12, 3):
        alone = _logits(drt, ids[:, start : start + 3])
        torch.testing.assert_close(output.logits[:, start : start + 3], alone, atol=1e-4, rtol=0)
    drt.zero_grad()
