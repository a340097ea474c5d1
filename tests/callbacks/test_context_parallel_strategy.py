"""Who shares sequences with whom, without connecting anybody; what a recipe's options say about it."""

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from callbacks.context_parallel import ContextParallel
from configuration.errors import ConfigError
from configuration.step_size import num_data_processes


def strategy(size, rank, processes=8):
    made = ContextParallel(size)
    made.parallel_devices = [torch.device("cpu")] * processes
    made.cluster_environment = LightningEnvironment()
    made.cluster_environment.set_world_size(processes)
    made.cluster_environment.set_global_rank(rank)
    return made


@pytest.mark.parametrize(
    ("size", "rank", "share"), [("auto", 5, (1, 0)), (4, 3, (2, 0)), (4, 4, (2, 1)), (2, 7, (4, 3)), (1, 6, (8, 6))]
)
def test_neighbours_read_the_same_samples(size, rank, share):
    assert strategy(size, rank).distributed_sampler_kwargs == {"num_replicas": share[0], "rank": share[1]}


def test_groups_are_connected_once(monkeypatch):
    """A validation after the training sets the processes up again."""
    connected = []

    def new_group(ranks):
        connected.append(ranks)
        return dist.ProcessGroup(0, 1)

    monkeypatch.setattr(DDPStrategy, "setup_distributed", lambda _: None)
    monkeypatch.setattr("callbacks.context_parallel.dist.new_group", new_group)
    monkeypatch.setattr(dist, "get_rank", lambda _: 1)
    made = strategy(4, 5)
    made.setup_distributed()
    group = made.sequence_group
    made.setup_distributed()
    assert connected == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert made.sequence_group is group and (group.ranks, group.rank) == ([4, 5, 6, 7], 1)


@pytest.mark.parametrize("size", [3, 0, 16])
def test_groups_that_do_not_come_out_even_are_refused(size):
    with pytest.raises(ValueError, match=f"must divide the number of processes, got {size} and 8"):
        strategy(size, 0).setup_distributed()
    options = {"_target_": "callbacks.context_parallel.ContextParallel", "context_parallel_size": size}
    with pytest.raises(ConfigError, match=f"context_parallel_size={size} does not divide 8 process"):
        num_data_processes({"strategy": options, "devices": 4, "num_nodes": 2})


@pytest.mark.parametrize(("size", "number"), [("auto", 1), (2, 4), (8, 1), (1, 8)])
def test_a_recipe_counts_groups(size, number):
    options = {"_target_": "callbacks.context_parallel.ContextParallel", "context_parallel_size": size}
    assert num_data_processes({"strategy": options, "devices": 4, "num_nodes": 2}) == number
