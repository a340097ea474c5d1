"""Tails behind pieces are scored as the definition says, and rows without a context are refused."""

import pytest
import torch
from parallel_dense import dense_tail

from evaluation.parallel_context.tails import TailCut, score_tails
from patches.parallel_context import ParallelContext, SelectiveAttention


@pytest.mark.parametrize("unsplit", [1, 3])
@pytest.mark.parametrize("degree", [1, 3, 7])
def test_sums_are_those_of_the_dense_forward(llama, stream, degree, unsplit):
    cut = TailCut(keep_tail=5, unsplit=unsplit)
    rows = [stream[:30].tolist(), stream[40:64].tolist()]
    contexts, queries = zip(*map(cut.cut, rows), strict=True)
    patch = ParallelContext(degree=degree, prefix=None)
    pieces = [patch.split(context) for context in contexts]
    with patch.bind(llama) as bound:
        found = score_tails(bound, pieces, list(queries), cut=cut)
    for row, (parts, query) in zip(found.tolist(), zip(pieces, queries, strict=True), strict=True):
        nll, targets, entropy = dense_tail(llama, [], parts, query, keep_tail=5)
        assert row[0] == pytest.approx(nll, rel=1e-5) and row[1] == targets
        assert row[2] == pytest.approx(entropy, rel=1e-5)


def test_a_selection_lowers_the_entropy_and_the_meeting_points_are_two(llama, stream):
    cut, met = TailCut(8), []
    context, query = cut.cut(stream[:60].tolist())
    found = []
    for selection in (None, SelectiveAttention(top_k=1)):
        patch = ParallelContext(degree=6, prefix=None, selection=selection)
        with patch.bind(llama) as bound:
            sums = score_tails(bound, [patch.split(context)], [query], cut=cut, meet=lambda: met.append(1))
        assert sums.dtype == torch.float64 and sums.shape == (1, 3)
        found.append(sums[0, 2])
    assert found[1] < found[0] and len(met) == 4


@pytest.mark.parametrize("options", [{"keep_tail": 0}, {"unsplit": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        TailCut(**options)


def test_a_row_without_context_is_refused():
    cut = TailCut(keep_tail=4, unsplit=2)
    assert cut.cut(range(7)) == ([0], [1, 2, 3, 4, 5, 6])
    assert cut.targets([1, 2, 3, 4, 5, 6]) == [-100, 3, 4, 5, 6, -100]
    with pytest.raises(ValueError, match="6 tokens has no context before its last 6"):
        cut.cut(range(6))
