"""Feature spaces of refinement: pixels at two sizes, and features that no evaluation uses.

Evaluation must not use the features of training. The classifier therefore differs in seed and width from the evaluation
classifier. Random features come from a new network in each update, so a student cannot overfit to them.
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
"""(samples [batch, *sample], number of the update) -> one or several sets of features, each [batch, width]."""

CLASSIFIER = ClassifierRecipe(width=24, seed=1)
"""Its width and seed differ from the evaluation classifier."""

RANDOM_WIDTHS = (32, 64, 128)
MAP_SIDE = 4
"""Feature maps are averaged down to this height and width."""


def check_spaces(names: Sequence[SpaceName], sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Check that the feature spaces exist for these data.

    Raises:
        ArgumentError: ``pooled`` with points or too small images, or ``classifier`` with only one class.
    """
    if "pooled" in names and not (is_image(sample_shape) and min(sample_shape[1:]) >= Pooled.SIDE):
        needs = f"needs images of at least {Pooled.SIDE}x{Pooled.SIDE} pixels"
        raise ArgumentError(
            f"`refine.spaces` pooled {needs}, but the samples have shape {list(sample_shape)}. Choose other spaces."
        )
    if "classifier" in names and num_classes < 2:
        raise ArgumentError("`refine.spaces` classifier needs several classes. Choose other spaces.")


def open_spaces(names: Sequence[SpaceName], data: Dataset, device: torch.device) -> list[RefinementSpace]:
    """The named spaces, checked by ``check_spaces``. Trains the classifier if the cache has none for these data."""
    return [SPACES[name](data, device) for name in names]


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


SPACES: dict[SpaceName, Callable[[Dataset, torch.device], RefinementSpace]] = {
    "pixels": _open_pixels,
    "pooled": _open_pooled,
    "classifier": _open_classifier,
    "random": _open_random,
}
"""Functions that open the spaces."""


def _random_layers(shape: tuple[int, ...]) -> nn.Sequential:
    """Randomly initialised layers on the CPU: convolutions of stride 1, 2, 2 for images, linear layers for points."""
    layers: list[nn.Module] = [] if is_image(shape) else [nn.Flatten()]
    width = shape[0] if is_image(shape) else torch.Size(shape).numel()
    for number, out in enumerate(RANDOM_WIDTHS):
        layer = nn.Conv2d(width, out, 3, 1 + (number > 0), padding=1) if is_image(shape) else nn.Linear(width, out)
        nn.init.kaiming_normal_(layer.weight)
        layers += [layer, nn.LeakyReLU(0.2)]
        width = out
    return nn.Sequential(*layers)


def _depths(layers: nn.Sequential, samples: Tensor) -> list[Tensor]:
    """The output of every activation, [batch, width] each. Feature maps are averaged down."""
    features, values = [], samples
    for layer in layers:
        values = layer(values)
        if isinstance(layer, nn.ReLU | nn.LeakyReLU):
            features.append(averaged_down(values, MAP_SIDE).flatten(1))
    return features
