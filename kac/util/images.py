"""What is delivered: a model's output as the image that a user gets.

Images are clipped to [-1, 1] and rounded to 8 bits, as the field does before it measures anything. Points of the plane
have no such grid: they are delivered as they are.
"""

import torch
from torch import Tensor


def is_image(sample_shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape are images [channels, height, width]; others are points."""
    return len(sample_shape) == 3


def delivered(samples: Tensor) -> Tensor:
    """A model's output [batch, *sample] as a user gets it: images on the 8-bit grid in [-1, 1], points unchanged."""
    return from_bytes(to_bytes(samples)) if is_image(tuple(samples.shape[1:])) else samples


def to_bytes(images: Tensor) -> Tensor:
    """Images [batch, channels, height, width] of any values to uint8: -1 is 0, 1 is 255, what is beyond is clipped."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]; ``to_bytes`` gives them back exactly."""
    return images.float() / 127.5 - 1
