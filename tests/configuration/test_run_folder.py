"""Starting, resuming and refusing runs."""

import json
import warnings

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoint import AtomicCheckpointIO, checkpoint_step, newest_checkpoint
from configuration.compose import Composed
from configuration.run_folder import differences, open_run, other_owner, read_config, versions, write_start


@pytest.fixture
def config(tmp_path):
    return {
        "recipe": "r",
        "output": str(tmp_path / "run"),
        "resume": "auto",
        "seed": 1,
        "model": {"config": {"hidden_size": 8}},
        "data": {"path": "x", "num_workers": 0, "max_steps": 10, "batch_size": 4},
        "trainer": {
            "devices": 1,
            "accelerator": "cpu",
            "max_steps": 10,
            "accumulate_grad_batches": 1,
            "precision": "32-true",
            "gradient_clip_val": 1.0,
        },
    }


def save(folder, step):
    path = folder / "checkpoints" / f"step_{step}.ckpt"
    state = {"global_step": step, "state_dict": {"w": torch.ones(3)}, "model_config": "{}"}
    AtomicCheckpointIO().save_checkpoint(state, path)
    return path


def test_a_new_folder_starts_and_a_started_one_resumes_from_the_newest(config, tmp_path):
    folder, checkpoint = open_run(config)
    assert checkpoint is None and not folder.exists()
    write_start(folder, config)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    assert json.loads((folder / "versions.json").read_text()) == versions()
    assert versions()["torch"] == torch.__version__
    save(folder, 9)
    newest = save(folder, 10)
    (folder / "checkpoints" / "step_11.ckpt.part").write_bytes(b"half")
    assert open_run(config) == (folder, newest)
    assert checkpoint_step(newest) == 10 and checkpoint_step("x/other.ckpt") is None


def test_a_run_that_took_no_step_binds_nobody(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    assert open_run({**config, "seed": 2}) == (folder, None)


def test_other_options_refuse_and_free_ones_do_not(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    (folder / "train.jsonl").touch()
    config["model"]["config"]["hidden_size"] = 16
    with pytest.raises(ValueError, match=r"model.config.hidden_size: 8 -> 16"):
        open_run(config)
    config["model"]["config"]["hidden_size"] = 8
    config["data"]["num_workers"] = 4
    config["trainer"]["max_steps"] = config["data"]["max_steps"] = 50
    assert open_run(config)[0] == folder
    config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"] = 2, 2
    config["sequences_per_step"] = 4
    assert open_run(config)[0] == folder
    config["sequences_per_step"] = 8
    with pytest.raises(ValueError, match="sequences_per_step: 4 -> 8"):
        open_run(config)


def test_resume_false_never_overwrites(config):
    folder, _ = open_run({**config, "resume": False})
    write_start(folder, config)
    save(folder, 1)
    with pytest.raises(FileExistsError, match="already holds a run"):
        open_run({**config, "resume": False})


def test_a_damaged_newest_checkpoint_is_named(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    save(folder, 1)
    whole = save(folder, 2)
    content = whole.read_bytes()
    whole.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"step_2\.ckpt is damaged"):
        open_run(config)
    place = content.index(torch.ones(3).numpy().tobytes())
    whole.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(ValueError, match=r"step_2\.ckpt is damaged"):
        open_run(config)
    assert newest_checkpoint(folder / "nowhere") is None


def test_differences_name_the_keys():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == ["a.c: 2 -> None", "a.d: None -> 3"]


def test_an_older_checkpoint_does_not_resume_over_later_ones(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    older, newer = save(folder, 3), save(folder, 6)
    with pytest.raises(FileExistsError, match=r"step_6\.ckpt, later than step_3\.ckpt"):
        open_run({**config, "resume": str(older)})
    assert open_run({**config, "resume": str(newer)}) == (folder, newer)
    branch = {**config, "resume": str(older), "output": str(folder) + "_branch"}
    assert open_run(branch)[1] == older


def test_only_the_first_process_decides(config, monkeypatch):
    folder, _ = open_run(config)
    write_start(folder, config)
    save(folder, 1)
    with pytest.raises(FileExistsError):
        open_run({**config, "resume": False})
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert open_run({**config, "resume": False}) == (folder, None)


def test_a_run_folder_stands_for_its_newest_checkpoint(config, tmp_path):
    folder, _ = open_run(config)
    write_start(folder, config)
    branch = {**config, "resume": str(folder), "output": str(tmp_path / "branch")}
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        open_run(branch)
    save(folder, 4)
    newest = save(folder, 10)
    assert open_run(branch) == (tmp_path / "branch", newest)
    with pytest.raises(FileNotFoundError, match="no run folder and no checkpoint file"):
        open_run({**branch, "resume": str(tmp_path)})


def test_no_fewer_steps_than_the_checkpoint_has(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    checkpoint = save(folder, 10)
    config["trainer"]["max_steps"] = 9
    for resume in ("auto", str(checkpoint)):
        with pytest.raises(ValueError, match=r"step_10.ckpt is of step 10: pass trainer.max_steps=10 or more, got 9"):
            open_run({**config, "resume": resume})


@pytest.mark.parametrize("content", [b"hello", {"a": 1}, torch.nn.Linear(1, 1)])
def test_a_foreign_file_is_no_checkpoint(config, tmp_path, content):
    foreign = tmp_path / "foreign.ckpt"
    if isinstance(content, bytes):
        foreign.write_bytes(content)
    else:
        torch.save(content, foreign)
    with pytest.raises(ValueError, match="is no checkpoint of a training run"):
        open_run({**config, "resume": str(foreign)})


def test_a_branch_with_other_options_says_which(config, tmp_path):
    folder, _ = open_run(config)
    write_start(folder, config)
    checkpoint = save(folder, 3)
    branch = {**config, "resume": str(checkpoint), "output": str(tmp_path / "branch")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_run(branch)
    before_nan = checkpoint.rename(folder / "nan_step_3.ckpt")
    for chosen in (save(folder, 3), before_nan):
        with pytest.warns(UserWarning, match=r"other options; now in force: seed: 1 -> 2$"):
            open_run({**branch, "seed": 2, "resume": str(chosen)})


def test_an_option_and_its_copies_are_one_difference(config):
    composed = Composed({**config, "module": {"seed": 1}}, {"module.seed": "seed"})
    folder, _ = open_run(composed)
    write_start(folder, composed)
    save(folder, 1)
    changed = Composed({**composed, "seed": 2, "module": {"seed": 2}}, composed.sources)
    with pytest.raises(ValueError, match=r"other options \(seed: 1 -> 2\):"):
        open_run(changed)


def test_a_folder_belongs_to_one_command(config, tmp_path):
    folder, _ = open_run(config)
    assert other_owner(folder, "train") is None
    write_start(folder, config)
    assert other_owner(folder, "train") is None and other_owner(folder, "eval") == "the results of train.py"
    write_start(tmp_path / "eval", {**config, "command": "eval"})
    assert other_owner(tmp_path / "eval", "train") == "the results of eval.py"
    save(tmp_path / "old", 3)
    assert other_owner(tmp_path / "old", "train") is None and "checkpoints" in other_owner(tmp_path / "old", "eval")
    (tmp_path / "old" / "meta.json").write_text("{}")
    assert other_owner(tmp_path / "old", "train") == "a corpus"


@pytest.mark.parametrize("text", ["", "a: [", "just text"])
def test_a_foreign_config_is_a_sentence(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="is no recipe of this suite"):
        read_config(tmp_path)
