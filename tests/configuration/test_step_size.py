"""The sequences of an optimiser step: given or derived, the same for any number of processes."""

import pytest

from configuration.errors import ConfigError
from configuration.step_size import num_data_processes, settle_step_size


def recipe(**trainer):
    options = {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "accumulate_grad_batches": 3} | trainer
    return {"data": {"batch_size": 2, "accumulate_grad_batches": 3}, "trainer": options, "sequences_per_step": None}


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ({"devices": 4, "num_nodes": 2}, 8),
        ({"devices": "4"}, 4),
        ({"devices": "0,2, 5"}, 3),
        ({"devices": "1,"}, 1),
        ({"devices": [0, 3]}, 2),
        ({"devices": "auto"}, 1),
        ({"devices": -1}, 1),
        (
            {
                "devices": 8,
                "strategy": {
                    "_target_": "lightning.pytorch.strategies.ModelParallelStrategy",
                    "data_parallel_size": 2,
                },
            },
            2,
        ),
    ],
)
def test_processes_with_batches_of_their_own(options, processes):
    assert num_data_processes(recipe(**options)["trainer"]) == processes


def test_the_product_is_noted_and_the_given_number_decides():
    config = recipe(devices=2)
    settle_step_size(config)
    assert config["sequences_per_step"] == 12 and config["trainer"]["accumulate_grad_batches"] == 3
    for devices, accumulate in ((1, 6), (2, 3), (6, 1)):
        moved = recipe(devices=devices) | {"sequences_per_step": 12}
        for _ in range(2):
            settle_step_size(moved)
            assert moved["trainer"]["accumulate_grad_batches"] == accumulate
            assert moved["data"]["accumulate_grad_batches"] == accumulate


@pytest.mark.parametrize("wanted", [13, 0, 2, "12"])
def test_what_no_accumulation_makes_is_refused(wanted):
    with pytest.raises(ConfigError, match=r"is no multiple of 4, data\.batch_size=2 on 2 process"):
        settle_step_size(recipe(devices=2) | {"sequences_per_step": wanted})
