"""The sweep: cells are those of the dense forward, whoever computes them and however often it is killed."""

import csv
import json
import warnings

import pytest
import torch
from parallel_dense import dense_tail
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.cell_journal import CellJournal
from evaluation.loading import load_model
from evaluation.parallel_context.cells import Cell
from evaluation.parallel_context.figure import parallel_curves, redraw
from evaluation.parallel_context.plan import SweepGrid, attention_cost, cut_segments, patch_of, selection_of
from evaluation.parallel_context.sweep import COLUMNS, ParallelSweep
from evaluation.parallel_context.tails import TailCut
from patches.parallel_context import ParallelContext, SelectiveAttention
from preprocess.scored_texts import open_texts
from preprocess.tokenizers import byte_tokenizer

GRID = {"lengths": [24, 40], "degrees": [1, 3], "prefixes": ["none", "p2"], "selections": ["none", "top1"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte model, and a text of three documents, the first too short."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, max_position_embeddings=64, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    texts = ["too short", "the quick brown fox jumps over the lazy dog, " * 2, "pack my box with five dozen jugs " * 2]
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures are drawn where they matter: by the sweep that the fixture `finished` runs, and by `redraw`."""
    monkeypatch.setattr("evaluation.parallel_context.sweep.redraw", lambda output: None)


def sweep(folder, **options):
    texts = open_texts(str(folder / "text.jsonl"), name="three")
    defaults = {"keep_tail": 8, "batch_tokens": 80, "device": "cpu", "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ParallelSweep(str(folder), texts, **(GRID | defaults | options))


def run(folder, output, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sweep(folder, **options).run(output)


def numbers(output):
    rows = json.loads((output / "metrics.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_bytes")} for row in rows]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.parallel_context.sweep.redraw", redraw)
        run(folder, output)
    return output


def test_every_cell_is_the_dense_forward(folder, finished):
    model, tokenizer = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu")), byte_tokenizer()
    documents = list(open_texts(str(folder / "text.jsonl"))[0].documents(tokenizer))
    rows = [row for row in numbers(finished) if row["selection"] == "none"]
    assert len(rows) == 8
    for row in rows:
        length, cut = row["length"], TailCut(8)
        segments = [d[i : i + length] for d in documents for i in range(0, len(d) - length + 1, length)]
        prefix = [] if row["prefix"] == "none" else [10, 10]
        pieces = [ParallelContext(degree=row["degree"]).split(cut.cut(segment)[0]) for segment in segments]
        found = [
            dense_tail(model, prefix, parts, cut.cut(segment)[1], keep_tail=8)
            for parts, segment in zip(pieces, segments, strict=True)
        ]
        nll_sum, num_targets, entropy_sum = (sum(column) for column in zip(*found, strict=True))
        assert row["nll_sum"] == pytest.approx(nll_sum, rel=3e-5) and row["num_targets"] == num_targets
        assert row["entropy"] == pytest.approx(entropy_sum / num_targets, rel=3e-5)
        assert row["num_segments"] == len(segments) and row["data"] == "three"


def test_files_and_settings(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("cells", "metrics.json", "rows.csv", "predictions.jsonl", "figure.png", "figure.pdf")
    }
    with (finished / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 16
    cells = {(row["length"], row["degree"], row["prefix"], row["selection"]): row for row in rows}
    assert cells["40", "1", "none", "top1"]["nll_sum"] == cells["40", "1", "none", "none"]["nll_sum"]
    assert cells["40", "3", "p2", "top1"]["nll_sum"] != cells["40", "3", "p2", "none"]["nll_sum"]
    assert float(cells["40", "1", "none", "none"]["attention_cost"]) == 1
    # 31 context tokens in pieces of 11, 11 and 9
    assert float(cells["40", "3", "none", "none"]["attention_cost"]) == pytest.approx((66 + 66 + 45) / 496)
    protocol = json.loads((finished / "metrics.json").read_text())["protocol"]
    assert protocol["keep_tail"] == 8 and protocol["versions"]["torch"] and protocol["texts"]
    segments = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    for row in numbers(finished):
        mine = [
            s for s in segments if all(s[name] == row[name] for name in ("length", "degree", "prefix", "selection"))
        ]
        assert sum(s["nll_sum"] for s in mine) == pytest.approx(row["nll_sum"], rel=1e-12)
        assert [s["segment"] for s in mine] == list(range(row["num_segments"]))


def test_a_killed_sweep_goes_on_to_the_same_numbers_and_seconds(folder, finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    whole, calls = CellJournal.append, []

    def append(journal, line):
        calls.append(line)
        whole(journal, line)
        if len(calls) == 7:
            with journal.path.open("ab") as file:
                file.write(b'{"nll_sum": [1.0, 2')  # the line that it was writing
            raise Killed

    monkeypatch.setattr(CellJournal, "append", append)
    with pytest.raises(Killed):
        run(folder, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr(CellJournal, "append", lambda journal, line: (calls.append(line), whole(journal, line)))
    run(folder, tmp_path)
    assert numbers(tmp_path) == numbers(finished)
    done = sum(len(path.read_bytes().splitlines()) for path in (finished / "cells").iterdir())
    assert len(calls) == done
    before = (tmp_path / "rows.csv").read_bytes()
    monkeypatch.setattr(Cell, "measure", None)  # nothing is measured again
    run(folder, tmp_path)
    assert (tmp_path / "rows.csv").read_bytes() == before


def test_processes_share_the_cells(folder, finished, tmp_path, monkeypatch):
    held = next((finished / "cells").iterdir()).name
    journal = CellJournal(tmp_path / "cells" / held)
    with journal.held(wait=False) as mine, journal.held(wait=False) as other:
        assert mine and not other
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(folder, tmp_path) is None  # the cell that another process holds is left to it
    assert not journal.lines() and not (tmp_path / "metrics.json").exists()
    assert len(list((tmp_path / "cells").iterdir())) == len(list((finished / "cells").iterdir()))
    monkeypatch.setenv("RANK", "0")
    assert "rows" in run(folder, tmp_path)
    assert numbers(tmp_path) == numbers(finished)


def test_a_changed_option_never_meets_old_numbers(folder, finished, tmp_path):
    one = {"lengths": [24], "degrees": [3], "prefixes": ["none"], "selections": ["none"]}
    first = run(folder, tmp_path, **one)["rows"][0]
    shifted = run(folder, tmp_path, **one, patch=ParallelContext(position_mode="order"))["rows"][0]
    fewer = run(folder, tmp_path, **one, max_documents=1)["rows"][0]
    assert first["nll_sum"] != shifted["nll_sum"] and fewer["num_segments"] < first["num_segments"]
    assert len(list((tmp_path / "cells").iterdir())) == 3


def test_the_figure_needs_nothing_but_the_table(finished, tmp_path):
    (tmp_path / "rows.csv").write_bytes((finished / "rows.csv").read_bytes())
    redraw(tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 20_000 and (tmp_path / "figure.pdf").is_file()
    with (tmp_path / "rows.csv").open() as file:
        curves = parallel_curves(list(csv.DictReader(file)))
    assert len(curves) == 8
    assert [point[0] for point in curves[folder_name(curves), "three", "40", "p2", "top1"]] == [1, 3]
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not that of a sweep"):
        redraw(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no rows\.csv"):
        redraw(tmp_path / "nowhere")


def folder_name(curves):
    return next(iter(curves))[0]


def test_segments_come_from_the_first_documents_that_are_long_enough():
    read = []

    def documents():
        for start, length in ((0, 5), (10, 9), (30, 4), (40, 8), (60, 20)):
            read.append(start)
            yield list(range(start, start + length))

    found = cut_segments(documents(), [4, 8], max_documents=2)
    assert found[4].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert found[8].tolist() == [list(range(10, 18)), list(range(40, 48))]
    assert read == [0, 10, 30, 40]
    assert attention_cost([[1, 2], [3]], 3) == pytest.approx(8 / 12)


def test_names_of_selections():
    assert selection_of("none") is None and selection_of("top3") == SelectiveAttention(top_k=3)
    assert selection_of("soft0.5") == SelectiveAttention(soft_temperature=0.5)
    base = ParallelContext(selection=SelectiveAttention(score_top_k=7, aggregate=("head",)), position_mode="ML")
    grid = SweepGrid([64], [4], ["none", "a text"], ["none", "top2", "top4", "soft0.5"])
    patches = [patch_of(setting, base) for setting in grid.cells()]
    assert [patch.prefix for patch in patches] == [None] * 4 + ["a text"] * 4
    assert patches[0].selection is None and patches[2].selection is None  # the best four of four
    assert patches[1].selection == SelectiveAttention(top_k=2, score_top_k=7, aggregate=("head",))
    assert patches[3].selection.soft_temperature == 0.5 and {patch.position_mode for patch in patches} == {"ML"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"degrees": [1, 16]},
            "more pieces than there are tokens: a length of 24 has a context of 15",
        ),
        ({"degrees": [0]}, "degrees must be at least 1"),
        ({"degrees": [2, 2]}, "degrees must be different"),
        ({"lengths": []}, "lengths must be different values, at least one"),
        ({"lengths": [9]}, "a length of 9 has no context before its last 9 tokens"),
        ({"selections": ["best2"]}, "topN or softT"),
        ({"selections": ["top0"]}, "topN or softT"),
        ({"keep_tail": 0}, "keep_tail must be at least 1"),
        ({"max_documents": 0}, "max_documents must be at least 1"),
        ({"dtype": "int8"}, "dtype is one of"),
        ({"patch": ParallelContext(degree=3)}, r"pass degrees=\[...\] instead"),
        ({"models": None}, r"model\.path is required"),
    ],
)
def test_refusals(folder, options, sentence):
    options = dict(options)
    models = options.pop("models", str(folder))
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match=sentence):
        ParallelSweep(models, [], **(GRID | {"keep_tail": 8, "device": "cpu"} | options))


def test_texts_and_models_that_do_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="three has no document of 95 tokens"):
        run(folder, tmp_path, lengths=[95], degrees=[4])
    with pytest.raises(ValueError, match="length 90 at degree 1 has a piece of 81 tokens behind a prefix"):
        run(folder, tmp_path, lengths=[90])
    with pytest.warns(UserWarning, match="made for 64 positions, and 1 settings use more"):
        sweep(folder, lengths=[80], degrees=[2], prefixes=["none"], keep_tail=50).run(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no model folder"):
        ParallelSweep(str(tmp_path), [], **GRID, keep_tail=8)
    with pytest.warns(UserWarning, match="selection top1 has no effect at degree 1: equal to none"):
        ParallelSweep(str(folder), [], **GRID, keep_tail=8, device="cpu")
