"""Composition: recipes, groups, overrides, and what a user reads when one of them is wrong."""

import pytest

from configuration.compose import compose, group_choices, recipe_command, recipe_names, recipe_purpose
from configuration.errors import ConfigError

TRAIN = recipe_names("train")


def problems_of(*arguments, command="train"):
    with pytest.raises(ConfigError) as caught:
        compose(arguments, command=command)
    return caught.value.problems


def test_every_recipe_file_is_listed_with_a_purpose():
    assert {"quickstart", "pg19_gca", "pg19_sliding_window", "arxiv_gca", "books_gca"} <= set(TRAIN)
    assert {recipe_command(name) for name in recipe_names()} == {"train", "eval", "generate", "export"}
    purposes = {name: recipe_purpose(name) for name in recipe_names()}
    assert {name for name, purpose in purposes.items() if len(purpose) < 20 or purpose[-1] not in ".?"} == set()


@pytest.mark.parametrize("name", TRAIN)
def test_scale_tiny_changes_the_model_data_and_output(name):
    config = compose([f"recipe={name}", "scale=tiny"], command="train")
    assert config["scale"] == "tiny" and config["output"] == f"runs/{name}_tiny"
    assert config["model"]["config"]["hidden_size"] == 32
    assert config["model"]["config"]["vocab_size"] == config["vocabulary"]["size"] == 259
    assert config["trainer"]["accelerator"] == "cpu" and config["trainer"]["precision"] == "32-true"
    assert config["module"]["model"] == config["model"]


def test_the_scale_wins_over_everything_a_recipe_inherits_or_states():
    full = compose(["recipe=books_gca", "data.path=x"], command="train")
    tiny = compose(["recipe=books_gca", "scale=tiny"], command="train")
    assert (full["trainer"]["accumulate_grad_batches"], full["trainer"]["max_steps"]) == (8, 10000)
    assert (tiny["trainer"]["accumulate_grad_batches"], tiny["trainer"]["max_steps"]) == (1, 40)
    assert compose(["recipe=quickstart_sliding_window"], command="train")["scale"] == "laptop"


def test_command_line_wins_over_recipe_group_and_scale():
    config = compose(
        ["recipe=pg19_gca", "scale=tiny", "vocabulary=gpt2", "model.config.hidden_size=48", "seed=7"], command="train"
    )
    assert config["model"]["config"]["hidden_size"] == 48
    assert config["model"]["config"]["vocab_size"] == 50265
    assert config["data"]["seed"] == config["module"]["seed"] == 7


def test_options_the_target_accepts_need_no_plus():
    config = compose(["recipe=quickstart", "trainer.max_time=00:00:10:00"], command="train")
    assert config["trainer"]["max_time"] == "00:00:10:00"


def test_a_named_callback_can_be_removed_and_a_setting_deleted():
    config = compose(["recipe=quickstart", "~callbacks.sample_text"], command="train")
    assert "sample_text" not in config["callbacks"] and "loss_log" in config["callbacks"]


def test_all_unknown_options_are_reported_at_once_with_the_nearest_name():
    problems = problems_of("recipe=pg19_gca", "trainer.max_step=4", "seeed=1", "hidden_size=3")
    assert problems == [
        "unknown option 'trainer.max_step' (did you mean 'max_steps'?)",
        "unknown option 'seeed' (did you mean 'seed'?)",
        "unknown option 'hidden_size' (did you mean 'model.config.hidden_size'?)",
    ]


def test_a_value_is_no_section():
    assert problems_of("recipe=pg19_gca", "seed.x=1") == ["unknown option 'seed.x': seed is a value, not a section"]


def test_unknown_recipe_and_choice_name_the_nearest():
    assert "did you mean 'pg19_gca'" in problems_of("recipe=pg19_gc")[0]
    assert "did you mean 'tiny'" in problems_of("recipe=pg19_gca", "scale=tinny")[0]
    assert "tiny" in group_choices()["scale"]


def test_a_group_that_a_recipe_has_no_use_for_is_named():
    assert problems_of("recipe=perplexity", "data.path=x", "scale=tiny", command="eval") == [
        "recipe=perplexity takes no scale=: leave it out"
    ]


def test_no_recipe_lists_them_and_another_commands_recipe_names_that_command():
    assert "quickstart" in problems_of()[0]
    assert problems_of("recipe=perplexity") == [
        "recipe=perplexity belongs to eval.py: run python eval.py recipe=perplexity"
    ]
    assert "one recipe at a time" in problems_of("recipe=quickstart", "recipe=pg19_gca")[0]


def test_missing_values_and_unreadable_arguments_are_sentences():
    assert problems_of("recipe=perplexity", command="eval") == [
        "data.path is required by recipe=perplexity: pass data.path=VALUE"
    ]
    assert "unknown flag" in problems_of("recipe=quickstart", "--fast")[0]
    assert "cannot read" in problems_of("recipe=quickstart", "seed")[0]


@pytest.mark.parametrize("text", ["def main(", "it's {odd} = [1, 2]", "123", 'say "hi"', "a\\b", "x ${y} z", "a,b: c"])
def test_a_prompt_is_taken_as_it_is(text):
    config = compose([f"prompt={text}", "model.path=x"], command="generate", default_recipe="generate")
    assert config["prompt"] == config["task"]["prompt"] == text
