"""Decode image files (PNG, JPEG, WebP, ...) to arrays of one shape."""

import contextlib
import io
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kac.data.dataset import Source, reading
from kac.util.errors import DistillKacError

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
"""Pillow's image modes, by the number of channels."""

CHANNEL_NAMES = {1: "greyscale", 3: "RGB"}

MOST_PIXELS = 178_956_970
"""Pillow rejects images above this number of pixels before it allocates memory. Its message contains the number."""

ORIENTATION = 0x0112
"""The EXIF tag that contains the camera's orientation."""

TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
"""Pillow's names of the operations that turn an image upright, for orientations 2 to 8. Orientation 1 is upright."""

BLOCK_BYTES = 2**24
"""Approximate size of a block of decoded images. A block has at least one image."""


class Decoder(NamedTuple):
    """Decodes images, and converts them to one size and one number of channels."""

    size: int | None = None  # crop each image to its central square and resize it to this width; None: no change
    channels: int | None = None  # convert each image to this number of channels, 1 or 3; None: no change

    def shape_of(self, data: bytes, name: str) -> tuple[int, ...]:
        """Return the shape [channels, height, width] of the decoded image."""
        return self._array(data, name).shape

    def decode(self, data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the image as a uint8 array of ``shape``. Error messages begin with ``name``."""
        image = self._array(data, name)
        if image.shape[0] != shape[0]:
            problem = f"is {CHANNEL_NAMES[image.shape[0]]}, but the first image is {CHANNEL_NAMES[shape[0]]}"
            raise DistillKacError(f"{name} {problem}. Set `data.channels` to 3 for RGB or 1 for greyscale images.")
        if image.shape != shape:
            raise DistillKacError(
                f"{name} has {image.shape[2]}x{image.shape[1]} pixels, but the first image has {shape[2]}x{shape[1]}. "
                f"Set `data.size`, for example to {min(shape[1:])}, to crop and resize all images."
            )
        return image

    def _array(self, data: bytes, name: str) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images and damaged metadata
            image = _upright(_open(data, name))
        image = _convert(image, name, self.channels)
        if self.size is not None:
            long, short = max(image.size), min(image.size)
            if self.size * self.size * long > MOST_PIXELS * short:
                raise DistillKacError(
                    f"{name} ({image.width}x{image.height} pixels) is too long and narrow for its short side to be "
                    f"resized to `data.size` {self.size}. Crop or remove the image."
                )
            image = _square(image, self.size)
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class EncodedSource(Source):
    """Files of encoded images. ``size`` and ``channels`` are passed to ``Decoder``."""

    size: int | None
    channels: int | None

    @abstractmethod
    def encoded(self, content: Any) -> Iterator[tuple[str, bytes]]:
        """Yield each image of a unit: its name for error messages, and its encoded bytes."""

    def shape_of_first(self, content: Any) -> tuple[int, ...]:
        """Return the shape [channels, height, width] of the first image of a unit."""
        name, data = next(self.encoded(content))
        return Decoder(self.size, self.channels).shape_of(data, name)

    def decode(self, content: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images of one unit, uint8, in blocks [rows, *shape]."""
        decoder, images = Decoder(self.size, self.channels), self.encoded(content)
        rows = max(1, BLOCK_BYTES // int(np.prod(shape)))
        while block := [decoder.decode(data, name, shape) for name, data in islice(images, rows)]:
            yield np.stack(block)


def _square(image: "Image", size: int) -> "Image":
    """Return the central square of an image, resized to ``size``, as openai/guided-diffusion does (image_datasets.py).

    While the short side is at least twice ``size``, a 2x2 box filter halves the image. A bicubic filter then resizes
    the short side to ``size``, and the ends of the long side are cropped.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _open(data: bytes, name: str) -> "Image":
    from PIL import Image, UnidentifiedImageError

    with reading(name, "an undamaged image", "Replace or remove it."):
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            raise ValueError(f"its {len(data):,} bytes have no known format") from None
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        if image.format == "PNG":
            image.verify()  # verifies the checksums of all chunks; the image must be opened again afterwards
            image = Image.open(io.BytesIO(data))
        image.load()
    if frames > 1:
        raise DistillKacError(f"{name} contains {frames} images in one {image.format} file. Save one image per file.")
    return image


def _upright(image: "Image") -> "Image":
    """Return the image turned according to its EXIF orientation, or unchanged if the orientation is not readable."""
    from PIL.Image import Transpose

    orientation: Any = None
    with contextlib.suppress(Exception):  # the parser may raise anything on damaged metadata; the pixels are intact
        orientation = image.getexif().get(ORIENTATION)
    is_turned = isinstance(orientation, int) and 2 <= orientation <= 8
    return image.transpose(Transpose[TURNS[orientation - 2]]) if is_turned else image


def _convert(image: "Image", name: str, channels: int | None) -> "Image":
    """Return the image with 1 or 3 channels."""
    own = {"1": 1, "L": 1, "RGB": 3, "P": 3}.get(image.mode)
    if image.mode == "P" and "transparency" in image.info:
        own = None
    if image.mode == "F" or image.mode.startswith("I"):
        raise DistillKacError(
            f"{name} does not have 8 bits per channel (Pillow's mode is {image.mode}). Convert the image to 8 bits."
        )
    if not own and not channels:
        raise DistillKacError(
            f"{name} is neither greyscale nor RGB (its mode in Pillow is {image.mode}). Set `data.channels` to 3 or 1 "
            "to convert all images, which drops transparency."
        )
    return image.convert(MODES[channels or own or 3])
