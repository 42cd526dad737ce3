"""Model folders: the EMA weights in float32, and ``config.json``, written last.

MODEL/config.json         all that is needed to build, sample and trace the model
MODEL/model.safetensors   the weights of a network of our own

A network around a model of diffusers has in place of the last one what that model's ``from_pretrained(MODEL,
subfolder="unet")`` takes, or ``"transformer"``:

MODEL/unet/diffusion_pytorch_model.safetensors   the weights, under the names that diffusers has for them
MODEL/unet/config.json                           the config of diffusers
"""

import contextlib
import hashlib
import json
from typing import Any, Literal, NamedTuple, Self

import safetensors.torch
import torch
from pydantic import Field, PositiveInt, model_validator

from kac.data import DataConfig, Dataset, open_dataset
from kac.networks import Conditioning, NetworkConfig, NetworkModule, build_network, outline_network
from kac.path import PathConfig
from kac.solvers import KnotGrid
from kac.util import files
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError, one_line
from kac.util.fingerprint import with_neutral_values
from kac.util.options import Options

WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
SCHEMA_VERSION = 1

DATA_CHANGED = (
    "the files of the dataset have changed, or an older version read them in another way, which numbered class folders "
    "1, 10, 2 and left photographs on their side. Train the teacher again on these data"
)
"""What to make of data that are not those of a model."""


class ModelConfig(Options):
    """What a model is and where it came from."""

    schema_version: int = Field(SCHEMA_VERSION, strict=True)
    kind: Literal["teacher", "student"]
    network: NetworkConfig
    path: PathConfig
    data: DataConfig = Field(description="the dataset that the teacher learned, and where it was")
    data_sha256: str
    sample_shape: tuple[PositiveInt, ...]
    num_classes: PositiveInt
    class_frequencies: tuple[float, ...] = Field(description="share of each class in the data")
    class_names: tuple[str, ...] = Field((), description="names of the classes by number; none: they have no names")
    conditioning: Conditioning = Field(
        "classes_and_null", description="what it was conditioned on in training; none: it takes the null label only"
    )
    steps: int | None = Field(
        None, description="macro steps of a student, by default if it takes any; None for a teacher"
    )
    knot_grid: KnotGrid = Field("uniform", description="grid of a student's steps")
    guidance: float | None = Field(
        None, description="guidance scale built into a student, by default if it takes any; None for a teacher"
    )
    guidance_scales: tuple[float, ...] = Field((), description="those that a student of all scales has learned")
    refined_in: tuple[str, ...] = Field((), description="spaces in which a student was brought to the data")
    weights_sha256: str = ""
    fingerprint: str = Field("", description="fingerprint of the spec that made the model")
    teacher_sha256: str | None = Field(None, description="a student's teacher, by its weights")
    store_fingerprint: str | None = Field(None, description="the store a student was made from")

    @model_validator(mode="after")
    def _names_every_class(self) -> Self:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"`class_names`: expected {self.num_classes} names, found {len(self.class_names)}")
        return self

    @property
    def is_any_step(self) -> bool:
        """Whether it is a student for every step count: its network is told where a step ends."""
        return self.kind == "student" and "end_time" in self.network.conditions

    @property
    def takes_guidance(self) -> bool:
        """Whether it is a student of all guidance scales: its network is told which."""
        return self.kind == "student" and "guidance" in self.network.conditions


def teacher_config(
    network: NetworkConfig,
    path: PathConfig,
    data: DataConfig,
    fingerprint: str = "",
    conditioning: Conditioning = "classes_and_null",
) -> ModelConfig:
    """The config of a teacher, with the facts of its dataset; raises as ``open_dataset``."""
    found = open_dataset(data).description
    return ModelConfig(
        kind="teacher",
        network=network,
        path=path,
        data=data,
        data_sha256=found.sha256,
        sample_shape=found.sample_shape,
        num_classes=found.num_classes,
        class_frequencies=found.class_frequencies,
        class_names=found.class_names,
        conditioning=conditioning,
        fingerprint=fingerprint,
    )


def learned_data(path: str, model: ModelConfig) -> Dataset:
    """The data that the model in the folder ``path``, or its teacher, learned.

    Raises:
        DistillKacError: they have changed, or as ``open_dataset``.
    """
    data = open_dataset(model.data)
    if data.description.sha256 != model.data_sha256:
        raise DistillKacError(
            f"{path}: expected the data {model.data_sha256[:12]}... that this model was made from, found "
            f"{data.description.sha256[:12]}...: {DATA_CHANGED}"
        )
    return data


class Model(NamedTuple):
    """A loaded model."""

    network: NetworkModule
    config: ModelConfig


def save_model(path: str, config: ModelConfig, weights: dict[str, torch.Tensor]) -> ModelConfig:
    """Write the folder ``path`` (local or s3://); returns the config as written, with the weights' sha256.

    Args:
        weights: the network's state dict to be saved, which is the EMA's.

    Raises:
        CheckpointError: the weights are not those of the config's network.
    """
    network = outline_network(config.network, config.sample_shape, config.num_classes)
    expected = network.state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
        raise CheckpointError(f"{path}: the weights to be saved are not those of the network")
    prefix = _prefix(network)
    tensors = {name.removeprefix(prefix): _single_precision(value) for name, value in weights.items()}
    data = safetensors.torch.save(tensors, {"format": "pt"} if prefix else None)
    config = config.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
    files.write_bytes(files.join(path, _weights_file(network)), data)
    if network.diffusers_name:
        described: Any = network.get_submodule(network.diffusers_name)
        files.write_bytes(
            f"{files.join(path, network.diffusers_name)}/config.json", described.to_json_string().encode()
        )
    files.write_bytes(files.join(path, CONFIG_FILE), json.dumps(config.model_dump(mode="json"), indent=2).encode())
    return config


def load_config(path: str) -> ModelConfig:
    """The config of the model folder ``path``.

    Raises:
        CheckpointError: no model, an unreadable config, or one of a newer version.
    """
    try:
        raw = files.read_bytes(files.join(path, CONFIG_FILE))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        message = f"{path}: expected a model folder with {CONFIG_FILE}, found none: train one, or mend the path"
        raise CheckpointError(message) from None
    try:
        values: dict[str, Any] = json.loads(raw)
        version = values.get("schema_version")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}/{CONFIG_FILE}: expected a JSON object, found {error}") from None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        expected = f"expected schema version {SCHEMA_VERSION} or older"
        raise CheckpointError(f"{path}: {expected}, found {version}: use a newer distillkac")
    try:
        return ModelConfig(**with_neutral_values(ModelConfig, values))
    except ArgumentError as error:
        raise CheckpointError(f"{path}/{CONFIG_FILE}: expected a config of this project, found {error}") from None


def load_teacher_config(path: str) -> ModelConfig:
    """The config of the teacher in the folder ``path``.

    Raises:
        CheckpointError: as ``load_config``, or the model is a student.
    """
    config = load_config(path)
    if config.kind != "teacher":
        raise CheckpointError(f"{path}: expected a teacher, found a {config.kind}: give the folder of its teacher")
    return config


def load_model(path: str, device: torch.device | str = "cpu") -> Model:
    """Build the network of the model folder ``path`` and load its weights, in evaluation mode.

    Raises:
        CheckpointError: a missing, damaged or foreign folder; the message says which file and why.
    """
    config = load_config(path)
    try:
        network = build_network(config.network, config.sample_shape, config.num_classes)
    except ArgumentError as error:
        raise CheckpointError(f"{path}/{CONFIG_FILE}: {error}") from None
    weights_path, data = _read_weights(path, network)
    found = hashlib.sha256(data).hexdigest()
    if found != config.weights_sha256:
        raise CheckpointError(
            f"{weights_path}: expected sha256 {config.weights_sha256[:12]}... as {CONFIG_FILE} says, "
            f"found {found[:12]}...: the weights are damaged or of another model"
        )
    try:
        network.load_state_dict(_our_names(network, safetensors.torch.load(data)))
    except (RuntimeError, safetensors.SafetensorError) as error:
        message = f"{weights_path}: the weights do not fit the network in {CONFIG_FILE}: {one_line(error)}"
        raise CheckpointError(message) from None
    return Model(network.eval().requires_grad_(False).to(device), config)


def _prefix(network: NetworkModule) -> str:
    """What our names of weights have before those of diffusers."""
    return f"{network.diffusers_name}." if network.diffusers_name else ""


def _single_precision(value: torch.Tensor) -> torch.Tensor:
    """A copy as it is saved: weights that a module has twice, under two names, are two."""
    kept = value.detach().float() if value.is_floating_point() else value.detach()
    return kept.cpu().clone(memory_format=torch.contiguous_format)


def _weights_file(network: NetworkModule) -> str:
    return f"{network.diffusers_name}/{DIFFUSERS_WEIGHTS_FILE}" if network.diffusers_name else WEIGHTS_FILE


def _read_weights(path: str, network: NetworkModule) -> tuple[str, bytes]:
    """The path of the weights, and what is there."""
    # Folders from before networks had folders for diffusers hold all weights in one file, under our names.
    for name in dict.fromkeys((_weights_file(network), WEIGHTS_FILE)):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            return files.join(path, name), files.read_bytes(files.join(path, name))
    raise CheckpointError(f"{path}: expected {_weights_file(network)} beside {CONFIG_FILE}, found none")


def _our_names(network: NetworkModule, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    own, prefix = network.state_dict(), _prefix(network)
    return {name if name in own else prefix + name: value for name, value in weights.items()}
