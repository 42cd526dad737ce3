"""Refinement: training that moves a student's images towards the training images of the same class.

A student that only imitates its teacher cannot become better than the teacher. Refinement generates student images in a
few steps, clips and rounds them, and compares them with training images, using a distance in one or more
feature spaces. The compared points include the classes, so images are compared class by class. The student's objective
remains in the loss as an anchor, because without an anchor precision drops.

Evaluation must not use the features that trained a student. The refinement classifier therefore differs in seed and
width from the evaluation classifier. Random features come from a new network in each update, to prevent overfitting.
The teacher and the classifier are frozen, so the training images' features are computed only once.

To add a distance, write its function in this module, and add it to ``REFINEMENT_DISTANCES`` and ``RefinementDistance``.
The distance's name is the value of ``refine.distance`` and the name of its loss. To add a space, add it to ``SPACES``
and ``SpaceName``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from kac.data import Dataset
from kac.data.dataset import Split
from kac.metrics.classifier import ClassifierRecipe, open_classifier
from kac.metrics.features import Pooled, averaged_down
from kac.model import Model
from kac.precision import Precision
from kac.util.device import to_device
from kac.util.errors import ArgumentError
from kac.util.images import delivered, is_image
from kac.util.options import Kinded, expand_kind

RefinementDistance = Literal["energy", "drift"]
SpaceName = Literal["pixels", "pooled", "teacher", "classifier", "random"]

Features = list[Tensor]
"""One or more sets of features of the same samples, each [batch, width]."""


@dataclass(frozen=True)
class RefinementSpace:
    """A feature space for comparing student images with training images."""

    features: Callable[[Tensor, int], Features]  # of samples [batch, *sample], in an update
    is_frozen: bool = True  # whether the features do not depend on the update
    is_cheap: bool = False  # whether the features are as fast to compute as to keep
    takes_latents: bool = False  # whether the samples are the latents of a model in latents, not the decoded images


CLASSIFIER = ClassifierRecipe(width=24, seed=1)
"""The refinement classifier. Its width and seed differ from those of the evaluation classifier."""

RANDOM_WIDTHS = (32, 64, 128)
MAP_SIDE = 4
"""Feature maps are averaged down to this height and width."""

TEACHER_TIME, TEACHER_LAYERS = 0.1, 5
"""The teacher's features are outputs of at most this many layers, at this time, when images have little noise."""

BANK_IMAGES = 16_384
"""With the teacher's or the classifier's features, at most this many training images are used, so that the features fit
in memory."""

KEPT_VALUES = 2**26
"""Cheap features are kept if there are at most this many values: 256 MiB."""

BLOCK_IMAGES, BLOCK_VALUES = 256, 2**22
"""At most this many training images, and at most this many of their values, per network call: 21 images of 256 x 256 in
colour."""

UNIT_IMAGES = 2048
"""Number of random training images whose mean distance is the unit of a space."""

DRIFT_RADII, DRIFT_STEP = (0.02, 0.05, 0.2), 0.1
"""Radii of the drifting field (arXiv 2602.04770), and its root mean square length at each radius, in units of the mean
distance between real images. With this length, the loss is balanced with the anchor as the energy distance is."""

TINY = 1e-12
"""Lower limit for squared distances and variances, because the square root has an infinite slope at 0, and for
divisors."""


class NoRefinementConfig(Kinded):
    """No refinement."""

    kind: Literal["none"] = Field("none", description="none: only imitate the teacher")


class DataRefinementConfig(Kinded):
    """Refinement on the training images."""

    kind: Literal["data"] = Field("data", description="data: also move student images towards the training images")
    anchor: NonNegativeFloat = Field(0.05, description="weight of the student's objective relative to the distance")
    distance: RefinementDistance = Field(
        "drift",
        json_schema_extra={"neutral": "energy"},
        description="distance between student and training images; drift: towards near training images and away from "
        "near student images; energy: energy distance",
    )
    steps: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 4),
        min_length=1,
        description="step counts for sampling an any-step student, used in turn; other students use their own count",
    )
    spaces: tuple[SpaceName, ...] = Field(
        ("pixels", "teacher"),
        min_length=1,
        json_schema_extra={"neutral": ["pixels"]},
        description="feature spaces for comparing images: pixels; pooled: averages of 4x4 pixels; "
        "teacher: layers of the teacher's network; classifier: layers of a classifier not used in evaluation; random: "
        "layers of a new random network per update",
    )
    real_images: PositiveInt = Field(
        512,
        description="training images per update, over all workers; all of them if there are fewer; a larger set costs "
        f"little and reduces noise; with teacher or classifier, they are drawn from at most {BANK_IMAGES:,} images",
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


def energy_distance(x: Tensor, y: Tensor, within_y: Tensor | None = None) -> Tensor:
    """Estimate the energy distance (G. J. Szekely, M. L. Rizzo, J. Stat. Plan. Inference 143, 2013) of two point sets.

        D = 2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0, and 0 only if X and Y have the same distribution.

    X' and Y' are independent copies of X and Y.

    Example:
        >>> points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(energy_distance(points[:250], points[250:] + 1) > energy_distance(points[:250], points[250:]))
        True

    Args:
        x, y: independent points [n, width] and [m, width], where n >= 2 and m >= 2.
        within_y: E|Y - Y'|, if it is known.

    Returns:
        The unbiased estimate of D, a scalar.
    """
    return 2 * _distances(x, y).mean() - mean_distance(x) - (mean_distance(y) if within_y is None else within_y)


def drifting_field(x: Tensor, y: Tensor) -> Tensor:
    """Return the direction in which each sample should move (Generative Modeling via Drifting, arXiv 2602.04770).

        V_i = sum_jk A_ij B_ik (y_j - x_k)

    A_ij is the affinity of sample i for real point j, and B_ik for another sample k: the square root of the product of
    two softmaxes of -distance / radius, over i and over all j and k. So each sample moves towards near real points and
    away from near samples. V is scaled to a root mean square length of ``DRIFT_STEP``, and summed over ``DRIFT_RADII``.
    Before it is scaled, V is 0 on average if samples and real points have the same distribution.

    Args:
        x, y: samples [n, width] and real points [m, width], where n >= 2.
    """
    to_itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    away = torch.cat([_distances(x, y), _distances(x, x).masked_fill(to_itself, math.inf)], 1)
    field = torch.zeros_like(x)
    for radius in DRIFT_RADII:
        affinity = ((-away / radius).softmax(0) * (-away / radius).softmax(1)).sqrt()
        real, own = affinity[:, : len(y)], affinity[:, len(y) :]
        v = real * own.sum(1, keepdim=True) @ y - own * real.sum(1, keepdim=True) @ x
        field += DRIFT_STEP * v / v.square().sum(1).mean().sqrt().clamp(min=TINY)
    return field


def drift_loss(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared distance from samples x to the fixed points x + V, where V is their drifting field.

    The gradient moves the samples along V. The value itself is nearly constant, because the length of V is.
    """
    with torch.no_grad():
        target = x + drifting_field(x, y)
    return (x - target).square().sum(1).mean()


REFINEMENT_DISTANCES: dict[RefinementDistance, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "energy": lambda x, y, within_y, update: energy_distance(x, y, within_y),
    "drift": lambda x, y, within_y, update: drift_loss(x, y),
}
"""Map samples x [n, width], real points y [m, width], the mean distance between real points, and the update (a seed for
random distances) to a scalar."""


class RealPoints(NamedTuple):
    """Features of real images, with their classes, in units of the mean distance between real images."""

    points: Tensor  # [count, width]
    unit: Tensor  # the mean distance between real images, without classes
    mean_distance: Tensor  # the mean distance between real points


class RefinementLoss:
    """The distance between samples and training images of the same class, averaged over feature spaces.

    Features are in units of the mean distance between training images, so all spaces have equal weight, and the energy
    distance is about 1 for samples unrelated to the data.

    Args:
        train: the training images.
        num_classes: number of classes; if 0, classes are ignored.
        distance: key of ``REFINEMENT_DISTANCES``.
        class_weight: distance between images of different classes, in units of the mean distance between real images.
        device: device of the samples.
        latents: the latents of the training images, for spaces that take them; default: the training images.

    Attributes:
        count: number of training images that samples can be compared with.
    """

    def __init__(
        self,
        train: Split,
        spaces: Sequence[RefinementSpace],
        num_classes: int,
        distance: RefinementDistance,
        class_weight: float = 0.5,
        device: torch.device | str = "cpu",
        latents: Split | None = None,
    ) -> None:
        self.latents = latents or train
        self.train, self.spaces, self.num_classes, self.device = train, spaces, num_classes, device
        self.class_weight, self.distance = class_weight, REFINEMENT_DISTANCES[distance]
        self.values_per_image = train.rows(torch.arange(1)).images.numel()
        self.ids = torch.arange(len(train))
        if len(train) > BANK_IMAGES and any(space.is_frozen and not space.is_cheap for space in spaces):
            self.ids = _random_ids(len(train), BANK_IMAGES)
        self.count = len(self.ids)
        is_small = self.count * self.values_per_image <= KEPT_VALUES
        kept = [n for n, space in enumerate(spaces) if space.is_frozen and (is_small or not space.is_cheap)]
        self.kept = {n: self._points(spaces[n], self.ids) for n in kept}

    def __call__(
        self, samples: Tensor, label: Tensor, rows: Tensor, update: int = 0, latents: Tensor | None = None
    ) -> Tensor:
        """Return the distance, a scalar.

        Args:
            samples, label: [batch, *sample], and their classes [batch].
            rows: int64 [n], 0 .. count - 1, the training images to compare with.
            update: update number, the seed of random spaces and distances.
            latents: the latents of the samples, for spaces that take them; default: the samples.
        """
        means = []
        for n, space in enumerate(self.spaces):
            reference = self.kept[n] if n in self.kept else self._points(space, self.ids[rows], update)
            parts = []
            seen = latents if space.takes_latents and latents is not None else samples
            for features, real in zip(space.features(seen, update), reference, strict=True):
                x = self._with_classes(features / real.unit, label)
                y = real.points[to_device(rows, self.device)] if n in self.kept else real.points
                parts.append(self.distance(x, y, real.mean_distance, update))
            means.append(torch.stack(parts).mean())
        return torch.stack(means).mean()

    @torch.no_grad()
    def _points(self, space: RefinementSpace, ids: Tensor, update: int = 0) -> list[RealPoints]:
        blocks, labels = [], []
        for block in torch.split(ids, max(1, min(BLOCK_IMAGES, BLOCK_VALUES // self.values_per_image))):
            images, label = (self.latents if space.takes_latents else self.train).rows(block)
            blocks.append(space.features(to_device(images, self.device), update))
            labels.append(to_device(label, self.device))
        found, unit_rows = [], to_device(_random_ids(len(ids), UNIT_IMAGES), self.device)
        for parts in zip(*blocks, strict=True):
            features = torch.cat(parts)
            unit = mean_distance(features[unit_rows]).clamp(min=1e-6)
            points = self._with_classes(features / unit, torch.cat(labels))
            found.append(RealPoints(points, unit, mean_distance(points[unit_rows])))
        return found

    def _with_classes(self, features: Tensor, label: Tensor) -> Tensor:
        if self.num_classes == 0:
            return features
        one_hot = nn.functional.one_hot(label, self.num_classes).to(features.dtype)
        return torch.cat([features, self.class_weight / 2**0.5 * one_hot], 1)


def _random_ids(count: int, most: int) -> Tensor:
    """At most ``most`` of the numbers 0 .. count - 1, in random order, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]


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


class SpaceInputs(NamedTuple):
    """What feature spaces are made of."""

    data: Dataset  # images
    device: torch.device
    teacher: Callable[[], Model]  # loads the teacher, whose network becomes part of its space
    precision: Precision = Precision()  # of the teacher's network


def open_spaces(names: Sequence[SpaceName], inputs: SpaceInputs) -> list[RefinementSpace]:
    """Open the named spaces, which must pass ``check_spaces``. Trains the classifier if it is not in the cache."""
    return [SPACES[name](inputs) for name in names]


def _open_classifier(inputs: SpaceInputs) -> RefinementSpace:
    body = open_classifier(inputs.data, CLASSIFIER)[0].body.requires_grad_(False).to(inputs.device)
    return RefinementSpace(lambda samples, update: _depths(body, averaged_down(samples)))


def _open_teacher(inputs: SpaceInputs) -> RefinementSpace:
    """The outputs of some of the teacher's layers, from first to last, for images without noise, all of one label.

    A feature map is divided into cells, and each cell contributes its mean and standard deviation. The mean does not
    show whether a surface is smooth, patterned or noisy; the standard deviation does.
    """
    found: Features = []
    has_sides = is_image(inputs.data.description.sample_shape)

    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim == 3 and has_sides:  # the tokens [batch, side * side, channels] of a transformer
            hidden = hidden.transpose(1, 2).unflatten(2, (math.isqrt(hidden.shape[1]), -1))
        found.extend(_means_and_deviations(hidden.float()))

    teacher, config = inputs.teacher()
    teacher.guide = None
    layers = teacher.to(inputs.device).eval().requires_grad_(False).feature_layers()
    for position in torch.linspace(0, len(layers) - 1, min(TEACHER_LAYERS, len(layers))).round().int().tolist():
        layers[position].register_forward_hook(keep)
    network = inputs.precision.model_copy(update={"compile": False}).wrap(teacher)
    # A teacher of classes only has not learned the null label.
    any_class = 0 if config.conditioning == "classes" or teacher.null_label is None else teacher.null_label

    def features(samples: Tensor, update: int) -> Features:
        label = torch.full((len(samples),), any_class, device=samples.device)
        network(samples, torch.full((), TEACHER_TIME, device=samples.device), label)
        kept = list(found)
        found.clear()  # do not keep the graph of the samples
        return kept

    return RefinementSpace(features, takes_latents=True)


def _open_random(inputs: SpaceInputs) -> RefinementSpace:
    def features(samples: Tensor, update: int) -> Features:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(update)
            layers = _random_layers(tuple(samples.shape[1:])).requires_grad_(False)
        for weight in layers.parameters():
            weight.data = to_device(weight.data, inputs.device)
        return _depths(layers, samples)

    return RefinementSpace(features, is_frozen=False)


SPACES: dict[SpaceName, Callable[[SpaceInputs], RefinementSpace]] = {
    "pixels": lambda inputs: RefinementSpace(lambda samples, update: [samples.flatten(1)], is_cheap=True),
    "pooled": lambda inputs: RefinementSpace(lambda samples, update: [Pooled()(samples)], is_cheap=True),
    "teacher": _open_teacher,
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


def _depths(layers: nn.Sequential, samples: Tensor) -> Features:
    """Return the outputs of the activation layers, [batch, width] each. Feature maps are averaged to ``MAP_SIDE``."""
    features, values = [], samples
    for layer in layers:
        values = layer(values)
        if isinstance(layer, nn.ReLU | nn.LeakyReLU):
            features.append(averaged_down(values, MAP_SIDE).flatten(1))
    return features


def _means_and_deviations(hidden: Tensor) -> Features:
    """Return the means and standard deviations of a map's ``MAP_SIDE`` x ``MAP_SIDE`` cells, each [batch, width].

    Maps of at most this size, and outputs that are not maps, are only flattened.
    """
    mean = averaged_down(hidden, MAP_SIDE)
    if mean.shape == hidden.shape:
        return [hidden.flatten(1)]
    variance = averaged_down(hidden.square(), MAP_SIDE) - mean.square()
    return [mean.flatten(1), variance.clamp(min=TINY).sqrt().flatten(1)]


def mean_distance(x: Tensor) -> Tensor:
    """Return the mean distance between distinct points of x [n, width], a scalar."""
    n = len(x)
    return _distances(x, x).masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0).sum() / (n * (n - 1))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distances between the points x [n, width] and y [m, width]: [n, m].

    The gradient of the matrix product is many times faster than the gradient of torch.cdist. The points are centred,
    because the computation subtracts large squares.
    """
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=TINY).sqrt()
