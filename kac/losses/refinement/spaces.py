"""Where refinement compares images: pixels at several scales, and features that no evaluation judges by.

What a student was refined in cannot judge it. So the classifier here is another one than an evaluation's (other seed,
other width), and random features come from another network in every update: there is none that could be fooled.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kac.data import Dataset
from kac.metrics.features.classifier import ClassifierRecipe, open_classifier
from kac.metrics.features.space import Pooled, averaged_down
from kac.util.errors import ArgumentError
from kac.util.images import is_image

SpaceName = Literal["pixels", "pooled", "classifier", "random"]

RefinementSpace = Callable[[Tensor, int], list[Tensor]]
"""Samples [batch, *sample] and the update's number to one or several sets of features, each [batch, width]."""

CLASSIFIER = ClassifierRecipe(width=24, seed=1)
"""Neither the width nor the seed of the one that judges."""

RANDOM_WIDTHS = (32, 64, 128)
MAP_SIDE = 4
"""Maps of features are averaged down to this many places a side."""


def check_spaces(names: Sequence[SpaceName], sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse spaces that the data do not have.

    Raises:
        ArgumentError: ``pooled`` for points or images that are too small, ``classifier`` for data of one class.
    """
    if "pooled" in names and not (is_image(sample_shape) and min(sample_shape[1:]) >= Pooled.SIDE):
        expected = f"expected images of at least {Pooled.SIDE} pixels a side"
        raise ArgumentError(f"`refine.spaces` pooled: {expected}, found {list(sample_shape)}")
    if "classifier" in names and num_classes < 2:
        raise ArgumentError("`refine.spaces` classifier: expected data of several classes, found one")


def open_spaces(names: Sequence[SpaceName], data: Dataset, device: torch.device) -> list[RefinementSpace]:
    """The spaces by name, which the data have; the classifier is trained first if the cache has none for this data."""
    return [_OPENERS[name](data, device) for name in names]


def _open_pixels(data: Dataset, device: torch.device) -> RefinementSpace:
    return lambda samples, update: [samples.flatten(1)]


def _open_pooled(data: Dataset, device: torch.device) -> RefinementSpace:
    pooled = Pooled()
    return lambda samples, update: [pooled(samples)]


def _open_classifier(data: Dataset, device: torch.device) -> RefinementSpace:
    body = open_classifier(data, CLASSIFIER)[0].body.requires_grad_(False).to(device)
    return lambda samples, update: _depths(body, averaged_down(samples))


def _open_random(data: Dataset, device: torch.device) -> RefinementSpace:
    def features(samples: Tensor, update: int) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(update)
            layers = _random_layers(tuple(samples.shape[1:]))
        return _depths(layers.requires_grad_(False).to(device), samples)

    return features


_OPENERS: dict[SpaceName, Callable[[Dataset, torch.device], RefinementSpace]] = {
    "pixels": _open_pixels,
    "pooled": _open_pooled,
    "classifier": _open_classifier,
    "random": _open_random,
}


def _random_layers(shape: tuple[int, ...]) -> nn.Sequential:
    """Layers with fresh weights, on the CPU: convolutions for images, the first of which keeps their size."""
    layers: list[nn.Module] = [] if is_image(shape) else [nn.Flatten()]
    width = shape[0] if is_image(shape) else torch.Size(shape).numel()
    for number, out in enumerate(RANDOM_WIDTHS):
        layer = nn.Conv2d(width, out, 3, 1 + (number > 0), padding=1) if is_image(shape) else nn.Linear(width, out)
        nn.init.kaiming_normal_(layer.weight)
        layers += [layer, nn.LeakyReLU(0.2)]
        width = out
    return nn.Sequential(*layers)


def _depths(layers: nn.Sequential, samples: Tensor) -> list[Tensor]:
    """What comes out of every activation: [batch, width] each, maps averaged down."""
    found, values = [], samples
    for layer in layers:
        values = layer(values)
        if isinstance(layer, nn.ReLU | nn.LeakyReLU):
            found.append(averaged_down(values, MAP_SIDE).flatten(1))
    return found
