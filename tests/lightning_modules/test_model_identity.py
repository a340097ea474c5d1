"""A checkpoint of another model is refused, also when all shapes agree."""

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
