"""U-Nets of OpenAI: a converted network returns the same outputs as the original."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kac.networks import DiTConfig, MLPConfig, UNetConfig, build_network
from kac.networks.adopt import Adopted, adopt, try_out
from kac.networks.velocity import NetworkModule
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError
from tests.kac.openai_unet import OpenAIUNet, randomised
from tests.kac.weights_files import file_of

SHAPE, CLASSES = (3, 16, 16), 4


def unet(**options: Any) -> UNetConfig:
    return UNetConfig(**{"channels": (32, 64), "blocks": 1, "time_scale": 1.0, **options})


def reference(config: UNetConfig, classes: int | None = None) -> OpenAIUNet:
    options = (config.channels, config.blocks, config.attention, config.head_channels, config.scale_shift)
    return randomised(OpenAIUNet(*options, SHAPE, classes))


def converted(weights: dict[str, Tensor], config: UNetConfig) -> tuple[NetworkModule, Adopted]:
    network = build_network(config, SHAPE, CLASSES)
    adopted = adopt(network, config, SHAPE, file_of(weights))
    return network.eval().requires_grad_(False), adopted


def refusal(weights: dict[str, Tensor], config: Any, shape: tuple[int, ...] = SHAPE) -> str:
    with pytest.raises(DistillKacError) as error:
        adopt(build_network(config, shape, CLASSES), config, shape, file_of(weights))
    assert "\n" not in str(error.value)
    return str(error.value)


def difference(network: NetworkModule, theirs: OpenAIUNet, t: float = 0.3) -> float:
    """Return the largest difference between the outputs, whose standard deviation is about 1."""
    x, label = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 3])
    expected = theirs(x, torch.full((3,), t), label)
    assert 0.1 < expected.std().item() < 10
    return (network(x, torch.tensor(t), label) - expected).abs().max().item()


CONFIGS = {
    "as the authors' but smaller": unet(channels=(32, 64, 64, 64), blocks=2, attention=(8,), head_channels=32),
    "attention only in the middle": unet(),
    "attention at two levels": unet(channels=(32, 64, 64), attention=(16, 4), head_channels=16),
    "attention at the first level, one head": unet(attention=(16,)),
    "attention at all levels": unet(attention=(16, 8), head_channels=8, blocks=2),
    "one level": unet(channels=(32,), blocks=3, attention=(16,), head_channels=8),
    "scale and shift": unet(attention=(8,), head_channels=16, scale_shift=True),
    "channels that shrink": unet(channels=(64, 32, 96), attention=(8,), head_channels=32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_outputs_equal_the_originals(config: UNetConfig, t: float):
    theirs = reference(config)
    network, _ = converted(theirs.state_dict(), config)
    assert difference(network, theirs, t) < 1e-5


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("rows", [CLASSES, CLASSES + 1], ids=["no null label", "null label"])
def test_outputs_with_classes_equal_the_originals(scale_shift: bool, rows: int):
    config = unet(scale_shift=scale_shift, attention=(8,), head_channels=32)
    theirs = reference(config, rows)
    network, adopted = converted(theirs.state_dict(), config)
    for t in (0.0, 0.3, 1.0):
        assert difference(network, theirs, t) < 1e-5
    row = network.unet.class_embedding.weight[CLASSES]
    if rows == CLASSES:
        assert not row.any()
        assert "4 classes and no null label" in adopted.description
        assert adopted.conditioning == "classes"
    else:
        assert torch.equal(row, theirs.label_emb.weight[CLASSES])
        assert "4 classes and a null label" in adopted.description
        assert adopted.conditioning == "classes_and_null"


def test_without_classes_all_labels_have_the_same_velocity():
    config = unet()
    network, adopted = converted(reference(config).state_dict(), config)
    fields = network(torch.randn(1, *SHAPE).expand(CLASSES + 1, *SHAPE), torch.tensor(0.5), torch.arange(CLASSES + 1))
    assert (fields - fields[:1]).abs().max() < 1e-5
    assert "without classes" in adopted.description
    assert adopted.conditioning == "none"
    assert "one head" in adopted.description


def test_the_number_of_heads_matters():
    """A wrong number of heads changes the outputs, so the tests above do depend on the layout of queries and keys."""
    config = unet(attention=(16, 8), head_channels=16)
    theirs = reference(config)
    for head_channels in (8, 32):
        network, adopted = converted(theirs.state_dict(), unet(attention=(16, 8), head_channels=head_channels))
        assert difference(network, theirs) > 1e-3
        assert f"{head_channels} channels per head" in adopted.description


def test_wrappers_and_dtypes_do_not_matter():
    config = unet()
    theirs = reference(config)
    for wrapped in (
        nn.DataParallel(theirs).state_dict(),
        torch.optim.swa_utils.AveragedModel(theirs).state_dict(),
        {f"module._orig_mod.{name}": value for name, value in theirs.state_dict().items()},
        {name: value.double() for name, value in theirs.state_dict().items()},
    ):
        network, _ = converted(wrapped, config)
        assert difference(network, theirs) < 1e-5


# Refusals


@pytest.mark.parametrize("source", ["openai", "diffusers"])
@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"channels": (32, 64, 64)}, ["`network.channels` 32 64 (given: 32 64 64)"]),
        ({"channels": (32, 96)}, ["`network.channels` 32 64 (given: 32 96)"]),
        ({"blocks": 2}, ["`network.blocks` 1 (given: 2)"]),
        ({"attention": ()}, ["`network.attention` 8 (given: without a value)"]),
        ({"attention": (8, 16)}, ["`network.attention` 8 (given: 16 8)"]),
        ({"scale_shift": True}, ["`network.scale_shift` False (given: True)"]),
        (
            {"channels": (64,), "blocks": 3, "attention": (), "scale_shift": True},
            [
                "`network.channels` 32 64 (given: 64)",
                "`network.blocks` 1 (given: 3)",
                "`network.attention` 8 (given: without a value)",
                "`network.scale_shift` False (given: True)",
            ],
        ),
    ],
    ids=str,
)
def test_options_that_differ_from_the_originals_are_named(options: dict[str, Any], differing: list[str], source: str):
    weights = reference(unet(attention=(8,))).state_dict()
    if source == "diffusers":
        weights = build_network(unet(attention=(8,)), SHAPE, CLASSES).state_dict()
    message = refusal(weights, unet(**{"attention": (8,), **options}))
    assert re.findall(r"`network\.[^(]*\([^)]*\)", message) == differing


@pytest.mark.parametrize("source", ["openai", "diffusers"])
def test_other_channels_or_classes_of_the_data_are_named(source: str):
    def weights(shape: tuple[int, ...], classes: int) -> dict[str, Tensor]:
        if source == "openai":
            return randomised(OpenAIUNet((32, 64), 1, (), None, False, shape, classes)).state_dict()
        return build_network(unet(), shape, classes).state_dict()

    assert "`data.channels` 1 (given: 3)" in refusal(weights((1, 16, 16), CLASSES), unet())
    message = refusal(weights(SHAPE, 10), unet())
    assert re.search(r"labels .*: 1[01] \(given: 5\)", message), message


@pytest.mark.parametrize(
    ("theirs", "given", "differing"),
    [
        (MLPConfig(width=8, depth=3), MLPConfig(width=8, depth=1), ["`network.depth` 3 (given: 1)"]),
        (MLPConfig(width=16, depth=1), MLPConfig(width=8, depth=1), ["`network.width` 16 (given: 8)"]),
        (
            DiTConfig(heads=2, head_channels=8, depth=2, patch=4),
            DiTConfig(heads=4, head_channels=8, depth=1, patch=2),
            [
                "`network.heads` x `network.head_channels` 16 (given: 32)",
                "`network.depth` 2 (given: 1)",
                "`network.patch` 4 (given: 2)",
            ],
        ),
    ],
    ids=["depth", "width", "dit"],
)
def test_the_options_of_other_kinds_are_named(theirs: Any, given: Any, differing: list[str]):
    message = refusal(build_network(theirs, SHAPE, CLASSES).state_dict(), given)
    assert re.findall(r"`network\.[^(]*\([^)]*\)", message) == differing


@pytest.mark.parametrize(
    ("option", "value", "expected"), [("time_scale", 1000, "1"), ("groups", 16, "32"), ("patch", 2, "1")]
)
def test_options_that_openais_unet_lacks_are_refused(option: str, value: int, expected: str):
    config = unet(**{option: value})
    weights, network = file_of(reference(unet()).state_dict()), build_network(config, SHAPE, CLASSES)
    with pytest.raises(ArgumentError, match=rf"\b{value}\b.*\b{expected}\.") as error:
        adopt(network, config, SHAPE, weights)
    assert error.value.name == f"network.{option}"


def test_resblock_updown_is_named():
    weights = reference(unet()).state_dict()
    weights["output_blocks.1.1.in_layers.0.weight"] = torch.zeros(64)
    assert "resblock_updown=True" in refusal(weights, unet())


# Weights of other networks


@pytest.mark.parametrize(
    "config",
    [
        unet(attention=(8,), head_channels=16, groups=16, time_scale=1000, patch=2),
        DiTConfig(heads=2, head_channels=8, depth=1),
        MLPConfig(width=8, depth=1),
    ],
    ids=lambda config: config.kind,
)
def test_our_names_and_those_of_diffusers_are_loaded(config):
    theirs = randomised(build_network(config, SHAPE, CLASSES))
    name = theirs.diffusers_name
    for weights in (theirs.state_dict(), *([theirs.get_submodule(name).state_dict()] if name else [])):
        network = build_network(config, SHAPE, CLASSES)
        adopt(network, config, SHAPE, file_of(weights))
        x, t, label = torch.randn(2, *SHAPE), torch.rand(2), torch.tensor([1, CLASSES])
        assert torch.equal(network.eval()(x, t, label), theirs(x, t, label))
    weights = dict(theirs.state_dict())
    removed = next(name for name in weights if name.endswith("bias"))
    del weights[removed]
    message = refusal({**weights, f"{removed.split('.')[0]}.more": torch.zeros(1)}, config)
    assert removed.removeprefix(f"{name}.") + " is missing" in message
    assert "more is unexpected" in message


def test_a_unet_of_diffusers_without_classes_is_loaded():
    from diffusers import UNet2DModel

    config = unet()
    theirs = randomised(
        UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
        )
    )
    network, adopted = converted(theirs.state_dict(), config)
    x = torch.randn(2, *SHAPE)
    expected = theirs(x, torch.full((2,), 0.3)).sample
    assert torch.allclose(network(x, torch.tensor(0.3), torch.tensor([0, CLASSES])), expected, atol=1e-6)
    assert adopted.description.startswith("without classes")
    assert adopted.conditioning == "none"


# Trying a converted network


def test_a_network_with_nan_weights_is_refused():
    config = unet()
    network = build_network(config, SHAPE, CLASSES)
    try_out(network, config, SHAPE, CLASSES)
    weights = reference(config).state_dict()
    weights["out.2.bias"][0] = torch.nan
    network, _ = converted(weights, config)
    with pytest.raises(CheckpointError, match="NaN"):
        try_out(network, config, SHAPE, CLASSES)
