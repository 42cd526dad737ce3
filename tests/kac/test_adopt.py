"""Finding weights in other projects' files: any prefix or nesting, averages, and several networks in one file."""

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


def write(content: Any, folder: Path) -> str:
    torch.save(content, folder / "file.pt")
    return str(folder / "file.pt")


def load(path: str, key: str | None = None, config: Any = UNET, shape: Any = SHAPE) -> tuple[NetworkModule, Adopted]:
    network = build_network(config, shape, CLASSES)
    return network, adopt(network, config, shape, read_weights(path), key)


def refusal(path: str, key: str | None = None, config: Any = UNET, shape: Any = SHAPE) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path, key, config, shape)
    assert "\n" not in str(error.value)
    return str(error.value)


def has_weights_of(network: NetworkModule, seed: int) -> bool:
    """Return whether the first layer has the weights of ``seed``."""
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
def test_weights_are_found_under_any_prefix(prefix: str, ending: str, tmp_path: Path):
    file = tmp_path / f"file.{ending}"
    (torch.save if ending == "pt" else safetensors.torch.save_file)(under(prefix, W), file)
    network, adopted = load(str(file))
    assert has_weights_of(network, 0)
    assert adopted.key == prefix.rstrip(".").replace("_orig_mod.", "").replace("_orig_mod", "")


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
def test_weights_are_found_at_any_depth(content: Any, key: str, tmp_path: Path):
    network, adopted = load(write(content, tmp_path))
    assert has_weights_of(network, 0)
    assert adopted.key == key


@pytest.mark.parametrize("inside", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside_a_name_are_removed(inside: str, tmp_path: Path):
    wrapped = {name.replace("input_blocks.1.", f"input_blocks.1.{inside}"): value for name, value in W.items()}
    assert wrapped.keys() != W.keys()
    assert has_weights_of(load(write(wrapped, tmp_path))[0], 0)


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
def test_averaged_weights_are_preferred_and_others_need_a_key(content: Any, key: str, raw: str, tmp_path: Path):
    path = write(content, tmp_path)
    network, adopted = load(path)
    assert has_weights_of(network, 1)
    assert adopted.key == key
    assert "also in the file" in adopted.description
    assert has_weights_of(load(path, raw)[0], 0)


def test_other_names_next_to_weights_without_a_prefix_are_unexpected(tmp_path: Path):
    assert "other.weight is unexpected" in refusal(write({**W, "other.weight": torch.ones(1)}, tmp_path))


def test_a_list_of_averages_takes_its_names_from_the_network(tmp_path: Path):
    config = MLPConfig(width=8, depth=1)
    theirs = randomised(build_network(config, (2,), CLASSES))
    path = write({"ema": {"shadow_params": list(theirs.parameters())}}, tmp_path)
    network, adopted = load(path, config=config, shape=(2,))
    assert adopted.key == "ema.shadow_params"
    assert torch.equal(network.enter.weight, theirs.enter.weight)
    assert torch.equal(network.blocks[0].modulate.bias, theirs.blocks[0].modulate.bias)


def test_a_list_of_averages_without_buffers_is_refused(tmp_path: Path):
    path = write({"ema": {"shadow_params": list(Field().parameters())}}, tmp_path)
    assert "ema.shadow_params (3 without names)" in refusal(path, config=FIELD, shape=(2,))


def test_a_list_of_averages_is_completed_from_the_state_dict(tmp_path: Path):
    """The list has a shared parameter once and no buffers. The state dict has the parameter under two names."""
    torch.manual_seed(0)
    theirs = Field()
    theirs.version.fill_(9)
    averaged = [value.detach() + 1 for value in theirs.parameters()]
    path = write({"model": theirs.state_dict(), "ema": {"shadow_params": averaged}}, tmp_path)
    network, adopted = load(path, config=FIELD, shape=(2,))
    assert adopted.key == "ema.shadow_params"
    assert torch.equal(network.inner.twin.weight, theirs.linear.weight + 1)
    assert torch.equal(network.inner.classes.weight, theirs.classes.weight + 1)
    assert network.inner.version.item() == 9


def test_a_list_of_a_different_network_is_ignored_and_mentioned(tmp_path: Path):
    path = write({"model": W, "ema": {"shadow_params": [*AVERAGE.values()][:-1]}}, tmp_path)
    network, adopted = load(path)
    assert has_weights_of(network, 0)
    assert f"ema.shadow_params ({len(W) - 1} without names)" in adopted.description


# Errors


@pytest.mark.parametrize(
    "content",
    [{"first": W, "second": AVERAGE}, {"ema": W, "model_ema": AVERAGE}, under("first.", W) | under("second.", W)],
)
def test_several_weights_that_fit_are_listed(content: Any, tmp_path: Path):
    path = write(content, tmp_path)
    message = refusal(path)
    keys = ("ema", "model_ema") if "ema" in content else ("first", "second")
    assert ", ".join(keys) in message
    assert "`key`" in message
    assert all(load(path, key)[1].key == key for key in keys)


def test_a_key_without_weights_is_refused(tmp_path: Path):
    message = refusal(write({"model": W, "discriminator": OTHER}, tmp_path), "discriminator")
    assert "`key` discriminator" in message
    assert f"model ({len(W)}), discriminator (3)" in message


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
def test_a_file_of_a_different_network_is_described(content: Any, holds: str, tmp_path: Path):
    message = refusal(write(content, tmp_path))
    assert holds in message
    total = len(build_network(UNET, SHAPE, CLASSES).unet.state_dict())
    assert f"{total} tensors, such as conv_in.weight [32, 1, 3" in message


def test_shapes_that_differ_are_explained_by_the_option(tmp_path: Path):
    message = refusal(write(under("net.", W), tmp_path), config=UNetConfig(channels=(64,), blocks=1, time_scale=1.0))
    assert "under net" in message
    assert "`network.channels` 32 (given: 64)" in message


def test_a_similar_network_is_not_explained_by_options(tmp_path: Path):
    """In diffusers, an autoencoder's encoder has the same weight names as the first half of a U-Net."""
    from diffusers import AutoencoderKL

    weights = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32).state_dict()
    message = refusal(write(weights, tmp_path))
    assert "encoder (" in message
    assert "`network.channels`" not in message


def test_weights_of_an_outside_module_that_do_not_fit_are_named(tmp_path: Path):
    weights = Field(classes=5).state_dict()
    message = refusal(write(weights, tmp_path), config=FIELD, shape=(2,))
    assert "classes.weight has shape [5, 2] instead of [3, 2]" in message


class Numbered(nn.Module):
    """A module whose weights have generic names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([x, t[:, None]], 1))


def test_generic_names_are_distinguished_from_those_of_other_networks(tmp_path: Path):
    """Other networks also have names such as ``body.0.weight``."""
    config = OutsideConfig(module="tests.kac.test_adopt:Numbered")
    theirs, others = Numbered(), nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    content = {"critic": under("body.", dict(others.state_dict())), "actor": theirs.state_dict()}
    network, adopted = load(write(content, tmp_path), config=config, shape=(2,))
    assert adopted.key == "actor"
    assert torch.equal(network.inner.body[2].weight, theirs.body[2].weight)


def test_safetensors_are_recognised_by_their_content(tmp_path: Path):
    safetensors.torch.save_file(W, tmp_path / "file.bin")
    assert has_weights_of(load(str(tmp_path / "file.bin"))[0], 0)
