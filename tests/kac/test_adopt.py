"""Where in a file of others the weights are: any prefix, any nesting, averages, and several networks in one file."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kac.networks import MLPConfig, OutsideConfig, UNetConfig, build_network
from kac.networks.adopt import Adopted, adopt
from kac.networks.velocity import NetworkModule
from kac.networks.weight_files import read_weights
from kac.util.errors import CheckpointError
from tests.kac.openai_unet import OpenAIUNet, randomised
from tests.kac.outside_modules import Field

UNET = UNetConfig(channels=(32,), blocks=1, time_scale=1.0)
SHAPE, CLASSES = (1, 8, 8), 2
FIELD = OutsideConfig(module="tests.kac.outside_modules:Field")
OTHER = {"encoder.weight": torch.ones(4, 3), "encoder.bias": torch.ones(4), "head.weight": torch.ones(2)}


def weights_of(seed: int = 0) -> dict[str, Tensor]:
    return dict(randomised(OpenAIUNet((32,), 1, (), None, False, SHAPE, None), seed).state_dict())


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def written(content: Any, folder: Path) -> str:
    torch.save(content, folder / "file.pt")
    return str(folder / "file.pt")


def adopted(path: str, key: str | None = None, config: Any = UNET, shape: Any = SHAPE) -> tuple[NetworkModule, Adopted]:
    network = build_network(config, shape, CLASSES)
    return network, adopt(network, config, shape, read_weights(path), key)


def refusal(path: str, key: str | None = None, config: Any = UNET, shape: Any = SHAPE) -> str:
    with pytest.raises(CheckpointError) as error:
        adopted(path, key, config, shape)
    assert "\n" not in str(error.value)
    return str(error.value)


def is_of(network: NetworkModule, seed: int) -> bool:
    """Whether its first layer is that of the weights of a seed."""
    return torch.equal(network.unet.conv_in.weight, weights_of(seed)["input_blocks.0.0.weight"])


W, AVERAGE = weights_of(0), weights_of(1)

PREFIXES = [
    "model.",
    "net.",
    "ema_model.",
    "module.",
    "_orig_mod.",
    "unet.",
    "diffusion_model.",
    "model.diffusion_model.",
    "module._orig_mod.model.",
    "some.thing.of.their.own.",
]


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_removed(prefix: str, ending: str, tmp_path: Path):
    file = tmp_path / f"file.{ending}"
    (torch.save if ending == "pt" else safetensors.torch.save_file)(under(prefix, W), file)
    network, found = adopted(str(file))
    assert is_of(network, 0)
    assert found.key == prefix.rstrip(".").replace("_orig_mod.", "").replace("_orig_mod", "")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": under("model.net.", W), "epoch": 3, "loops": {"fit": {"state": {}}}}, "state_dict.model.net"),
        ({"model": {"state_dict": W}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "model.state_dict"),
        ({"step": torch.tensor(3), "checkpoint": [{"weights": W}]}, "checkpoint.0.weights"),
        ({**under("module.", W), "n_averaged": torch.tensor(5)}, "module"),
        ({**under("net.", W), **under("discriminator.", OTHER), **under("text_encoder.", OTHER)}, "net"),
        ({"generator": W, "discriminator": OTHER}, "generator"),
    ],
    ids=["Lightning", "nested", "in a list", "averaged", "several networks", "a discriminator"],
)
def test_weights_are_found_wherever_they_are(content: Any, key: str, tmp_path: Path):
    network, found = adopted(written(content, tmp_path))
    assert is_of(network, 0)
    assert found.key == key


@pytest.mark.parametrize("inside", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside_a_name_are_removed(inside: str, tmp_path: Path):
    wrapped = {name.replace("input_blocks.1.", f"input_blocks.1.{inside}"): value for name, value in W.items()}
    assert wrapped.keys() != W.keys()
    assert is_of(adopted(written(wrapped, tmp_path))[0], 0)


@pytest.mark.parametrize(
    ("content", "key", "raw"),
    [
        ({"model": W, "ema": AVERAGE}, "ema", "model"),
        (
            {"state_dict": {**under("model.", W), **under("ema_model.", AVERAGE)}},
            "state_dict.ema_model",
            "state_dict.model",
        ),
        ({**W, **under("ema_model.", AVERAGE)}, "ema_model", ""),
        (
            {"ema": {"online_model": W, "ema_model": AVERAGE, "step": torch.tensor(1)}},
            "ema.ema_model",
            "ema.online_model",
        ),
        ({"net": W, "state_dict_ema": under("module.", AVERAGE)}, "state_dict_ema.module", "net"),
        ({"network": W, "average": AVERAGE, "optimizer": {}}, "average", "network"),
        ({"model": under("module.", W), "ema": {"shadow_params": [*AVERAGE.values()]}}, "ema.shadow_params", "model"),
    ],
    ids=["beside", "Lightning", "in one mapping", "lucidrains", "timm", "ours", "a list without names"],
)
def test_averaged_weights_are_taken_first_and_the_others_by_their_key(content: Any, key: str, raw: str, tmp_path: Path):
    path = written(content, tmp_path)
    network, found = adopted(path)
    assert is_of(network, 1)
    assert found.key == key
    assert "also in the file" in found.told
    assert is_of(adopted(path, raw)[0], 0)


def test_what_is_beside_weights_without_a_prefix_may_be_a_part_of_their_network(tmp_path: Path):
    assert "other.weight left over" in refusal(written({**W, "other.weight": torch.ones(1)}, tmp_path))


def test_a_list_of_averages_has_the_names_of_the_network_where_the_file_has_none(tmp_path: Path):
    config = MLPConfig(width=8, depth=1)
    theirs = randomised(build_network(config, (2,), CLASSES))
    path = written({"ema": {"shadow_params": list(theirs.parameters())}}, tmp_path)
    network, found = adopted(path, config=config, shape=(2,))
    assert found.key == "ema.shadow_params"
    assert torch.equal(network.enter.weight, theirs.enter.weight)
    assert torch.equal(network.blocks[0].modulate.bias, theirs.blocks[0].modulate.bias)


def test_buffers_that_a_list_of_averages_lacks_are_not_made_up(tmp_path: Path):
    path = written({"ema": {"shadow_params": list(Field().parameters())}}, tmp_path)
    assert "ema.shadow_params (3 without names)" in refusal(path, config=FIELD, shape=(2,))


def test_shared_parameters_and_buffers_go_with_a_list_of_averages(tmp_path: Path):
    """The list has a shared parameter once, the state dict under two names."""
    torch.manual_seed(0)
    theirs = Field()
    theirs.version.fill_(9)
    averaged = [value.detach() + 1 for value in theirs.parameters()]
    path = written({"model": theirs.state_dict(), "ema": {"shadow_params": averaged}}, tmp_path)
    network, found = adopted(path, config=FIELD, shape=(2,))
    assert found.key == "ema.shadow_params"
    assert torch.equal(network.inner.twin.weight, theirs.linear.weight + 1)
    assert torch.equal(network.inner.classes.weight, theirs.classes.weight + 1)
    assert network.inner.version.item() == 9


def test_a_list_of_another_network_is_left_and_told(tmp_path: Path):
    path = written({"model": W, "ema": {"shadow_params": [*AVERAGE.values()][:-1]}}, tmp_path)
    network, found = adopted(path)
    assert is_of(network, 0)
    assert f"ema.shadow_params ({len(W) - 1} without names)" in found.told


# What is refused


@pytest.mark.parametrize(
    "content",
    [{"first": W, "second": AVERAGE}, {"ema": W, "model_ema": AVERAGE}, under("first.", W) | under("second.", W)],
)
def test_several_weights_that_fit_are_offered(content: Any, tmp_path: Path):
    path = written(content, tmp_path)
    said = refusal(path)
    keys = ("ema", "model_ema") if "ema" in content else ("first", "second")
    assert f"{', '.join(keys)}" in said
    assert "--key" in said
    assert all(adopted(path, key)[1].key == key for key in keys)


def test_a_key_without_weights_is_refused_with_what_there_is(tmp_path: Path):
    said = refusal(written({"model": W, "discriminator": OTHER}, tmp_path), "discriminator")
    assert "under `key` discriminator" in said
    assert f"model ({len(W)}), discriminator (3)" in said


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ({"encoder": OTHER, "step": 3}, "3 tensors: encoder.encoder (2), encoder.head (1), such as encoder.encoder"),
        ({"step": 3, "loss": 0.1}, "no tensors in step, loss"),
        ({"weights": {}}, "no tensors in weights"),
        ([1, 2], "no named entries"),
        (torch.ones(2), "no named entries"),
        ([torch.ones(2)], "1 tensors: a list (1 without names)"),
    ],
)
def test_a_file_of_another_network_is_described(content: Any, holds: str, tmp_path: Path):
    said = refusal(written(content, tmp_path))
    assert holds in said
    assert (
        f"{len(build_network(UNET, SHAPE, CLASSES).unet.state_dict())} tensors, such as conv_in.weight [32, 1, 3"
        in said
    )


def test_shapes_that_differ_name_the_option(tmp_path: Path):
    said = refusal(written(under("net.", W), tmp_path), config=UNetConfig(channels=(64,), blocks=1, time_scale=1.0))
    assert "the weights under net are of a unet with `network.channels` 32 (given: 64)" in said


def test_a_network_that_only_begins_alike_is_not_taken_for_one_with_other_options(tmp_path: Path):
    """The encoder of diffusers' autoencoder has the names of a U-Net's first half."""
    from diffusers import AutoencoderKL

    weights = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32).state_dict()
    said = refusal(written(weights, tmp_path))
    assert "do not fit a unet" in said
    assert "encoder (" in said
    assert "--network.channels" not in said


def test_of_a_module_from_outside_the_first_names_are_told(tmp_path: Path):
    weights = Field(classes=5).state_dict()
    said = refusal(written(weights, tmp_path), config=FIELD, shape=(2,))
    assert "classes.weight of shape [5, 2], not [3, 2] (1 in all)" in said


class Numbered(nn.Module):
    """Names that are found everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([x, t[:, None]], 1))


def test_generic_names_are_found_among_deeper_ones(tmp_path: Path):
    """``body.0.weight`` ends in names that other networks have too."""
    config = OutsideConfig(module="tests.kac.test_adopt:Numbered")
    theirs, others = Numbered(), nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    content = {"critic": under("body.", dict(others.state_dict())), "actor": theirs.state_dict()}
    network, found = adopted(written(content, tmp_path), config=config, shape=(2,))
    assert found.key == "actor"
    assert torch.equal(network.inner.body[2].weight, theirs.body[2].weight)


def test_safetensors_are_known_by_their_content(tmp_path: Path):
    safetensors.torch.save_file(W, tmp_path / "file.bin")
    assert is_of(adopted(str(tmp_path / "file.bin"))[0], 0)
