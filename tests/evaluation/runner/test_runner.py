"""The runner: every example once, whatever is killed; the same answers in batches, in processes, through the engine."""

import json

import pytest
import torch
from byte_llama import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation.runner import TaskRun, evaluate_task, truncate
from evaluation.tasks import get_task
from evaluation.tasks.base import Example
from patches.parallel_context import Calibration, KeepPieces, ParallelContext, TokenEviction, baseline, split_context

TASK = get_task("longbench/qasper")
FULL = ParallelContext(degree=1, prefix=None)


def example(number, length=60, passages=1):
    texts = tuple(chr(97 + (number + part) % 26) * (length // passages) + f" {number}." for part in range(passages))
    return Example(f"id{number}", "Read. ", texts, f" What is {number}?", (f"{number}",))


EXAMPLES = [example(number, 30 + 7 * number) for number in range(5)]


@pytest.fixture
def run(model, tokenizer, tmp_path):
    def call(patch=FULL, examples=EXAMPLES, folder="out", **options):
        options = {"max_new_tokens": 6} | options
        used = options.pop("model", model)
        return evaluate_task(TASK, patch, used, tokenizer, examples, tmp_path / folder, **options)

    call.folder = tmp_path
    return call


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def texts(folder):
    return [line["prediction"] for line in predictions(folder)]


@pytest.mark.parametrize(
    ("how", "limit", "kept"),
    [
        ("middle", 5, [0, 1, 2, 8, 9]),
        ("middle", 4, [0, 1, 8, 9]),
        ("middle", 1, [0]),
        ("left", 3, [7, 8, 9]),
        ("right", 3, [0, 1, 2]),
        ("none", 3, list(range(10))),
        ("left", None, list(range(10))),
        ("middle", 10, list(range(10))),
    ],
)
def test_truncate(how, limit, kept):
    assert truncate(range(10), limit, how) == kept


def test_truncate_refuses():
    with pytest.raises(ValueError, match="none, middle, left, right"):
        truncate([1], 1, "both")
    with pytest.raises(ValueError, match="at least 1"):
        truncate([1], 0, "left")


def test_what_is_written(run):
    metrics = run()
    lines = predictions(run.folder / "out")
    assert [line["id"] for line in lines] == [e.id for e in EXAMPLES]
    assert set(lines[0]) >= {
        *("id", "task", "prediction", "answers", "scores", "num_pieces", "num_context_tokens"),
        *("num_query_tokens", "seconds"),
    }
    assert lines[1]["num_context_tokens"] == 40 and lines[1]["num_query_tokens"] == len(EXAMPLES[1].query)
    assert metrics["num_examples"] == 5 and metrics["task"] == "longbench/qasper"
    assert metrics["score"] == pytest.approx(sum(line["scores"]["score"] for line in lines) / 5)
    stored = json.loads((run.folder / "out" / "metrics.json").read_text())
    assert stored == metrics and stored["protocol"]["patch"]["degree"] == 1


def test_engine_batches_and_plain_model_agree(run):
    run()
    run(folder="batch", batch_size=3)
    run(None, folder="plain", batch_size=2)
    assert texts(run.folder / "out") == texts(run.folder / "batch") == texts(run.folder / "plain")


POLICIES = [
    ParallelContext(degree=3, prefix="p2", piece_policy=KeepPieces(2)),
    ParallelContext(max_piece_tokens=20, position_mode="ML", eviction=TokenEviction(capacity=6, observation=2)),
]


@pytest.mark.filterwarnings("ignore:the tokenizer has no BOS")
@pytest.mark.parametrize("patch", POLICIES, ids=("keep", "evict"))
@pytest.mark.parametrize("place", ["prefix", "pieces", "query"])
def test_batches_equal_single_examples_under_policies(run, patch, place):
    run(patch, instruction=place)
    run(patch, folder="batch", batch_size=4, instruction=place)
    assert texts(run.folder / "out") == texts(run.folder / "batch")


def test_a_killed_run_repeats_and_loses_nothing(run, monkeypatch):
    seen = []
    original = TaskRun.answer

    def dying(state, engine, batch):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.extend(index for index, _ in batch)
        return original(state, engine, batch)

    monkeypatch.setattr(TaskRun, "answer", dying)
    with pytest.raises(KeyboardInterrupt):
        run()
    journal = run.folder / "out" / "predictions.rank0.jsonl"
    assert not (run.folder / "out" / "metrics.json").exists()
    # Killed while writing: the last line is torn.
    journal.write_bytes(journal.read_bytes()[:-20])
    monkeypatch.setattr(TaskRun, "answer", lambda *args: seen.extend(i for i, _ in args[2]) or original(*args))
    seen.clear()
    run()
    assert seen == [2, 3, 4]
    whole = predictions(run.folder / "out")
    run(folder="other")
    assert [line["prediction"] for line in whole] == texts(run.folder / "other")
    seen.clear()
    run()
    assert seen == []


def test_processes_share_the_examples(run):
    assert run(rank=0, world_size=2) is None
    assert run(rank=1, world_size=2)["num_examples"] == 5
    own = [len((run.folder / "out" / f"predictions.rank{r}.jsonl").read_text().splitlines()) for r in (0, 1)]
    assert own == [3, 2]
    run(folder="one")
    assert texts(run.folder / "out") == texts(run.folder / "one")


def test_folders_are_not_mixed(run):
    run()
    for change in (
        {"patch": ParallelContext(degree=2, prefix=None)},
        {"max_new_tokens": 5},
        {"instruction": "query"},
        {"examples": EXAMPLES[:4]},
        {"model": tiny_llama().double()},
    ):
        with pytest.raises(ValueError, match="belongs to other settings"):
            run(**change)
    run(batch_size=2)
    (run.folder / "foreign").mkdir()
    (run.folder / "foreign" / "predictions.jsonl").write_text("")
    with pytest.raises(ValueError, match="without settings"):
        run(folder="foreign")


def test_teacher_forcing_agrees_with_generation(run, tokenizer, model):
    run(folder="said", max_new_tokens=4)
    said = texts(run.folder / "said")
    asked = [
        Example(e.id, e.instruction, e.passages, e.query + " ", (text if number % 2 else "\u00e9" + text,))
        for number, (e, text) in enumerate(zip(EXAMPLES, said, strict=True))
    ]
    run(folder="again", examples=asked, max_new_tokens=4)
    asked = [
        Example(e.id, e.instruction, e.passages, e.query, (text if number % 2 else "#" + text,))
        for number, (e, text) in enumerate(zip(asked, texts(run.folder / "again"), strict=True))
    ]
    for patch, folder in ((FULL, "forced"), (None, "forced_plain")):
        metrics = run(patch, folder=folder, examples=asked, scoring="teacher_forced", batch_size=2)
        lines = predictions(run.folder / folder)
        clean = [n for n, e in enumerate(asked) if n % 2 and "\ufffd" not in e.answers[0]]
        assert all(lines[number]["scores"]["score"] == 1.0 for number in clean)
        assert [line["scores"]["score"] for line in lines[::2]] == [0.0] * 3
        assert metrics["scores"]["answer_nll"] > 0
    ids = [tokenizer(text)["input_ids"] for text in (TASK.prompt(asked[1]), asked[1].answers[0])]
    with torch.inference_mode():
        logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1].log_softmax(-1)
    expected = -logits.gather(1, torch.tensor(ids[1])[:, None]).sum()
    for folder in ("forced", "forced_plain"):
        assert predictions(run.folder / folder)[1]["scores"]["answer_nll"] == pytest.approx(float(expected), rel=1e-4)


def test_answers_are_not_forced_where_slots_leave_after_the_query(run):
    late = [TokenEviction(capacity=9, stage="query", observation=2), TokenEviction("streaming", capacity=40)]
    with pytest.raises(ValueError, match="pass scoring=generate"):
        run(ParallelContext(degree=1, prefix=None, eviction=late[0]), scoring="teacher_forced")
    with pytest.raises(ValueError, match="pass scoring=generate"):
        run(ParallelContext(degree=1, prefix=None, calibration=Calibration(apply="cache")), scoring="teacher_forced")
    assert run(ParallelContext(degree=1, prefix=None, eviction=late[1]), scoring="teacher_forced")["num_examples"] == 5


@pytest.mark.filterwarnings("ignore:the tokenizer has no BOS")
@pytest.mark.parametrize("name", ["streaming", "snapkv", "h2o", "pyramidkv", "random"])
def test_baselines_read_tasks_in_batches(run, name):
    patch = baseline(name, capacity=20)
    run(patch, examples=EXAMPLES[:2])
    run(patch, examples=EXAMPLES[:2], folder="batch", batch_size=2)
    assert texts(run.folder / "out") == texts(run.folder / "batch")


def test_passages_are_dealt_whole(run):
    many = [example(number, 60, passages=5) for number in range(2)]
    run(ParallelContext(degree=3, prefix=None), examples=many)
    assert [line["num_pieces"] for line in predictions(run.folder / "out")] == [3, 3]
    run(FULL, folder="cut", examples=many, max_context_tokens=40, truncation="left")
    assert [line["num_context_tokens"] for line in predictions(run.folder / "cut")] == [30, 30]


def test_contexts_are_truncated_or_refused(run):
    run(max_context_tokens=20, truncation="middle")
    assert {line["num_context_tokens"] for line in predictions(run.folder / "out")} == {20}
    with pytest.raises(ValueError, match="above the limit of 20: choose truncation"):
        run(folder="refused", max_context_tokens=20)
    run(folder="prompt", max_prompt_tokens=40, truncation="middle")
    taken = len("Read. ") + len(" What is 0?")
    assert {line["num_context_tokens"] for line in predictions(run.folder / "prompt")} == {40 - taken}


def test_windows_leave_room_for_the_query(run):
    patch = ParallelContext(max_piece_tokens=30, prefix=None)
    run(patch, max_prompt_tokens=40, instruction="pieces")
    room = 40 - len("Read. ") - len(" What is 0?")
    for line, one in zip(predictions(run.folder / "out"), EXAMPLES, strict=True):
        assert (
            line["num_pieces"]
            == -(-len(one.passages[0]) // room)
            == len(split_context(range(len(one.passages[0])), line["num_pieces"]))
        )
    with pytest.raises(ValueError, match="leaves none for the context"):
        run(patch, folder="none", max_prompt_tokens=17)


def test_short_contexts_are_read_plainly_and_said(run):
    with pytest.warns(UserWarning, match=r"2 of 5 contexts are no longer than one piece: plain attention"):
        run(ParallelContext(max_piece_tokens=40, prefix=None))


def test_windows_beyond_the_trained_length_are_refused(run):
    short = tiny_llama(32)
    with pytest.raises(ValueError, match="a piece of 30 tokens behind a prefix of 6, but the model takes 32"):
        run(ParallelContext(degree=2, prefix=None), examples=[example(0, 57)], model=short)
    with pytest.warns(UserWarning, match="1 of 1 prompts, up to 50 tokens, are beyond the 32"):
        run(folder="long", examples=EXAMPLES[:1], model=short)


@pytest.mark.parametrize("new_tokens", [8, 9])
def test_answers_beyond_a_table_of_positions_are_refused(run, new_tokens):
    """The last token of an answer is not read any more, so it needs no position."""
    torch.manual_seed(0)
    table = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=57, n_embd=16, n_layer=1, n_head=2)).eval()
    if new_tokens == 8:
        run(None, examples=EXAMPLES[:1], model=table, max_new_tokens=8)
        return
    with pytest.raises(ValueError, match="prompt and answer take 58 positions, but the model has a table of 57"):
        run(None, examples=EXAMPLES[:1], model=table, max_new_tokens=9)


def test_capacity_above_a_window_is_said(run):
    patch = ParallelContext(degree=2, prefix=None, eviction=TokenEviction(capacity=50, observation=2))
    with pytest.warns(UserWarning, match="capacity 50 is not below the longest piece of 31"):
        run(patch)


class ChatTokenizer:
    """The byte tokenizer with a template that strips messages."""

    chat_template = "<u>{}</u><a>"

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __call__(self, *args, **options):
        return self._inner(*args, **options)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return self.chat_template.format(messages[0]["content"].strip())


def test_chat_template_goes_around_the_prompt(tokenizer):
    from evaluation.runner.prompts import PromptMaker, PromptOptions

    one = Example("0", " Read.\n", ("context",), "\nWhat? ", ("x",))
    for place, prefix, pieces, query in (
        ("prefix", "<u>Read.\n", "context", "\nWhat?</u><a>"),
        ("pieces", "<u>", "Read.\ncontext", "\nWhat?</u><a>"),
        ("query", "<u>", "context", "Read.\n\nWhat?</u><a>"),
    ):
        maker = PromptMaker(ChatTokenizer(tokenizer), FULL, PromptOptions(instruction=place), chat=True)
        made = maker.make(one)
        assert [tokenizer.decode(ids) for ids in (made.prefix, made.pieces[0], made.query)] == [prefix, pieces, query]


def test_a_chat_template_is_asked_for_in_vain(run):
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        run(chat_template=True)


def test_only_one_bos():
    from types import SimpleNamespace

    from evaluation.runner.answering import join_prefix

    tokenizer = SimpleNamespace(bos_token_id=1)
    assert join_prefix([1], [1, 5], tokenizer) == [1, 5] == join_prefix([], [1, 5], tokenizer)
    assert join_prefix([1], [5], tokenizer) == [1, 5] and join_prefix([7], [1, 5], tokenizer) == [7, 1, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": []}, "has no examples"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size"),
        ({"scoring": "guess"}, "generate or teacher_forced"),
        ({"truncation": "middle"}, "needs max_context_tokens"),
        ({"instruction": "end"}, "prefix, pieces, query"),
        ({"max_context_tokens": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
