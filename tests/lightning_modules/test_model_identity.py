"""A checkpoint of another model is refused, also when all shapes agree."""

import json

import pytest

from configuration.compose import compose
from configuration.targets import build


def module(*options):
    made = build(compose(["recipe=quickstart", "scale=tiny", *options], command="train")["module"])
    made.configure_model()
    return made


def test_equal_shapes_with_another_window_are_refused():
    trained, checkpoint = module(), {}
    trained.on_save_checkpoint(checkpoint)
    checkpoint["state_dict"] = trained.state_dict()
    module("seed=5").on_load_checkpoint(checkpoint)
    module("model.config.gca_implementation=reference").on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="1 entries differ, first window_size: 33 in the checkpoint, 17"):
        module("model.config.window_size=17").on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="another model"):
        module("model.config.hidden_size=16").on_load_checkpoint(checkpoint)


def test_what_transformers_adds_or_a_later_version_of_the_model_is_no_difference():
    trained, checkpoint = module(), {}
    trained.on_save_checkpoint(checkpoint)
    checkpoint["state_dict"] = trained.state_dict()
    stored = json.loads(checkpoint["model_config"])
    stored |= {"field_of_another_transformers": 1, "transformers_version": "4.0", "problem_type": "x"}
    del stored["softmax_off_by_one"]  # as if the checkpoint were older than this option
    trained.on_load_checkpoint(checkpoint | {"model_config": json.dumps(stored)})
    with pytest.raises(ValueError, match="first softmax_off_by_one: True in the checkpoint, False"):
        module("model.config.softmax_off_by_one=false").on_load_checkpoint(
            checkpoint | {"model_config": json.dumps(stored)}
        )
