"""What strategies that shard a module write and read of it, and which checkpoints they refuse; no engine runs here."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

from callbacks.checkpoint import AtomicCheckpointIO
from callbacks.checkpoint_folder import DEEPSPEED, FSDP2, FSDP_META, ONE_FILE, refuse_other_layout, sliced_shapes
from callbacks.sharded_state import fill_slices, learnt_state_alone, named_moments, shapes_of
from callbacks.sharded_strategies import FullyShardedData, ShardedDeepSpeed


class Adapted(pl.LightningModule):
    """A frozen weight by two names, a buffer, and two learnt ones."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head.weight = self.base.weight
        self.base.requires_grad_(False)
        self.first, self.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4))
        self.register_buffer("scale", torch.ones(1))


LEARNT = {"head.bias", "first", "second", "scale"}


def test_what_is_frozen_is_out_by_each_of_its_names_and_only_meanwhile():
    module = Adapted()
    whole = module.state_dict().keys()
    with pytest.raises(RuntimeError, match="stop"), learnt_state_alone(module):
        assert module.state_dict().keys() == LEARNT and not module.strict_loading
        assert nn.Sequential(module).state_dict().keys() == {f"0.{name}" for name in LEARNT}
        raise RuntimeError("stop")
    assert module.state_dict().keys() == whole and module.strict_loading


def test_a_file_fills_a_module_or_is_of_another():
    module = Adapted()
    with learnt_state_alone(module):
        state = {name: tensor + 1 for name, tensor in module.state_dict().items()}
        frozen = module.base.weight.clone()
        fill_slices(module, state)
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())
        assert torch.equal(module.base.weight, frozen)
        for other in (state | {"third": torch.ones(1)}, state | {"first": torch.ones(3)}, {"first": state["first"]}):
            with pytest.raises(ValueError, match=r"another model: \d tensors differ, first"):
                fill_slices(module, other)


def test_moments_are_named_by_the_order_of_the_groups():
    module = Adapted()
    groups = [{"params": [module.second, module.head.bias]}, {"params": [module.first]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for number, parameter in enumerate((module.second, module.head.bias, module.first)):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    own = optimizer.state_dict()
    # As FSDP writes it: numbered by the order of the parameters in the module.
    other = {"state": {7: own["state"][0], 3: own["state"][1], 5: own["state"][2]}}
    other["param_groups"] = [own["param_groups"][0] | {"params": [7, 3]}, own["param_groups"][1] | {"params": [5]}]
    for state in (own, other):
        named = named_moments(module, optimizer, state)
        assert [group["params"] for group in named["param_groups"]] == [["second", "head.bias"], ["first"]]
        for name, number in (("second", 1.0), ("head.bias", 2.0), ("first", 3.0)):
            assert named["state"][name]["exp_avg"][0] == pytest.approx(0.1 * number)


@pytest.mark.parametrize("layout", [ONE_FILE, FSDP2, DEEPSPEED])
def test_a_checkpoint_of_another_layout_is_refused(tmp_path, layout):
    path = tmp_path / "step_1.ckpt"
    if layout == ONE_FILE:
        path.write_bytes(b"")
    else:
        path.mkdir()
        (path / (FSDP_META if layout == FSDP2 else "checkpoint")).touch()
    refuse_other_layout(path, (layout, "another"))
    with pytest.raises(
        ValueError, match=f"step_1.ckpt is {layout}, and this trainer reads another or none: resume with"
    ):
        refuse_other_layout(path, ("another", "none"))
    if layout != ONE_FILE:
        with pytest.raises(ValueError, match="this trainer reads one file"):
            AtomicCheckpointIO().load_checkpoint(path)


def test_slices_of_another_model_are_refused(tmp_path):
    module = Adapted()
    with learnt_state_alone(module):
        state = {"state_dict": module.state_dict(), "optimizer_0": {"first": torch.ones(9)}}
        torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
        assert sliced_shapes(tmp_path) == shapes_of(module.state_dict())
        FullyShardedData.check_shards(SimpleNamespace(model=module), tmp_path, {})
    with pytest.raises(ValueError, match=r"another model: 3 tensors differ, first base\.bias:"):
        FullyShardedData.check_shards(SimpleNamespace(model=module), tmp_path, {})


def test_moments_of_another_model_or_number_of_processes_are_refused(tmp_path):
    def check(**changes):
        run = SimpleNamespace(world_size=8, lightning_module=Adapted())
        groups = [{"head.bias": torch.Size([3]), "second": torch.Size([4])}, {"first": torch.Size([2])}]
        ShardedDeepSpeed.check_shards(run, tmp_path, {"dp_world_size": 8, "param_shapes": groups} | changes)

    check()
    with pytest.raises(ValueError, match="written by 4 DeepSpeed processes and this run has 8: resume with 4"):
        check(dp_world_size=4)
    with pytest.raises(ValueError, match="another model: 2 tensors differ, first first:"):
        check(param_shapes=[{"second": torch.Size([4]), "first": torch.Size([3])}])


def test_whether_frozen_weights_are_stored_is_no_option():
    with pytest.raises(ValueError, match="follows from the model"):
        ShardedDeepSpeed(stage=3, exclude_frozen_parameters=True)
