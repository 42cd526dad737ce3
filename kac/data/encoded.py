"""Decode image files (PNG, JPEG, WebP, ...) to arrays of one shape."""

import contextlib
import io
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kac.util.errors import DistillKacError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
"""Pillow's modes, by the number of channels."""

CHANNEL_NAMES = {1: "greyscale", 3: "RGB"}

MOST_PIXELS = 178_956_970
"""Pillow refuses larger images by their header, before it allocates memory."""

ORIENTATION = 0x0112
"""The EXIF tag for the orientation of the camera."""

HALVING = 2
"""Images are halved while they are at least this many times too large."""


class Decoder(NamedTuple):
    """Decodes images, and converts them to one size and one number of channels.

    Attributes:
        size: side of the central square that each image is cropped and resized to; None: keep the size.
        channels: 1 or 3, to convert each image to; None: keep the channels.
    """

    size: int | None = None
    channels: int | None = None

    def shape_of(self, data: bytes, name: str) -> tuple[int, ...]:
        """Return the shape [channels, height, width] of the decoded image."""
        return self._array(data, name).shape

    def decode(self, data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the image as uint8 [channels, height, width], which must be ``shape``.

        Raises:
            DistillKacError: the image is damaged or has another shape; the message begins with ``name``.
        """
        image = self._array(data, name)
        if image.shape[0] != shape[0]:
            raise DistillKacError(
                f"{name} is {CHANNEL_NAMES[image.shape[0]]}, but the first image is {CHANNEL_NAMES[shape[0]]}. Set "
                "`data.channels` to 3 to convert all images to RGB, or to 1 for greyscale."
            )
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
                    f"{name} ({image.width}x{image.height} pixels) is too long and narrow to resize its short side to "
                    f"`data.size` {self.size}. Crop or remove it."
                )
            image = square(image, self.size)
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def square(image: "Image", size: int) -> "Image":
    """Return the central square of an image, resized to ``size``, as openai/guided-diffusion does (image_datasets.py).

    While the short side is at least twice ``size``, a 2x2 box filter halves the image. A bicubic filter then resizes
    the short side to ``size``, and the ends of the long side are cropped.
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
            image.verify()  # verifies the checksums of all chunks; the image must be opened again after it
            image = Image.open(io.BytesIO(data))
        image.load()
    except Image.DecompressionBombError:
        raise DistillKacError(
            f"{name} has more than {MOST_PIXELS // 10**6} million pixels. Make it smaller, or remove it."
        ) from None
    except UnidentifiedImageError:
        raise DistillKacError(f"{name} is not an image ({len(data):,} bytes). Replace or remove it.") from None
    except Exception as error:  # noqa: BLE001 - a decoder may raise anything on a damaged file
        raise DistillKacError(f"{name} is a damaged image ({one_line(error)}). Replace or remove it.") from None
    if frames > 1:
        raise DistillKacError(
            f"{name} contains {frames} images, an animation or several pages in one {image.format} file. Save each "
            "image that you want as its own file, and remove this one."
        )
    return image


def _upright(image: "Image") -> "Image":
    """Return the image turned by its EXIF orientation, or unchanged if it has no readable orientation."""
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
    with contextlib.suppress(Exception):  # the parser may raise anything on damaged metadata; the pixels are intact
        orientation = image.getexif().get(ORIENTATION)
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _convert(image: "Image", name: str, channels: int | None) -> "Image":
    """Return the image with 1 or 3 channels."""
    if image.mode in {"1", "L"}:
        own = 1
    elif image.mode == "RGB" or (image.mode == "P" and "transparency" not in image.info):
        own = 3
    elif image.mode == "F" or image.mode.startswith("I"):
        raise DistillKacError(
            f"{name} does not have 8 bits per channel (its mode in Pillow is {image.mode}). Convert it to 8 bits."
        )
    elif channels is None:
        raise DistillKacError(
            f"{name} is neither greyscale nor RGB (its mode in Pillow is {image.mode}). Set `data.channels` to 3 or 1 "
            "to convert all images, which drops transparency."
        )
    else:
        own = channels
    return image.convert(MODES[channels or own])
