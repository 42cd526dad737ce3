"""Encoded images (PNG, JPEG, WebP, ...) as arrays of one shape."""

import contextlib
import io
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kac.util.errors import DistillKacError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
"""Pillow's names of the channels."""

WORDS = {1: "greyscale", 3: "RGB"}

MOST_PIXELS = 178_956_970
"""Pillow refuses larger images by their headers, before it allocates memory for them."""

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""

HALVING = 2
"""Larger images are halved while they are at least so many times too large."""


class Decoder(NamedTuple):
    """How images become alike.

    Attributes:
        size: side of the square that the middle of each is brought to; None: they are taken as they are.
        channels: 1 or 3, to which each is converted; None: they are taken as they are.
    """

    size: int | None = None
    channels: int | None = None

    def shape_of(self, data: bytes, name: str) -> tuple[int, ...]:
        """The shape [channels, height, width] that this image has, and all that go with it must have."""
        return self._array(data, name).shape

    def decode(self, data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An image as uint8 [channels, height, width] of this ``shape``.

        Raises:
            DistillKacError: it is damaged or of another shape; the message begins with ``name``.
        """
        image = self._array(data, name)
        if image.shape[0] != shape[0]:
            raise DistillKacError(
                f"{name}: expected {WORDS[shape[0]]} as in the first image, found {WORDS[image.shape[0]]}: "
                "`data.channels` 3 makes every image RGB, `data.channels` 1 greyscale"
            )
        if image.shape != shape:
            raise DistillKacError(
                f"{name}: expected {shape[2]}x{shape[1]} as in the first image, found {image.shape[2]}x"
                f"{image.shape[1]}: `data.size` {min(shape[1:])} crops and resizes every image"
            )
        return image

    def _array(self, data: bytes, name: str) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and of damaged metadata
            image = _upright(_open(data, name))
        image = _in_channels(image, name, self.channels)
        if self.size is not None:
            long, short = max(image.size), min(image.size)
            if self.size * self.size * long > MOST_PIXELS * short:
                raise DistillKacError(
                    f"{name}: found an image of {image.width}x{image.height}, too long to bring its short side to "
                    f"`data.size` {self.size}. Crop or remove it"
                )
            image = square(image, self.size)
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def square(image: "Image", size: int) -> "Image":
    """The middle of an image, ``size`` x ``size``, as the field makes it (openai/guided-diffusion, image_datasets.py).

    It is halved by averages of 2x2 while that leaves the short side at least ``size``; then its short side is brought
    to ``size`` by a bicubic filter, and what is beyond the middle square is cut off.
    """
    from PIL.Image import Resampling

    while min(image.size) >= HALVING * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _open(data: bytes, name: str) -> "Image":
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        if image.format == "PNG":
            image.verify()  # the checksums of all its chunks; then it must be opened again
            image = Image.open(io.BytesIO(data))
        image.load()
    except Image.DecompressionBombError:
        raise DistillKacError(
            f"{name}: found an image of more than {MOST_PIXELS // 10**6} million pixels. Make it smaller, or remove it"
        ) from None
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises, the file is at fault
        found = f"{len(data)} bytes that are none" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise DistillKacError(f"{name}: expected an image, found {found}: replace or remove it") from None
    if frames > 1:
        raise DistillKacError(
            f"{name}: found {frames} pictures in one {image.format} file, an animation or several pages. Save each "
            "picture that you want as a file of its own, and remove this one"
        )
    return image


def _upright(image: "Image") -> "Image":
    """The image as its EXIF orientation says; as it is without a tag, or with one that cannot be read."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    orientation = None
    with contextlib.suppress(Exception):  # whatever the parser raises of damaged metadata: the pixels are whole
        orientation = image.getexif().get(ORIENTATION)
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _in_channels(image: "Image", name: str, channels: int | None) -> "Image":
    if image.mode in {"1", "L"}:
        own = 1
    elif image.mode == "RGB" or (image.mode == "P" and "transparency" not in image.info):
        own = 3
    elif image.mode == "F" or image.mode.startswith("I"):
        raise DistillKacError(f"{name}: expected 8 bits a channel, found Pillow's mode {image.mode}: convert it")
    elif channels is None:
        raise DistillKacError(
            f"{name}: expected greyscale or RGB, found Pillow's mode {image.mode}: `data.channels` 3 or 1 converts it, "
            "without its transparency"
        )
    else:
        own = channels
    return image.convert(MODES[channels or own])
