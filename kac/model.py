"""Model folders. A folder contains the EMA weights in float32 and ``config.json``, which is written last.

MODEL/config.json         everything needed to build, sample and trace the model
MODEL/model.safetensors   the weights

For a network from diffusers, a subfolder replaces ``model.safetensors``. diffusers can load this subfolder with
``from_pretrained(MODEL, subfolder="unet")`` or ``"transformer"``:

MODEL/unet/diffusion_pytorch_model.safetensors   the weights, named as in diffusers
MODEL/unet/config.json                           diffusers' own config
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import safetensors.torch
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from kac.data import DataConfig, Dataset, describe_dataset, open_autoencoder, open_dataset
from kac.networks import Conditioning, NetworkConfig, NetworkModule, build_network, outline_network
from kac.path import PathConfig
from kac.solvers import KnotGrid
from kac.util import files
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError, one_line
from kac.util.fingerprint import fingerprint, hashed_values, with_neutral_values
from kac.util.images import delivered
from kac.util.options import Options

if TYPE_CHECKING:
    from kac.sampling import Samples

WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
SCHEMA_VERSION = 1

GUIDE_PREFIX = "guide."
"""The weights of a teacher's guide are stored with the teacher's weights, under names with this prefix."""

DATA_CHANGED = (
    "The dataset has changed, or an older version of distillkac read it: older versions sorted numbered class "
    "folders as 1, 10, 2 and did not rotate photographs upright. Train the teacher again on these data."
)
"""Error text for data that differ from a model's training data."""


class ModelConfig(Options):
    """A model's properties and origin."""

    schema_version: int = Field(SCHEMA_VERSION, strict=True)
    kind: Literal["teacher", "student"]
    network: NetworkConfig
    path: PathConfig
    data: DataConfig = Field(description="the teacher's training data, and where they are stored")
    data_sha256: str
    autoencoder_sha256: str | None = Field(None, description="hash of the autoencoder of `data`; None: works in pixels")
    sample_shape: tuple[PositiveInt, ...]
    num_classes: PositiveInt
    class_frequencies: tuple[float, ...] = Field(description="fraction of the training images in each class")
    class_names: tuple[str, ...] = Field((), description="class names, by label; empty if the classes are unnamed")
    conditioning: Conditioning = Field(
        "classes_and_null", description="labels that the network saw in training; none: only the null label"
    )
    steps: int | None = Field(
        None, description="number of student steps (an any-step student's default number); None for a teacher"
    )
    knot_grid: KnotGrid = Field("uniform", description="time grid of the student steps")
    guidance: float | None = Field(
        None, description="a student's guidance scale (its default, if the student accepts several); None for a teacher"
    )
    guidance_scales: tuple[float, ...] = Field((), description="guidance scales in training, if there were several")
    refined_in: tuple[str, ...] = Field((), description="feature spaces in which a student was refined")
    has_guide: bool = Field(False, description="whether a teacher's weights include a guide, for autoguidance")
    weights_sha256: str = ""
    fingerprint: str = Field("", description="fingerprint of the spec that produced the model")
    teacher_sha256: str | None = Field(None, description="sha256 of the teacher's weights; None for a teacher")
    store_fingerprint: str | None = Field(None, description="fingerprint of the store that a student was trained on")

    @model_validator(mode="after")
    def _names_every_class(self) -> Self:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"`class_names` has {len(self.class_names)} names for {self.num_classes} classes.")
        return self

    @property
    def is_any_step(self) -> bool:
        """Whether this is a student for any number of steps: its network takes a step's end time as an input."""
        return self.kind == "student" and "end_time" in self.network.conditions

    @property
    def takes_guidance(self) -> bool:
        """Whether this is a student for several guidance scales: its network takes the scale as an input."""
        return self.kind == "student" and "guidance" in self.network.conditions


def teacher_config(
    network: NetworkConfig,
    path: PathConfig,
    data: DataConfig,
    fingerprint: str = "",
    conditioning: Conditioning = "classes_and_null",
) -> ModelConfig:
    """Return a teacher's config, including its dataset's properties. Raises the same errors as ``open_dataset``."""
    dataset = describe_dataset(data)
    return ModelConfig(
        kind="teacher",
        network=network,
        path=path,
        data=data,
        data_sha256=dataset.sha256,
        autoencoder_sha256=open_autoencoder(data.autoencoder).sha256 if data.autoencoder else None,
        **dataset.model_dump(include={"sample_shape", "num_classes", "class_frequencies", "class_names"}),
        conditioning=conditioning,
        fingerprint=fingerprint,
    )


def learned_data(path: str, model: ModelConfig) -> Dataset:
    """Return the training data of the model in the folder ``path``; for a student, its teacher's training data.

    Raises:
        DistillKacError: the data or the autoencoder have changed since training, or ``open_dataset`` fails.
    """
    learned_images(path, model)
    return open_dataset(model.data)


def learned_images(path: str, model: ModelConfig) -> Dataset:
    """Return the images of ``learned_data``: the same dataset, except that latents are replaced by their images."""
    decoder_of(model)
    sha256 = describe_dataset(model.data).sha256
    if sha256 != model.data_sha256:
        raise DistillKacError(
            f"{path} was trained on data with sha256 {model.data_sha256[:12]}, but the data now have sha256 "
            f"{sha256[:12]}. {DATA_CHANGED}"
        )
    return open_dataset(model.data.images)


def decoder_of(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Return the function that maps a model's samples to images, with gradients. For a model in pixels: the identity.

    Raises:
        DistillKacError: the autoencoder is missing, or has changed since training.
    """
    if not model.data.autoencoder:
        return lambda samples: samples
    autoencoder = open_autoencoder(model.data.autoencoder)
    if autoencoder.sha256 != model.autoencoder_sha256:
        raise DistillKacError(f"{autoencoder.option} has changed since the model was trained. Restore its two files.")
    return autoencoder.decode


def deliver(model: ModelConfig, samples: Tensor) -> Tensor:
    """Return the delivered images of a model's samples [batch, *sample], on the CPU."""
    return delivered(decoder_of(model)(samples).cpu())


def image_shape(model: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a model's delivered images."""
    folder = model.data.autoencoder
    return open_autoencoder(folder).image_shape(model.sample_shape) if folder else model.sample_shape


class Model(NamedTuple):
    """A loaded network with its config."""

    network: NetworkModule
    config: ModelConfig

    def sample(
        self,
        count: int,
        *,
        steps: int | None = None,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        guidance: float | None = None,
    ) -> "Samples":
        """Draw images. ``jobs.sample`` draws the same images if its options are the same.

        Args:
            count: number of images.
            steps: student steps or teacher solver steps; default: the student's own number, or 100 for a teacher.
            labels: classes, repeated in turn; default: drawn with the class frequencies of the data.
            seed: seed of the noise and the classes.
            guidance: guidance scale; default: the student's own scale, or 0 for a teacher.

        Returns:
            ``images`` [count, *image_shape] in [-1, 1], and their ``label`` [count].

        Raises:
            ArgumentError: the model does not support the steps, classes or guidance, or a number is below 1.
            DivergedError: the model generates NaN or infinity.

        Example:
            >>> student = load_model("runs/student")  # doctest: +SKIP
            >>> student.sample(16, steps=1).images.shape  # doctest: +SKIP
            torch.Size([16, 1, 8, 8])
        """
        from kac import sampling  # imported here, because kac.sampling imports this module
        from kac.precision import Precision

        for name, number in (("count", count), ("steps", steps)):
            if number is not None and number < 1:
                raise ArgumentError(f"`{name}` is {number}, but should be at least 1.")
        is_teacher, classes = self.config.kind == "teacher", None if labels is None else tuple(labels)
        choose = sampling.teacher_sampling if is_teacher else sampling.student_sampling
        how = choose(self.config, steps=steps, guidance=guidance)
        return sampling.draw(self, how, Precision(), seed, count, sampling.BATCH_SIZE, classes)


def save_model(path: str, config: ModelConfig, weights: dict[str, torch.Tensor]) -> ModelConfig:
    """Write a model with the EMA ``weights`` to the folder ``path``. Return the config with the weights' sha256.

    Raises:
        CheckpointError: the weights do not match the config's network.
    """
    network = _with_guide(config, lambda: outline_network(config.network, config.sample_shape, config.num_classes))
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in network.state_dict().items()}:
        raise CheckpointError(f"Cannot save {path}: the names or shapes of the weights do not match the network.")
    prefix = f"{network.diffusers_name}." if network.diffusers_name else ""
    tensors = {}
    for name, weight in weights.items():
        value = weight.detach().float() if weight.is_floating_point() else weight.detach()
        # safetensors rejects tensors that share memory, so copy each tensor.
        tensors[name.removeprefix(prefix)] = value.cpu().clone(memory_format=torch.contiguous_format)
    # The file's hash identifies the model. Equal weights with other options, such as another scale of the time, are a
    # different model.
    metadata = {"network": fingerprint(hashed_values(config.network)), **({"format": "pt"} if prefix else {})}
    data = _with_sorted_metadata(safetensors.torch.save(tensors, metadata))
    config = config.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
    files.write_bytes(files.join(path, _weights_file(network)), data)
    if network.diffusers_name:
        diffusers_model: Any = network.get_submodule(network.diffusers_name)
        subfolder = files.join(path, network.diffusers_name)
        files.write_bytes(files.join(subfolder, CONFIG_FILE), diffusers_model.to_json_string().encode())
    files.write_bytes(files.join(path, CONFIG_FILE), json.dumps(config.model_dump(mode="json"), indent=2).encode())
    return config


def _with_sorted_metadata(data: bytes) -> bytes:
    """Sort the metadata in the header of a safetensors file, which otherwise has a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    return b"".join((data[:8], text, memoryview(data)[end:]))


def load_config(path: str) -> ModelConfig:
    """Return a model folder's config. Raises ``CheckpointError`` if the config is missing or invalid."""
    try:
        raw = files.read_bytes(files.join(path, CONFIG_FILE))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        advice = "Train a model, or correct the path."
        raise CheckpointError(f"{path} is not a model folder: it has no {CONFIG_FILE}. {advice}") from None
    try:
        values: dict[str, Any] = json.loads(raw)
        version = values.get("schema_version")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path}/{CONFIG_FILE} is not a JSON object. Copy the folder again.") from None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        limit = f"this distillkac reads versions up to {SCHEMA_VERSION}. Install a newer distillkac."
        raise CheckpointError(f"{path} has schema version {version}, but {limit}")
    try:
        return ModelConfig(**with_neutral_values(ModelConfig, values))
    except ArgumentError as error:
        raise CheckpointError(f"{path}/{CONFIG_FILE} is not a valid model config. {error}") from None


def load_teacher_config(path: str) -> ModelConfig:
    """Return the config of the teacher in ``path``. Raises ``CheckpointError`` for students and unreadable configs."""
    config = load_config(path)
    if config.kind != "teacher":
        raise CheckpointError(f"{path} is a {config.kind}, not a teacher. Use the folder of its teacher.")
    return config


def load_model(path: str, device: torch.device | str = "cpu") -> Model:
    """Load the model folder ``path``, with the network in evaluation mode and without gradients.

    Raises:
        CheckpointError: a file is missing, damaged or invalid. The message names the file.
    """
    config = load_config(path)
    try:
        samples = config.sample_shape, config.num_classes
        network = _with_guide(config, lambda: build_network(config.network, *samples, config.path.build()))
    except ArgumentError as error:
        raise CheckpointError(f"{path}/{CONFIG_FILE} describes an impossible network. {error}") from None
    weights_path, data = _read_weights(path, network)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != config.weights_sha256:
        raise CheckpointError(
            f"{weights_path} is damaged or is from a different model: its sha256 is {sha256[:12]}, but {CONFIG_FILE} "
            f"expects {config.weights_sha256[:12]}. Copy the folder again."
        )
    own = network.state_dict()
    try:
        weights = safetensors.torch.load(data)
        named = {name if name in own else f"{network.diffusers_name}.{name}": value for name, value in weights.items()}
        network.load_state_dict(named)
    except (RuntimeError, safetensors.SafetensorError) as error:
        message = f"{weights_path} does not fit the network in {CONFIG_FILE}: {one_line(error)}"
        raise CheckpointError(message) from None
    return Model(network.eval().requires_grad_(False).to(device), config)


def _with_guide(config: ModelConfig, build: Callable[[], NetworkModule]) -> NetworkModule:
    """Return a new network, with another new network as its guide if the model has a guide."""
    network = build()
    if config.has_guide:
        network.guide = build()
    return network


def main_weights(network: NetworkModule) -> dict[str, torch.Tensor]:
    """Return a network's weights without those of its guide."""
    return {name: weight for name, weight in network.state_dict().items() if not name.startswith(GUIDE_PREFIX)}


def _weights_file(network: NetworkModule) -> str:
    return f"{network.diffusers_name}/{DIFFUSERS_WEIGHTS_FILE}" if network.diffusers_name else WEIGHTS_FILE


def _read_weights(path: str, network: NetworkModule) -> tuple[str, bytes]:
    """Return the path and the content of the weights file."""
    # Older versions wrote no diffusers subfolder. They wrote all weights to WEIGHTS_FILE, under this project's names.
    for name in (_weights_file(network), WEIGHTS_FILE):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            return files.join(path, name), files.read_bytes(files.join(path, name))
    raise CheckpointError(f"{path} has no {_weights_file(network)}, only {CONFIG_FILE}. Copy the folder again.")
