"""Options: refused at construction, warned about where they do nothing."""

import dataclasses
import warnings

import pytest

from patches.parallel_context import APE, Calibration, KeepPieces, ParallelContext, SelectiveAttention, TokenEviction

REFUSED = [
    (SelectiveAttention, {"top_k": -1}),
    (SelectiveAttention, {"top_k": 1.5}),
    (SelectiveAttention, {"score_top_k": -1}),
    (SelectiveAttention, {"aggregate": ("layer",)}),
    (SelectiveAttention, {"aggregate": ("seq",)}),
    (SelectiveAttention, {"aggregate": ("head", "head")}),
    (SelectiveAttention, {"soft_temperature": 0.0}),
    (SelectiveAttention, {"soft_temperature": -1.0}),
    (SelectiveAttention, {"momentum": 1.0}),
    (SelectiveAttention, {"soft_mass": "all"}),
    (KeepPieces, {"keep": 0}),
    (KeepPieces, {"keep": -3}),
    (KeepPieces, {"score": "loss"}),
    (KeepPieces, {"order": "first"}),
    (KeepPieces, {"query_tokens": 0}),
    (TokenEviction, {"method": "h20"}),
    (TokenEviction, {"capacity": 0}),
    (TokenEviction, {"kernel": 4}),
    (TokenEviction, {"pool": "sum"}),
    (TokenEviction, {"stage": "decode"}),
    (TokenEviction, {"observe": "all"}),
    (TokenEviction, {"dynamic": True}),
    (TokenEviction, {"stage": "query", "observe": "piece"}),
    (TokenEviction, {"method": "streaming", "capacity": 4, "sinks": 4}),
    (Calibration, {"kind": "first"}),
    (Calibration, {"layers": (3, 1)}),
    (Calibration, {"layers": (1,)}),
    (Calibration, {"threshold": 1.5}),
    (Calibration, {"rows": -1}),
    (Calibration, {"apply": "always"}),
    (Calibration, {"threshold_kind": "percent"}),
    (Calibration, {"threshold_kind": "quantile", "threshold": 1.0}),
    (APE, {"temperature": 0}),
    (APE, {"scale": -1.0}),
    (ParallelContext, {"degree": 0}),
    (ParallelContext, {"position_mode": "EM"}),
    (ParallelContext, {"degree": 4, "max_piece_tokens": 100}),
    (ParallelContext, {"max_piece_tokens": 0}),
    (ParallelContext, {"micro_batch_tokens": 0}),
    (ParallelContext, {"prefix": [1, 2]}),
    (ParallelContext, {"prefix_repeat": 0}),
    (ParallelContext, {"split_by": "words"}),
    (ParallelContext, {"overlap": -1}),
    (ParallelContext, {"overlap": 2, "split_by": "passages"}),
    (ParallelContext, {"implementation": "flash"}),
    (ParallelContext, {"workspace_mb": 0}),
    (ParallelContext, {"selection": KeepPieces()}),
    (ParallelContext, {"selection": SelectiveAttention(soft_temperature=1.0), "ape": APE()}),
    (ParallelContext, {"degree": 2, "eviction": TokenEviction("streaming")}),
]


@pytest.mark.parametrize(("kind", "options"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_wrong_values_raise(kind, options):
    with pytest.raises(ValueError, match=r"\w+ "):
        kind(**options)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (SelectiveAttention, {"soft_mass": "published"}, "soft_mass"),
        (SelectiveAttention, {"top_k": 0}, "selects nothing"),
        (KeepPieces, {"score": "random", "query_tokens": 3}, "random"),
        (ParallelContext, {"prefix": None, "prefix_repeat": 2}, "prefix_repeat"),
        (ParallelContext, {"prefix_bos": False}, "prefix_bos"),
        (ParallelContext, {"degree": 1, "selection": SelectiveAttention()}, "selection"),
        (ParallelContext, {"degree": 3, "piece_policy": KeepPieces(3)}, "piece_policy"),
        (ParallelContext, {"degree": 3, "selection": SelectiveAttention(4)}, "selection (it keeps 4 of 3 pieces)"),
    ],
)
def test_options_without_effect_warn_once(kind, options, sentence):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        kind(**options)
    assert [sentence in str(warning.message) for warning in found] == [True]


def test_what_keeps_every_piece():
    assert [SelectiveAttention(2).keeps_all(count) for count in (1, 2, 3)] == [True, True, False]
    soft = SelectiveAttention(2, soft_temperature=1.0)
    assert [soft.keeps_all(count) for count in (1, 2, 3)] == [True, False, False]


def test_options_do_not_change():
    for options in (SelectiveAttention(), KeepPieces(), TokenEviction(), Calibration(), APE(), ParallelContext()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            options.seed = 1
    assert SelectiveAttention(aggregate=["head", "query"]).aggregate == ("head", "query")
    assert hash(SelectiveAttention(aggregate=["head"])) == hash(SelectiveAttention(aggregate=("head",)))
