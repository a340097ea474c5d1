"""What a checkpoint of adapters leaves out, and that it comes back only on the same frozen weights."""

import pytest
import torch
from compression_cases import SENTINELS, make, tiny_model

from lightning_modules import adapter_checkpoint
from lightning_modules.adapter_checkpoint import BASE, frozen_identity, frozen_names
from lightning_modules.lora import MergedModel


def checkpoint_of(module):
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_stay_out_and_come_back(tied):
    module = make(tiny_model(tied=tied))
    checkpoint = checkpoint_of(module)
    names, frozen = checkpoint["state_dict"].keys(), frozen_names(module)
    assert names and not names & frozen and names | frozen == module.state_dict().keys()
    other = make(tiny_model(tied=tied))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
                assert name in names
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in module.state_dict().items())


def test_other_frozen_weights_and_other_adapters_are_refused():
    with pytest.raises(ValueError, match="other frozen weights"):
        make(tiny_model(seed=1)).on_load_checkpoint(checkpoint_of(make()))
    with pytest.raises(ValueError, match="lora_A"):
        make(lora={"r": 2}).on_load_checkpoint(checkpoint_of(make()))


def test_a_checkpoint_with_all_weights_still_loads():
    module = make()
    checkpoint = checkpoint_of(module)
    del checkpoint[BASE]
    checkpoint["state_dict"] = module.state_dict()
    make().on_load_checkpoint(checkpoint)


def test_a_model_without_adapters_is_stored_whole():
    module = make(lora=None)
    checkpoint = checkpoint_of(module)
    assert BASE not in checkpoint and checkpoint["state_dict"].keys() == module.state_dict().keys()


def test_the_identity_sees_one_bit_and_an_exchange():
    module = make()
    first, weight = frozen_identity(module), next(p for p in module.parameters() if not p.requires_grad)
    with torch.no_grad():
        one, two = weight[5, 6].clone(), weight[5, 7].clone()
        weight[5, 6], weight[5, 7] = two, one
        assert frozen_identity(module) != first
        weight[5, 6], weight[5, 7] = one, torch.nextafter(two, two + 1)
        assert frozen_identity(module) != first
        weight[5, 7] = two
        assert frozen_identity(module) == first


def test_a_merged_model_is_rounded_after_merging(tmp_path):
    module = make()
    exact, rounded = MergedModel(module.model).merged(), MergedModel(module.model, SENTINELS).to(torch.bfloat16)
    for one, two in zip(exact.parameters(), rounded.merged().parameters(), strict=True):
        assert torch.equal(one.bfloat16(), two)
    rounded.save_pretrained(tmp_path)
    assert (tmp_path / "sentinels.json").is_file()
    assert rounded.num_saved == sum(parameter.numel() for parameter in exact.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 3, (1 << 14) + 1, 130 * (1 << 14) + 5])
def test_bits_are_summed_as_integers(dtype, size):
    tensor = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    every, even = bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)
    assert adapter_checkpoint._bit_sum(tensor) == 3 * int(every) + int(even)
