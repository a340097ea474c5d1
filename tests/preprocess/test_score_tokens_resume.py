"""Killed, torn, shared out or repeated: the scores are the same bytes, and intact ones are not made again."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from score_cases import QUIET, SCHEDULE, report, save_llama, save_sequences, score, shard_bytes

from datamodules.corpus_format import canonical_json
from datamodules.score_store import FORMAT, VERSION, ScoreStore
from datamodules.sequence_store import SequenceStore
from preprocess import score_job, score_shards
from preprocess.score_shards import claim_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    return save_sequences(tmp_path_factory.mktemp("sequences") / "store", seed=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, sequences):
    folder = tmp_path_factory.mktemp("whole") / "scores"
    assert score(sequences, model, folder) == 0
    assert len(shard_bytes(folder)) == 5
    return folder


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_partial_run_goes_on_without_rewriting(model, sequences, whole, tmp_path, capsys):
    folder = tmp_path / "scores"
    assert score(sequences, model, folder, "--limit-shards", 2) == 0
    assert "3 left by --limit-shards" in capsys.readouterr().out
    before = times(folder)
    assert sorted(shard_bytes(folder)) == ["shard-000000.npy", "shard-000001.npy"]
    assert report(sequences, folder, "--verify") == 1
    assert "missing shards 2, 3, 4 of 5" in capsys.readouterr().out
    assert report(sequences, folder, "--status") == 0
    assert "2 of 5 shards committed, 8 of 19 sequences" in capsys.readouterr().out
    with pytest.raises(ValueError, match="missing shards 2, 3, 4 of 5"):
        ScoreStore(folder, SequenceStore(sequences))
    assert score(sequences, model, folder) == 0
    assert "2 were there" in capsys.readouterr().out
    assert shard_bytes(folder) == shard_bytes(whole)
    assert before.items() <= times(folder).items()
    assert report(sequences, folder, "--verify") == 0


def test_a_finished_folder_is_recognised_without_loading_the_model(model, sequences, whole, monkeypatch, capsys):
    before = times(whole)
    monkeypatch.setattr(score_job, "load_scorer", lambda *arguments: pytest.fail("loaded the model"))
    assert score(sequences, model, whole) == 0
    assert "nothing to make" in capsys.readouterr().out and times(whole) == before


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_ranks_makes_the_same_bytes(model, sequences, whole, tmp_path, world_size, monkeypatch):
    folder = tmp_path / "scores"
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        before = set(shard_bytes(folder))
        assert score(sequences, model, folder) == 0
        made = {int(name[6:12]) for name in set(shard_bytes(folder)) - before}
        assert made == set(range(rank, 5, world_size))
    assert shard_bytes(folder) == shard_bytes(whole)
    assert (folder / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_options_win_over_what_the_launcher_says(model, sequences, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert score(sequences, model, tmp_path / "scores", "--rank", 1, "--world-size", 4) == 0
    assert sorted(shard_bytes(tmp_path / "scores")) == ["shard-000001.npy"]


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.mark.parametrize("step", range(8))
def test_a_kill_at_any_step_of_writing_leaves_nothing_wrong(model, sequences, whole, tmp_path, monkeypatch, step):
    """Writing a file is: write, sync, rename, sync the folder. Two files make a shard, after the manifest."""
    folder, calls, sync = tmp_path / "scores", [], os.fsync

    def kill(descriptor):
        calls.append(descriptor)
        if len(calls) > step + 2:
            raise Killed
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(score_shards.os, "fsync", kill)
        with pytest.raises(Killed):
            score(sequences, model, folder)
    committed = {path.name[6:12] for path in folder.glob("shard-*.json")}
    assert len(committed) == (step + 1) // 4
    for name, content in shard_bytes(folder).items():
        assert content == shard_bytes(whole)[name]
    leftovers = list(folder.glob(".*"))
    assert len(leftovers) == (step % 2 == 0)
    assert report(sequences, folder, "--verify") == 1
    assert score(sequences, model, folder) == 0
    assert shard_bytes(folder) == shard_bytes(whole) and not list(folder.glob(".*"))


def test_damaged_shards_are_found_and_made_again_with_the_same_bytes(model, sequences, whole, tmp_path, capsys):
    folder = tmp_path / "scores"
    assert score(sequences, model, folder) == 0
    files = {k: folder / f"shard-{k:06d}.npy" for k in range(5)}
    content = bytearray(files[0].read_bytes())
    content[-3] ^= 1
    files[0].write_bytes(content)  # flipped
    files[1].write_bytes(files[1].read_bytes()[:-1])  # torn
    (folder / "shard-000002.json").unlink()  # not committed
    (folder / "shard-000003.json").write_bytes((folder / "shard-000003.json").read_bytes()[:-5])  # torn record
    capsys.readouterr()
    assert report(sequences, folder, "--verify") == 1
    found = capsys.readouterr().out
    assert "missing shards 2, 3 of 5; torn shards 1 of 5; corrupt shards 0 of 5" in found and "1 of 5 shards" in found
    before = times(folder)
    assert score(sequences, model, folder) == 0
    assert shard_bytes(folder) == shard_bytes(whole)
    kept = {"manifest.json", "shard-000004.npy", "shard-000004.json"}
    assert {name for name, time in times(folder).items() if before.get(name) == time} == kept
    files[4].unlink()
    assert report(sequences, folder, "--verify") == 1 and "missing shards 4 of 5" in capsys.readouterr().out


def test_a_record_of_other_scores_does_not_count(model, sequences, whole, tmp_path, capsys):
    folder = tmp_path / "scores"
    assert score(sequences, model, folder) == 0
    record = folder / "shard-000001.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"manifest_id": "0" * 64}))
    assert report(sequences, folder, "--verify") == 1 and "missing shards 1 of 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--base-stride", 4], ["schedule.base_stride is 5 there and 4 here"]),
        (["--base-length", 9, "--tail", "short"], ["schedule.base_length is 8", 'schedule.tail is "align" there']),
        (["--no-first-window"], ["schedule.first_window is true there and false here"]),
        (["--bos", "none"], ['schedule.bos is "replace"', "schedule.bos_token_id is 1 there and null here"]),
        (["--rope-theta", 5000], ["rope_theta is null there and 5000.0", "rope_parameters.rope_theta is 10000.0"]),
        (["--dtype", "bfloat16"], ['dtype is "float32" there and "bfloat16" here']),
        (["--attention", "eager"], ['attention is "sdpa" there and "eager" here']),
        (["--shard-size", 8], ["shard_size is 4 there and 8 here"]),
    ],
)
def test_other_options_are_refused_and_change_nothing(model, sequences, whole, capsys, options, names):
    before = times(whole)
    assert score(sequences, model, whole, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(name in error for name in names)
    assert times(whole) == before


def test_another_model_and_other_sequences_are_refused(model, sequences, whole, tmp_path, capsys):
    before = times(whole)
    other = save_llama(tmp_path / "other", seed=5)
    assert score(sequences, other, whole) == 2
    assert "model.weights is" in capsys.readouterr().err
    elsewhere = save_sequences(tmp_path / "elsewhere", seed=2)
    ids = SequenceStore(sequences).store_id, SequenceStore(elsewhere).store_id
    assert score(elsewhere, model, whole) == 2
    error = capsys.readouterr().err
    assert "sequences is" in error and all(store_id in error for store_id in ids)
    for option in ("--verify", "--status"):
        assert report(elsewhere, whole, option) == 2
        assert all(store_id in capsys.readouterr().err for store_id in [ids[0]])
    with pytest.raises(ValueError, match=ids[0]) as caught:
        ScoreStore(whole, SequenceStore(elsewhere))
    assert ids[1] in str(caught.value)
    assert times(whole) == before


@pytest.mark.parametrize("winner", [{"a": 1}, {"a": 2}])
def test_the_first_of_two_ranks_writes_the_manifest(tmp_path, monkeypatch, winner):
    """The other one comes between the look and the writing."""
    manifest, write = {"format": FORMAT, "version": VERSION, "a": 1}, score_shards._write_temporary
    content = canonical_json(manifest | winner).encode()

    def overtaken(path, own):
        (tmp_path / "manifest.json").write_bytes(content)
        return write(path, own)

    monkeypatch.setattr(score_shards, "_write_temporary", overtaken)
    if winner == {"a": 1}:
        assert claim_folder(tmp_path, manifest) == hashlib.sha256(content).hexdigest()
    else:
        with pytest.raises(ValueError, match="a is 2 there and 1 here"):
            claim_folder(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


KILLER = """
import os, signal, sys
from preprocess import score_job, score_tokens
from preprocess.command import run_command
write, written = score_job.write_shard, []
def kill_inside(*arguments, **options):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(*arguments, **options))
score_job.write_shard = kill_inside
sys.exit(run_command(score_tokens.main, sys.argv[1:]))
"""


def test_a_killed_process_is_continued(model, sequences, whole, tmp_path):
    folder = tmp_path / "scores"
    arguments = ["--sequences", sequences, "--model", model, "--output", folder, *SCHEDULE, *QUIET]
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, *map(str, arguments)], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = times(folder)
    assert sorted(shard_bytes(folder)) == ["shard-000000.npy", "shard-000001.npy"]
    assert score(sequences, model, folder) == 0
    assert shard_bytes(folder) == shard_bytes(whole) and before.items() <= times(folder).items()
