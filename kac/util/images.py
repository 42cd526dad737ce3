"""Delivered samples: a model's output as the user gets it.

Images are clipped to [-1, 1] and rounded to 8 bits, as is usual before metrics are computed. Samples that are not
images, such as points in the plane, are unchanged.
"""

import torch
from torch import Tensor


def is_image(sample_shape: tuple[int, ...]) -> bool:
    """Return whether samples of this shape are images [channels, height, width]. All other samples are points."""
    return len(sample_shape) == 3


def delivered(samples: Tensor) -> Tensor:
    """Round a model's images [batch, *sample] to the 8-bit grid in [-1, 1]. Return points unchanged."""
    return from_bytes(to_bytes(samples)) if is_image(tuple(samples.shape[1:])) else samples


def to_bytes(images: Tensor) -> Tensor:
    """Clip images [batch, channels, height, width] to [-1, 1], and convert them to uint8 from 0 to 255."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]. ``to_bytes`` is the exact inverse."""
    return images.float() / 127.5 - 1
