"""Tasks as users run them: one command per method, one table; what is wrong is one sentence."""

import json

import pytest
import torch
import yaml
from byte_llama import tiny_llama

from configuration.check import check
from configuration.compose import RECIPES as COMPOSED
from configuration.compose import compose, recipe_names
from configuration.errors import exit_with_sentence
from configuration.targets import build
from evaluation.suite.column import changed_patch
from evaluation.suite.report import cost_table, score_table
from evaluation.suite.sources import GeneratedTasks, TaskFiles, read_essay
from evaluation.suite.task import TaskSuite
from evaluation.weights import check_quantization, quantization_config
from patches.parallel_context import KeepPieces, ParallelContext

PLAIN = ("longbench", "infinitebench", "helmet", "ruler", "ruler_files")
KINDS = ("recent", "middle", "all")
RECIPES = [
    name
    for name in recipe_names("eval")
    if any(family in name for family in ("bench", "helmet", "ruler")) and not name.endswith(KINDS)
]


@pytest.fixture
def suite(tokenizer):
    def make(source=None, **options):
        source = source or GeneratedTasks(["passkey"], [400, 500], num_examples=1)
        return TaskSuite(tiny_llama, source, tokenizer=tokenizer, device="cpu", **{"max_new_tokens": 4} | options)

    return make


def test_methods_meet_in_one_table(suite, tmp_path):
    suite().run(tmp_path)
    result = suite(patch=ParallelContext(degree=2, prefix=None), label="two").run(tmp_path)
    result = suite(method="full").run(tmp_path)
    assert {row["method"] for row in result["results"]} == {"full", "plain", "two"}
    assert [row["length"] for row in result["results"]] == [400, 500] * 3
    header, first = (line.split() for line in (result["table"].splitlines()[0], result["table"].splitlines()[2]))
    assert header == ["task", "length", "full", "plain", "two"] and first[:2] == ["ruler/passkey", "400"]
    assert "| ruler/passkey | 500 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "rows.csv").read_text().startswith("method,task,length,num_examples,score,")
    for name in ("score_by_length.png", "needle_plain.png", "needle_two.png", "metrics.json", "plain/versions.json"):
        assert (tmp_path / name).stat().st_size > 50
    assert json.loads((tmp_path / "two/ruler_passkey_400/metrics.json").read_text())["protocol"]["patch"]["degree"] == 2


def test_windows_and_rotary_scaling_are_columns(suite, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    source = GeneratedTasks(["passkey"], [400], num_examples=1)
    scaled = suite(source, rope=yarn)
    scaled.run(tmp_path)
    assert scaled.weights.load(scaled.model).config.max_position_embeddings == 4 * 4096  # once, however often it is run
    result = suite(source, method="pcw", max_piece_tokens=90).run(tmp_path)
    result = suite(source, method="ape", degree=3, rope={"rope_type": "ntk", "factor": 2}).run(tmp_path)
    assert {row["method"] for row in result["results"]} == {"plain_yarn4", "pcw_90", "ape_degree3_ntk2"}
    protocol = json.loads((tmp_path / "plain_yarn4/ruler_passkey_400/metrics.json").read_text())["protocol"]
    assert protocol["rope"] == yarn
    for other in (None, yarn | {"factor": 8.0}):
        with pytest.raises(ValueError, match=r"other settings \(.*rope"):
            suite(source, rope=other, label="plain_yarn4").run(tmp_path)


def test_the_mean_is_over_what_all_methods_have():
    rows = [
        {"method": "a", "task": "x", "length": None, "score": 10.0},
        {"method": "a", "task": "y", "length": None, "score": 20.0},
        {"method": "b", "task": "x", "length": None, "score": 30.0},
        {"method": "b", "task": "y", "length": None, "score": 50.0},
        {"method": "a", "task": "z", "length": None, "score": 99.0},
    ]
    table, columns = score_table(rows)
    assert columns == ["task", "a", "b"] and table[-1] == {"task": "mean of 2", "length": None, "a": 15.0, "b": 40.0}


def test_tasks_from_files(suite, tmp_path):
    record = {"input": "?", "context": "word " * 30, "answers": ["a"]}
    (tmp_path / "qasper.jsonl").write_text((json.dumps(record) + "\n") * 3)
    source = TaskFiles("longbench", str(tmp_path), tasks=["qasper"], limit=2)
    result = suite(source).run(tmp_path / "out")
    assert [(row["task"], row["num_examples"]) for row in result["results"]] == [("longbench/qasper", 2)]


def test_one_column_holds_one_kind_of_prompts(suite, tmp_path):
    record = {"input": "?", "context": "word " * 30, "answers": ["a"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record) + "\n")
    one, other = (TaskFiles(name, str(tmp_path), tasks=["qasper"]) for name in ("longbench", "longbench_parallelcomp"))
    suite(one, label="mine").run(tmp_path / "out")
    with pytest.raises(ValueError, match="longbench_parallelcomp_qasper and longbench_qasper, one set with two"):
        suite(other, label="mine").run(tmp_path / "out")
    assert len(suite(other, label="theirs").run(tmp_path / "out")["results"]) == 2


def test_costs_are_means_over_examples():
    row = {"method": "a", "length": None, "answer_nll": None, "peak_bytes": None, "prefill_seconds_per_example": 1.0}
    small = row | {"num_examples": 1, "score": 100.0, "seconds_per_example": 8.0}
    large = row | {"num_examples": 3, "score": 0.0, "seconds_per_example": 4.0, "prefill_seconds_per_example": 3.0}
    (found,) = cost_table([small, large])
    assert (found["seconds"], found["prefill_seconds"], found["answer_nll"]) == (5.0, 2.5, None)
    assert found["score"] == 50.0  # over sets, as in the table of scores


def test_single_tasks_change_the_patch():
    patch = ParallelContext(max_piece_tokens=50, piece_policy=KeepPieces(3))
    changed = changed_patch(patch, {"piece_policy.keep": 1, "max_piece_tokens": 20})
    assert changed.piece_policy.keep == 1 and changed.max_piece_tokens == 20 and patch.piece_policy.keep == 3
    with pytest.raises(ValueError, match=r"no option piece_policy\.kept"):
        changed_patch(patch, {"piece_policy.kept": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full", "patch": ParallelContext(degree=2)}, "is a patch of its own"),
        ({"capacity": 3}, "capacity belongs to a method"),
        ({"degree": 3}, "degree belongs to a method: pass method=pcw"),
        ({"method": "pcw"}, "pcw needs degree or max_piece_tokens"),
        ({"method": "snapkv", "capacity": 3, "degree": 2}, "belong to pcw and ape"),
        ({"rope": {"rope_type": "selfextend", "factor": 2}}, "one of ntk, dynamic, yarn"),
        ({"rope": {"rope_type": "dynamic", "factor": 2.0}, "batch_size": 2}, "pass batch_size=1, got 2"),
        ({"method": "snapkv"}, "capacity"),
        ({"label": "a/b"}, "label names a folder"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"task_patches": {"vt": {"degree": 2}}}, "there is none"),
        ({"quantization": "int8"}, r"pip install|CUDA"),
        ({"truncation": "left"}, "needs max_context_tokens"),
    ],
)
def test_options_that_cannot_be(suite, options, message):
    with pytest.raises(ValueError, match=message):
        suite(**options)


def test_a_chat_template_is_asked_for_in_vain_before_the_model_is_loaded(tokenizer, tmp_path):
    source = GeneratedTasks(["passkey"], [400], num_examples=1)
    suite = TaskSuite(pytest.fail, source, tokenizer=tokenizer, chat_template=True)
    with pytest.raises(ValueError, match=r"tokenizer of random has no chat template"):
        suite.run(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["passky"], [400]), "did you mean 'ruler/passkey'"),
        ((["vt", "vt"], [400]), "tasks must differ"),
        ((["vt"], []), "lengths must be different numbers"),
        ((["vt"], [5, 5]), "lengths must be different numbers"),
        ((["niah_single_2"], [400]), "pass data.essay=FILE"),
        ((["qa"], [400]), "needs data.qa=FILE"),
        ((["qa_1"], [400]), "read from published files"),
    ],
)
def test_sources_refuse_what_they_cannot_make(arguments, message):
    with pytest.raises(ValueError, match=message):
        GeneratedTasks(*arguments)


def test_files_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.essay=.*nothing.txt does not exist"):
        GeneratedTasks(["vt"], [400], essay=str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match=r"data\.path is required"):
        TaskFiles("longbench", None)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        TaskFiles("longbench", "x", limit=0)
    with pytest.raises(ValueError, match=r"longbench/lcc come in one file.*leave lengths out"):
        TaskFiles("longbench", "x", tasks=["lcc"], lengths=[8192])
    with pytest.raises(ValueError, match="is one file, but there are 2 lengths"):
        TaskFiles("helmet", __file__, tasks=["json_kv"], lengths=[8192, 16384])


def test_essays(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    parquet.write_table(pa.table({"text": ["three", "four"]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"other": ["three"]}), tmp_path / "b.parquet")
    assert read_essay(str(tmp_path / "a.txt")) == "plain text"
    assert read_essay(str(tmp_path / "a.jsonl")) == "one\ntwo"
    assert read_essay(str(tmp_path / "a.parquet"), limit=7) == "three\nfo"
    with pytest.raises(ValueError, match="no column text; it has other"):
        read_essay(str(tmp_path / "b.parquet"))
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match="holds no text"):
        read_essay(str(tmp_path / "a.txt"))
    source = GeneratedTasks(["recall_single"], [300], essay=str(tmp_path / "a.jsonl"), num_examples=1)
    (cell,) = source.cells()
    assert (
        "secret number" in source.examples(cell, lambda text, add_special_tokens: {"input_ids": text.split()})[0].query
    )


def test_quantization_is_passed_through(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: object() if name in ("bitsandbytes", "accelerate") else found(name),
    )
    check_quantization("int4", "bitsandbytes", torch.device("cuda", 0))
    with pytest.raises(ValueError, match="CUDA devices"):
        check_quantization("int8", "bitsandbytes", torch.device("cpu"))
    monkeypatch.setattr("transformers.BitsAndBytesConfig.post_init", lambda self: None)
    config = quantization_config("int4", "bitsandbytes", torch.bfloat16)
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert (
        config.bnb_4bit_compute_dtype == torch.bfloat16
        and quantization_config("int8", "bitsandbytes", torch.float16).load_in_8bit
    )
    with pytest.raises(ValueError, match="null, int8 or int4"):
        check_quantization("int2", "bitsandbytes", torch.device("cpu"))
    with pytest.raises(ValueError, match="bitsandbytes, torchao"):
        check_quantization("int4", "other", torch.device("cpu"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_and_builds(name):
    required = [] if name in ("ruler", "ruler_parallel_context") else ["data.path=."]
    config = compose([f"recipe={name}", "model.path=hub:some/model", *required], command="eval")
    check(config)
    suite = build(config["task"])
    assert suite.source.cells() and (suite.column.patch is None) == (name in PLAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_calibrations_differ_in_their_region_alone(kind):
    sink, other = (
        yaml.safe_load((COMPOSED / f"parallelcomp_llama2_longbench_calibrated_{name}.yaml").read_text())
        for name in ("sink", kind)
    )
    assert other["name"].endswith(kind) and other["label"] == f"calibrated_{kind}"
    assert other["patch"].pop("calibration") == {"kind": kind} and sink["patch"].pop("calibration") == {"kind": "sink"}
    assert {**other, "name": "", "label": ""} == {**sink, "name": "", "label": ""}


def test_the_command(monkeypatch, capsys, tmp_path):
    import eval as command

    def call(*arguments):
        status = 0
        try:
            with exit_with_sentence(arguments):
                command.main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    common = ["recipe=ruler", "scale=tiny", "tasks=[passkey]", "lengths=[400]"]
    status, said = call(*common, "patch=parallel_context", "patch.degree=3", "task.max_new_tokens=2", "label=three")
    assert status == 0 and said.out.splitlines()[2].split()[:2] == ["ruler/passkey", "400"]
    assert (tmp_path / "runs/ruler_tiny/three/ruler_passkey_400/predictions.jsonl").is_file()
    for arguments, sentence in (
        (["tasks=[nothing]", "model.quantization=int3"], "int8"),
        (["lengths=[100]"], "100 tokens are too few"),
    ):
        status, said = call(*common, *arguments)
        assert status == 2 and sentence in said.err and "Traceback" not in said.err, said.err


def test_the_figures_survive_missing_depths(tmp_path):
    from evaluation.suite.report import write_report

    folder = tmp_path / "a" / "helmet_json_kv_4096"
    folder.mkdir(parents=True)
    metrics = {"task": "helmet/json_kv", "num_examples": 1, "score": 0.5, "scores": {"score": 0.5}, "seconds": 1.0}
    (folder / "metrics.json").write_text(
        json.dumps(metrics | {"prefill_seconds": None, "peak_bytes": None, "protocol": {}})
    )
    (folder / "predictions.jsonl").write_text(json.dumps({"scores": {"score": 0.5}, "num_context_tokens": 70}) + "\n")
    report = write_report(tmp_path)
    assert report["results"][0]["length"] == 4096 and not list(tmp_path.glob("needle*"))
