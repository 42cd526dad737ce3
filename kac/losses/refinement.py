"""Refinement: training that moves a student's images towards the training images of the same class.

A student that only imitates its teacher cannot become better than the teacher. Refinement generates student images in a
few steps, clips and rounds them, and compares them with training images, using a distance in one or more
feature spaces. The compared points include the classes, so images are compared class by class. The student's objective
remains in the loss as an anchor, because without an anchor precision drops.

Evaluation must not use the features that trained a student. The refinement classifier therefore differs in seed and
width from the evaluation classifier. Random features come from a new network in each update, to prevent overfitting.

To add a distance, write its function in this module, and add it to ``REFINEMENT_DISTANCES`` and ``RefinementDistance``.
The distance's name is the value of ``refine.distance`` and the name of its loss. To add a space, add it to ``SPACES``
and ``SpaceName``.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from kac.data import Dataset
from kac.metrics.classifier import ClassifierRecipe, open_classifier
from kac.metrics.features import Pooled, averaged_down
from kac.util.errors import ArgumentError
from kac.util.images import delivered, is_image
from kac.util.options import Kinded, expand_kind

RefinementDistance = Literal["energy"]
SpaceName = Literal["pixels", "pooled", "classifier", "random"]

RefinementSpace = Callable[[Tensor, int], list[Tensor]]
"""Maps samples [batch, *sample] and the update number to one or more sets of features, each [batch, width]."""

CLASSIFIER = ClassifierRecipe(width=24, seed=1)
"""The refinement classifier. Its width and seed differ from those of the evaluation classifier."""

RANDOM_WIDTHS = (32, 64, 128)
MAP_SIDE = 4
"""Feature maps are averaged down to this height and width."""

TINY = 1e-12
"""Lower limit for squared distances, because the slope of the square root is infinite at 0."""


class NoRefinementConfig(Kinded):
    """No refinement."""

    kind: Literal["none"] = Field("none", description="none: only imitate the teacher")


class DataRefinementConfig(Kinded):
    """Refinement on the training images."""

    kind: Literal["data"] = Field("data", description="data: also move student images towards the training images")
    anchor: NonNegativeFloat = Field(0.05, description="weight of the student's objective relative to the distance")
    distance: RefinementDistance = Field("energy", description="distance between student and training images")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 4),
        min_length=1,
        description="step counts for sampling an any-step student, used in turn; other students use their own count",
    )
    spaces: tuple[SpaceName, ...] = Field(
        ("pixels",),
        min_length=1,
        description="feature spaces for comparing images: pixels; pooled: averages of 4x4 pixels; "
        "classifier: layers of a classifier not used in evaluation; random: layers of a new random network per update",
    )
    real_images: PositiveInt = Field(
        512, description="training images per update, over all workers; a larger set costs little and reduces noise"
    )
    class_weight: NonNegativeFloat = Field(
        0.5,
        description="distance between classes, relative to the mean distance between training images; "
        "unused for unconditional students",
    )


RefinementConfig = Annotated[
    NoRefinementConfig | DataRefinementConfig,
    Field(discriminator="kind", description="how to improve the student beyond its teacher"),
    BeforeValidator(expand_kind),
]
"""The config of any refinement. The string "data" is short for a ``DataRefinementConfig`` with default values."""


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Estimate the energy distance (G. J. Szekely, M. L. Rizzo, J. Stat. Plan. Inference 143, 2013) of two point sets.

        D = 2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0, and 0 only if X and Y have the same distribution.

    X' and Y' are independent copies of X and Y.

    Example:
        >>> points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(energy_distance(points[:250], points[250:] + 1) > energy_distance(points[:250], points[250:]))
        True

    Args:
        x, y: independent points [n, width] and [m, width], where n >= 2 and m >= 2.

    Returns:
        The unbiased estimate of D, a scalar.
    """
    return 2 * _distances(x, y).mean() - mean_distance(x) - mean_distance(y)


REFINEMENT_DISTANCES: dict[RefinementDistance, Callable[[Tensor, Tensor, int], Tensor]] = {
    "energy": lambda x, y, update: energy_distance(x, y)
}
"""Map samples [n, width], real points [m, width] and the update (a seed for random distances) to a scalar."""


def refinement_loss(
    samples: Tensor,
    label: Tensor | None,
    real: Tensor,
    real_label: Tensor,
    spaces: Sequence[RefinementSpace],
    class_weight: float,
    num_classes: int,
    update: int = 0,
    distance: RefinementDistance = "energy",
) -> Tensor:
    """Return the scalar distance between samples and real images of the same class, averaged over ``spaces``.

    Features are in units of the mean distance between real images, so all spaces have equal weight, and the energy
    distance is about 1 for samples unrelated to the data.

    Args:
        samples, real: [batch, *sample].
        label, real_label: [batch]. If ``label`` is None, classes are ignored.
        class_weight: distance between images of different classes, in units of the mean distance between real images.
        update: update number, the seed of random spaces and distances.
        distance: key of ``REFINEMENT_DISTANCES``.
    """

    def one_hot(classes: Tensor) -> Tensor:
        return class_weight / 2**0.5 * nn.functional.one_hot(classes, num_classes).to(samples.dtype)

    classes, real_classes = ([], []) if label is None else ([one_hot(label)], [one_hot(real_label)])

    def compare(x: Tensor, y: Tensor) -> Tensor:
        unit = mean_distance(y).detach().clamp(min=1e-6)
        x, y = torch.cat([x / unit, *classes], 1), torch.cat([y / unit, *real_classes], 1)
        return REFINEMENT_DISTANCES[distance](x, y, update)

    means = [
        torch.stack([compare(*pair) for pair in zip(space(samples, update), space(real, update), strict=True)]).mean()
        for space in spaces
    ]
    return torch.stack(means).mean()


def straight_through(samples: Tensor) -> Tensor:
    """Return ``delivered(samples)``. The gradient ignores the clipping and rounding."""
    return samples + (delivered(samples) - samples).detach()


def check_spaces(names: Sequence[SpaceName], sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ``ArgumentError`` if ``pooled`` gets points or small images, or ``classifier`` gets only one class."""
    if "pooled" in names and not (is_image(sample_shape) and min(sample_shape[1:]) >= Pooled.SIDE):
        needs = f"images of at least {Pooled.SIDE}x{Pooled.SIDE} pixels, not samples of shape {list(sample_shape)}"
        raise ArgumentError(f"`refine.spaces` pooled needs {needs}. Choose other spaces.")
    if "classifier" in names and num_classes < 2:
        raise ArgumentError("`refine.spaces` classifier needs several classes. Choose other spaces.")


def open_spaces(names: Sequence[SpaceName], data: Dataset, device: torch.device) -> list[RefinementSpace]:
    """Open the named spaces, which must pass ``check_spaces``. Trains the classifier if it is not in the cache."""
    return [SPACES[name](data, device) for name in names]


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
    "pixels": lambda data, device: lambda samples, update: [samples.flatten(1)],
    "pooled": lambda data, device: lambda samples, update: [Pooled()(samples)],
    "classifier": _open_classifier,
    "random": _open_random,
}
"""The function that opens each space, by the space's name."""


def _random_layers(shape: tuple[int, ...]) -> nn.Sequential:
    """Create random layers on the CPU: convolutions with strides 1, 2, 2 for images, linear layers for points."""
    layers: list[nn.Module] = [] if is_image(shape) else [nn.Flatten()]
    width = shape[0] if is_image(shape) else torch.Size(shape).numel()
    for number, out in enumerate(RANDOM_WIDTHS):
        layer = nn.Conv2d(width, out, 3, 1 + (number > 0), padding=1) if is_image(shape) else nn.Linear(width, out)
        nn.init.kaiming_normal_(layer.weight)
        layers += [layer, nn.LeakyReLU(0.2)]
        width = out
    return nn.Sequential(*layers)


def _depths(layers: nn.Sequential, samples: Tensor) -> list[Tensor]:
    """Return the outputs of the activation layers, [batch, width] each. Feature maps are averaged to ``MAP_SIDE``."""
    features, values = [], samples
    for layer in layers:
        values = layer(values)
        if isinstance(layer, nn.ReLU | nn.LeakyReLU):
            features.append(averaged_down(values, MAP_SIDE).flatten(1))
    return features


def mean_distance(x: Tensor) -> Tensor:
    """Return the mean distance between distinct points of x [n, width], a scalar."""
    n = len(x)
    return _distances(x, x).masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0).sum() / (n * (n - 1))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distances between the points x [n, width] and y [m, width]: [n, m].

    The gradient of the matrix product is many times faster than the gradient of torch.cdist. The computation uses
    float64, because it subtracts large squares.
    """
    dtype, x, y = x.dtype, x.double(), y.double()
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=TINY).sqrt().to(dtype)
