"""Autoencoders of diffusers, and the latents of a dataset of images.

A folder has ``config.json`` and ``diffusion_pytorch_model.safetensors``, as the ``vae`` folder of a diffusers pipeline.
Latents are scaled as the config says: z = (encode(x) - shift_factor) * scaling_factor. ``AutoencoderKL`` encodes to the
mean of its posterior. Latents are identified by the hashes of the images and of the autoencoder, because their last
digits depend on the machine that encodes them.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kac.data.dataset import Contents, DataDescription, Dataset, Source, Unit
from kac.util import files
from kac.util.device import default_device
from kac.util.diffusers_files import load_files
from kac.util.errors import ArgumentError, CheckpointError
from kac.util.fingerprint import fingerprint
from kac.util.images import is_image

FILES = CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")

CALL_IMAGES, CALL_VALUES = 256, 2**22
"""Maximum number of images, and of their values, per network call. One call takes 21 colour images of 256 x 256.
The size is fixed, because another size would change the last digits of the latents."""

UNIT_CALLS = 64
"""Network calls per task that encodes images. On a GPU, each task starts a process."""

CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
PROBE_SIDE = 512
"""Width of the image, without values, from which the shape of the latents is inferred."""


class Autoencoder:
    """The autoencoder in a folder, which is a local path or S3 prefix. Only safetensors are read.

    Raises:
        ArgumentError: a file is missing or damaged, or the model has another class.
    """

    def __init__(self, folder: str) -> None:
        self.option = f"`data.autoencoder` {folder}"
        try:
            contents = {name: files.read_bytes(files.join(folder, name)) for name in FILES}
            name = json.loads(contents[CONFIG_FILE]).get("_class_name")
        except (FileNotFoundError, NotADirectoryError):
            raise ArgumentError(f"{self.option} lacks {' or '.join(FILES)}. Give an autoencoder's folder.") from None
        except (ValueError, AttributeError):
            raise ArgumentError(f"{self.option} has a damaged {CONFIG_FILE}. Copy the folder again.") from None
        if name not in CLASSES:
            raise ArgumentError(f"{self.option} has a model of class {name}. Choose one of {', '.join(CLASSES)}.")
        self.sha256 = fingerprint({name: hashlib.sha256(data).hexdigest() for name, data in contents.items()})
        try:
            self.network, report = load_files(name, contents)
        except CheckpointError as error:
            raise ArgumentError(f"{self.option} cannot be loaded ({error}). Copy it again.") from None
        if report["missing_keys"]:
            raise ArgumentError(f"{self.option} lacks weights, such as {min(report['missing_keys'])}. Copy it again.")
        self.network.eval().requires_grad_(False)
        config = self.network.config
        if not config.get("scaling_factor"):
            advice = "Set it to 1 / (standard deviation of the latents)"
            raise ArgumentError(f"{self.option} has no scaling_factor in {CONFIG_FILE}. {advice}.")
        self.channels = config.in_channels
        with torch.device("meta"):
            probe = torch.empty(1, self.channels, PROBE_SIDE, PROBE_SIDE)
            latent = encode_images(type(self.network).from_config(config), probe)
        self.latent_channels, self.factor = latent.shape[1], PROBE_SIDE // latent.shape[2]

    def encode(self, images: Tensor) -> Tensor:
        """Return the scaled latents [batch, *latent] of images [batch, *image] in [-1, 1]."""
        network, size = self.network.to(images.device), self.call_size(images.shape[1:])
        return torch.cat([encode_images(network, part) for part in torch.split(images, size)])

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of scaled latents, with gradients. Their values can be beyond [-1, 1]."""
        network, size = self.network.to(latents.device), self.call_size(self.image_shape(latents.shape[1:]))
        parts = torch.split(latents, size)
        if latents.requires_grad:  # keep the latents, not the decoder's activations: 1.8 GB per image of 256 x 256
            return torch.cat([checkpoint(decode_latents, network, part, **CHECKPOINT) for part in parts])
        return torch.cat([decode_latents(network, part) for part in parts])

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the latents of images. Raises ``ArgumentError`` if the images do not fit."""
        if not is_image(tuple(shape)):
            raise ArgumentError(f"{self.option} encodes images, but the data are points. Remove this option.")
        channels, height, width = shape
        if channels != self.channels:
            raise ArgumentError(
                f"{self.option} takes images of {self.channels} channels, but the images have {channels}. Set "
                f"`data.channels` to {self.channels}, or choose another autoencoder."
            )
        if height % self.factor or width % self.factor:
            raise ArgumentError(
                f"{self.option} takes images with sides divisible by {self.factor}, but the images have {width}x"
                f"{height} pixels. Set `data.size` to a multiple of {self.factor}, or choose another autoencoder."
            )
        return (self.latent_channels, height // self.factor, width // self.factor)

    def image_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the images of latents."""
        return (self.channels, shape[1] * self.factor, shape[2] * self.factor)

    def call_size(self, shape: Sequence[int]) -> int:
        """Return the number of images of this shape per network call."""
        return max(1, min(CALL_IMAGES, CALL_VALUES // math.prod(shape)))


def encode_images(network: Any, images: Tensor) -> Tensor:
    """Return the scaled latents. ``AutoencoderKL`` returns latents as a distribution."""
    with torch.no_grad():
        latents = network.encode(images)[0]
    mean = latents if isinstance(latents, Tensor) else latents.mean
    return (mean - (network.config.get("shift_factor") or 0.0)) * network.config.scaling_factor  # type: ignore[no-any-return]


def decode_latents(network: Any, latents: Tensor) -> Tensor:
    """Return the images of scaled latents."""
    shift = network.config.get("shift_factor") or 0.0
    return network.decode(latents / network.config.scaling_factor + shift).sample  # type: ignore[no-any-return]


open_autoencoder = functools.lru_cache(maxsize=2)(Autoencoder)
"""Return the autoencoder in a folder, loaded once per process."""


@dataclass(frozen=True)
class LatentSource(Source):
    """The latents of a dataset of images. ``root`` is the autoencoder's folder."""

    open_images: Callable[[], Dataset]
    dtype: ClassVar[str] = "float32"

    def stamps(self) -> Iterator[files.Stamp]:
        """Yield nothing, because the hash of the latents is in the cache's key."""
        return iter(())

    def describe(self) -> DataDescription:
        """Return the description of the latents, which are not encoded for this."""
        images, autoencoder = self.open_images().description, open_autoencoder(self.root)
        shape = autoencoder.latent_shape(images.sample_shape)
        sha256 = fingerprint({"images": images.sha256, "autoencoder": autoencoder.sha256})
        return images.model_copy(update={"sample_shape": shape, "sha256": sha256})

    def contents(self) -> Contents:
        """Return the labels of the training images, followed by those of the held-out images."""
        images, description = self.open_images(), self.describe()
        rows = UNIT_CALLS * open_autoencoder(self.root).call_size(images.description.sample_shape)
        splits = {"train": images.train, "held_out": images.held_out}
        units = [
            Unit(min(rows, len(split) - start), (name, start, min(start + rows, len(split))))
            for name, split in splits.items()
            for start in range(0, len(split), rows)
        ]
        return Contents(
            shape=description.sample_shape,
            labels=torch.cat([split.labels for split in splits.values()]).numpy(),
            held_out=np.arange(description.train + description.held_out) >= description.train,
            units=units,
            **description.model_dump(include={"num_classes", "split", "class_names", "warnings", "sha256"}),
        )

    def decode(self, content: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the latents of a unit in one block."""
        split, start, stop = content
        images = getattr(self.open_images(), split).rows(torch.arange(start, stop)).images
        yield open_autoencoder(self.root).encode(images.to(default_device())).cpu().numpy()
