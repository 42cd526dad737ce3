"""The cost of a network, counted without computing anything."""

import pytest
import torch

from kac.networks import DiTConfig, MLPConfig, UNetConfig, build_network
from kac.networks.cost import duration, network_cost, short, training_memory
from kac.path import PathConfig


@pytest.mark.parametrize(
    "config",
    [
        MLPConfig(width=16, depth=1, conditions=("end_time",)),
        UNetConfig(channels=(8,), blocks=1, groups=4),
        DiTConfig(heads=2, head_channels=8, depth=1, patch=4),
    ],
    ids=lambda config: config.kind,
)
def test_the_number_of_parameters_is_that_of_the_network(config):
    network = build_network(config, (1, 8, 8), 10)
    assert network_cost(config, (1, 8, 8), 10).parameters == sum(p.numel() for p in network.parameters())


def test_the_operations_of_an_mlp_equal_a_manual_count():
    cost = network_cost(MLPConfig(width=16, depth=1), (1, 8, 8), 10)
    products = 64 * 64 + 64 * 16 + 64 * 32 + 16 * 32 + 32 * 16 + 16 * 64  # time, enter, modulate, block, leave
    assert cost.flops_per_call == 2 * products


def test_the_operations_of_openais_unet_equal_its_authors_count():
    """The authors count 6.1 G multiplications per CIFAR-10 image. This project also counts the additions."""
    cost = network_cost(UNetConfig(channels=(128, 256, 256, 256), attention=(16,)), (3, 32, 32), 10)
    assert cost.flops_per_call == pytest.approx(12.3e9, rel=0.1)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MLPConfig(width=64, depth=2), (1, 8, 8)),
        (MLPConfig(width=64, depth=2, bounded=True), (1, 8, 8)),
        (UNetConfig(channels=(32, 64), blocks=1, groups=8), (1, 16, 16)),
        (DiTConfig(heads=2, head_channels=32, depth=2, patch=2), (1, 16, 16)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_the_memory_per_sample_is_what_a_real_forward_pass_keeps(config, shape):
    network = build_network(config, shape, 10, PathConfig().build()).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def kept(samples: int) -> int:
        tensors: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: tensors.append(each) or each, lambda each: each):
            network(torch.randn(samples, *shape), torch.rand(samples), torch.zeros(samples, dtype=torch.long))
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    memory = training_memory(config, shape, 10)
    assert memory.per_sample == pytest.approx((kept(32) - kept(16)) / 16, rel=0.02)
    assert memory.state == 20 * sum(parameter.numel() for parameter in network.parameters())


def test_the_default_device_is_unchanged():
    network_cost(MLPConfig(width=16, depth=1), (2,), 2)
    assert torch.zeros(1).device.type == "cpu"


def test_numbers_are_formatted_for_people():
    assert [short(n) for n in (3, 1050, 1.05e6, 2.5e12)] == ["3", "1.05 k", "1.05 M", "2.5 T"]
    assert short(12.4e9, "FLOP") == "12.4 GFLOP"
    assert [duration(s) for s in (40, 600, 9000)] == ["40 seconds", "10 minutes", "2.5 hours"]
