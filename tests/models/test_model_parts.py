"""The parts: norm, loss, masks, layouts; and that a training step never asks the device for a value."""

import pytest
import torch
from model_cases import drt_config, small_drt, token_ids
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models.blocks
import models.drt.modeling_drt
import models.drt.retrieval
from models.blocks import alibi_slopes
from models.drt.chunk_store import ChunkStore
from models.drt.layout import GridLayout
from models.drt.layout_maps import packed_layout, segment_layout
from models.next_token_loss import counted_targets, next_token_loss
from models.rms_norm import RMSNorm
from models.rows import RowProgress, Spans, document_numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-3)
    with torch.no_grad():
        norm.weight.normal_()
    x, gradient = torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, 24).to(dtype)
    x.requires_grad_()
    out = norm(x)
    out.backward(gradient)
    exact = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    expected = weight * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    expected.backward(gradient.double())
    assert out.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, atol=1e-5, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_loss_and_gradient(dtype, vocab_size):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 90, vocab_size)).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (2, 90))
    targets[0, 5:20] = targets[1, -1] = -100
    loss = next_token_loss(logits, targets, None)
    (2 * loss).backward()
    exact = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), ignore_index=-100)
    (2 * expected).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(
        logits.grad, exact.grad.to(dtype), atol=1e-7, rtol=1e-2 if dtype is not torch.float32 else 1e-4
    )
    assert next_token_loss(logits, torch.full_like(targets, -100), None) == 0


def test_counted_targets():
    labels = torch.tensor([[10, 11, 12, 13, 14, 15]])
    assert counted_targets(labels, None).tolist() == [[11, 12, 13, 14, 15, -100]]
    documents = torch.tensor([[-1, 0, 0, 1, 1, -1]])
    assert counted_targets(labels, documents).tolist() == [[-100, 12, -100, 14, -100, -100]]


def test_alibi_slopes_of_any_number_of_heads():
    slopes = alibi_slopes(3, torch.device("cpu"))
    torch.testing.assert_close(slopes, torch.tensor([2 ** (-8 / 3), 2 ** (-16 / 3), 2**-8.0]))


def test_document_numbers():
    ids = torch.tensor([[5, 5, 2, 2, 5, 5]])
    assert document_numbers(ids, None).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert document_numbers(ids, torch.tensor([[0, 1, 1, 1, 1, 0]])).tolist() == [[-1, 0, 1, 1, 2, -1]]


def test_row_progress_over_several_calls():
    progress = RowProgress()
    first = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 0, 0]])
    spans = progress.spans(first.shape, first)
    assert spans == Spans([0, 2, 0], [3, 1, 0])
    progress.advance(spans, 3)
    mask = torch.cat([first, torch.tensor([[1, 0], [1, 1], [0, 1]])], dim=1)
    spans = progress.spans(torch.Size([3, 2]), mask)
    assert spans == Spans([0, 0, 1], [1, 2, 1])
    progress.advance(spans, 2)
    assert (progress.seen, progress.lengths, progress.ended) == (5, [4, 3, 1], [True, False, False])
    with pytest.raises(ValueError, match="missing"):
        progress.spans(torch.Size([3, 1]), None)
    with pytest.raises(ValueError, match="row 0 has a hole"):
        progress.spans(torch.Size([3, 1]), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1))


def test_grid_layout_places_landmarks():
    layout = GridLayout(8, 3)
    text = torch.arange(1.0, 9)[None, :, None]
    x = layout.insert(text, torch.tensor([100.0]))
    assert x[0, :, 0].tolist() == [1, 2, 3, 100, 4, 5, 6, 100, 7, 8, 0, 100]
    assert torch.equal(layout.text(x), text)
    assert layout.num_chunks == 2
    assert layout.assign(torch.tensor([[[7], [8]]]), -1)[0, :, 0].tolist() == [-1, 7, 8]


def test_packed_layout_places_every_document_on_its_own_grid():
    documents = torch.tensor([[0] * 5 + [1] * 2 + [2] * 6])
    layout = packed_layout(documents, 2)
    text = torch.arange(1.0, 14)[None, :, None]
    x = layout.insert(text, torch.tensor([0.0]))
    assert x[0, :, 0].tolist() == [1, 2, 0, 3, 4, 0, 5, 6, 7, 0, 8, 9, 0, 10, 11, 0, 12, 13, 0]
    assert layout.document_ids.tolist() == [[0] * 7 + [1] * 3 + [2] * 9]
    assert torch.equal(layout.text(x), text)
    assert layout.chunks(x)[0, :, :, 0].tolist() == [
        [1, 2, 0],
        [3, 4, 0],
        [6, 7, 0],
        [8, 9, 0],
        [10, 11, 0],
        [12, 13, 0],
    ]
    assert layout.visible[0].tolist() == [[0, 0], [0, 1], [2, 2], [3, 3], [3, 4], [3, 5]]
    groups = torch.arange(1.0, 7).view(1, 6, 1, 1, 1).expand(-1, -1, 3, -1, -1)
    assert layout.join(groups)[0, :, 0, 0].tolist() == [0] * 3 + [1] * 3 + [2] + [0] * 3 + [0] * 3 + [4] * 3 + [5] * 3


def test_segment_layout_continues_the_running_chunk():
    ids = torch.zeros(1, 4, dtype=torch.long)
    layout = segment_layout(ids, [5], Spans.full(1, 4), chunk_size=3)
    x = layout.insert(torch.arange(1.0, 5)[None, :, None], torch.tensor([0.0]))
    # Tokens 5 to 8: the first ends chunk 1, the others are chunk 2.
    assert x[0, :, 0].tolist() == [1, 0, 2, 3, 4, 0]
    pending = torch.tensor([[[50.0], [51], [52]]])
    assert layout.chunks(x, pending)[0, :, :, 0].tolist() == [[50, 51, 1, 0], [2, 3, 4, 0]]
    assert layout.visible.tolist() == [[[0, 1], [0, 2]]]
    assert (layout.num_groups, layout.row_chunks) == (2, [2])


def test_chunk_store_merges_and_gathers():
    for offload in (False, True):
        store = ChunkStore(offload=offload)
        data = torch.randn(2, 21, 2, 3, 1, 4)
        for chunk in range(21):
            store.append(data[:, chunk : chunk + 1], [chunk] * 2, [1] * 2)
        assert len(store) == 21
        assert len(store.blocks) <= 5
        assert store.nbytes() == data.nbytes
        indices = torch.tensor([[[20, 3, -1], [3, 0, 20]], [[-1, -1, -1], [7, 8, -1]]], dtype=torch.int32)
        fetched = store.fetch(indices)
        assert fetched.data.shape[1] == 3
        for row, group, slot in (indices >= 0).nonzero().tolist():
            got = fetched.data[row, fetched.local[row, group, slot]]
            assert torch.equal(got, data[row, indices[row, group, slot]])
        assert torch.equal(fetched.local < 0, indices < 0)
        store.select([1, 1, 0])
        store.append(data[[1, 1, 0], :1], [21, 20, 21], [0, 1, 1])
        again = store.fetch(torch.tensor([[[19]], [[20]], [[21]]], dtype=torch.int32)).data[:, 0]
        assert torch.equal(again, torch.stack([data[1, 19], data[1, 0], data[0, 0]]))


class _NoValues(TorchDispatchMode):
    """Fail wherever a GPU would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal")), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_training_never_waits_for_a_value(monkeypatch, packed):
    # The kernels check values on the CPU and have their own tests; here they are replaced by their shapes.
    monkeypatch.setattr(models.blocks, "sliding_window_attention", lambda q, k, v, *a, **kw: q + k.mean() + v.mean())
    monkeypatch.setattr(
        models.drt.retrieval, "grouped_cross_attention", lambda q, k, v, i, w, **kw: q + k.mean() + v.mean() + w.mean()
    )
    monkeypatch.setattr(
        models.drt.modeling_drt,
        "retrieve_chunks",
        lambda q, m, k, **kw: (torch.zeros(*q.shape[:2], k, dtype=torch.int32), q[..., :k] * m.mean()),
    )
    model = small_drt(num_key_value_heads=4).train()
    ids = token_ids(2, 43)
    documents = (torch.arange(43) > 20).long().expand(2, -1) if packed else None
    with _NoValues():
        model(ids, labels=ids, document_ids=documents).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_config_is_not_shared():
    first, second = drt_config(), drt_config()
    first.layers_per_group.append(1)
    assert second.layers_per_group == [1, 1]
