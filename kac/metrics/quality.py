"""The table of sample metrics, ``QUALITY``. Each metric is one function and one entry."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from kac.metrics import distances
from kac.metrics.statistics import Moments, Statistics
from kac.util.errors import ArgumentError, one_line

PIXELS = "pixels"
NEIGHBOURS = 3
MEMORISATION_ROWS = 2000
"""The number of samples that are compared with all training images."""


@dataclass(frozen=True)
class Metric:
    """A metric that is logged, and how it is displayed."""

    name: str  # in MLflow and in stored records
    meaning: str
    heading: str = ""  # of its column in the table; empty: no column
    format: str = ".4f"
    better: Literal["lower", "higher", ""] = ""
    is_plotted: bool = False  # against network evaluations; only for metrics that teachers and students share


class Reference:
    """The real data that samples are compared with.

    Args:
        train: statistics of the training images, by feature space.
        held_out: pixel features [rows, width] of the first ``MEMORISATION_ROWS`` held-out images.
        train_pixels: returns the pixel features of all training images, in parts [rows, width].
        floor_count: the number of held-out images, if it is smaller than the number of samples.
    """

    def __init__(
        self,
        train: dict[str, Statistics],
        held_out: Tensor,
        train_pixels: Callable[[], Iterator[Tensor]],
        floor_count: int | None = None,
    ) -> None:
        self.train, self.held_out, self.train_pixels, self.floor_count = train, held_out, train_pixels, floor_count
        self._radii: dict[str, Tensor] = {}

    def frechet_distance(self, space: str, moments: Moments) -> float:
        """Return the Frechet distance between the training images and samples with these moments.

        Raises:
            ArgumentError: the eigenvalues of the covariances cannot be computed.
        """
        try:
            distance, problem = distances.frechet_distance(self.train[space].moments, moments), "it is not finite"
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            distance, problem = math.nan, one_line(error, 120).rstrip(".")
        if not math.isfinite(distance):
            raise ArgumentError(
                f"`features` {space}: the Frechet distance cannot be computed from the covariances of these features "
                f"({problem}). Use a network with fewer features per image, scaled to about 1."
            )
        return distance

    def radii(self, space: str) -> Tensor:
        """Return the distance [rows] from each training image to its ``NEIGHBOURS``-th nearest neighbour."""
        if space not in self._radii:
            self._radii[space] = distances.neighbour_radii(self.train[space].kept, NEIGHBOURS)
        return self._radii[space]

    def distance_to_train(self, pixels: Tensor) -> float:
        """Return the mean distance from the first rows of ``pixels`` [rows, width] to their nearest training images."""
        rows = pixels[:MEMORISATION_ROWS]
        nearest = [distances.nearest_distances(rows, part) for part in self.train_pixels()]
        return float(torch.stack(nearest).amin(0).double().mean())

    @cached_property
    def distance_of_held_out(self) -> float:
        """The ``distance_to_train`` of held-out images."""
        return self.distance_to_train(self.held_out)


@dataclass
class Evaluated:
    """Statistics of the samples of one model, or of real images, with the reference to compare them with."""

    statistics: dict[str, Statistics]  # by feature space; always includes pixels
    reference: Reference
    label_agreement: float | None = None
    endpoint_error: float | None = None
    nfe: int | None = None  # None for real images
    speed: float | None = None  # images per second
    teacher: dict[str, float] | None = None  # for a student: its teacher's metrics, from the same noise and labels
    _distances: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of samples."""
        return self.statistics[PIXELS].moments.count

    def frechet_distance(self, space: str) -> float:
        """Return the Frechet distance to the training images, which is computed once."""
        if space not in self._distances:
            own = self.statistics[space].moments
            self._distances[space] = self.reference.frechet_distance(space, own)
        return self._distances[space]


@dataclass(frozen=True)
class QualityMetric(Metric):
    """A metric of samples. If its name contains ``{space}``, there is one metric per feature space.

    ``compute`` takes an ``Evaluated``, and ``space=`` if there is one metric per space. It returns None if the metric
    does not apply.
    """

    compute: Callable[..., float | None] = field(kw_only=True)
    last_space_only: bool = field(default=False, kw_only=True)  # only the last space has a column; all are logged


def _frechet_distance(samples: Evaluated, space: str) -> float:
    return samples.frechet_distance(space)


def _frechet_at_floor_count(samples: Evaluated, space: str) -> float | None:
    if samples.count == samples.reference.floor_count:
        return samples.frechet_distance(space)
    values = [samples.reference.frechet_distance(space, block) for block in samples.statistics[space].full_blocks()]
    return sum(values) / len(values) if values else None


def _frechet_ratio(samples: Evaluated, space: str) -> float | None:
    teacher = (samples.teacher or {}).get(f"frechet_distance_{space}")
    return samples.frechet_distance(space) / teacher if teacher else None


def _kernel_distance(samples: Evaluated, space: str) -> float:
    return distances.kernel_distance(samples.reference.train[space].kept, samples.statistics[space].kept)


def _precision(samples: Evaluated, space: str) -> float | None:
    real, fake = samples.reference.train[space].kept, samples.statistics[space].kept
    return distances.coverage(fake, real, samples.reference.radii(space)) if len(real) > NEIGHBOURS else None


def _recall(samples: Evaluated, space: str) -> float | None:
    real, fake = samples.reference.train[space].kept, samples.statistics[space].kept
    if len(fake) <= NEIGHBOURS:
        return None
    return distances.coverage(real, fake, distances.neighbour_radii(fake, NEIGHBOURS))


def _sliced_wasserstein(samples: Evaluated) -> float:
    return distances.sliced_wasserstein(samples.reference.train[PIXELS].kept, samples.statistics[PIXELS].kept)


def _memorisation(samples: Evaluated) -> float | None:
    reference = samples.reference
    if not reference.distance_of_held_out:
        return None
    return reference.distance_to_train(samples.statistics[PIXELS].kept) / reference.distance_of_held_out


FRECHET = "Frechet distance between the samples and the training images, in {space} features"
AT_FLOOR_COUNT = (
    "Frechet distance of {count} samples, the number of held-out images, in {space} features; compare it with the row "
    "of the held-out images (the mean over disjoint blocks of samples)"
)
RATIO = "a student's Frechet distance divided by its teacher's at the same guidance, in {space} features"
KERNEL = "kernel distance (KID) between the samples and the training images, in {space} features"
PRECISION = "fraction of the samples that are near training images (3 nearest neighbours), in {space} features"
RECALL = "fraction of the training images that are near samples (3 nearest neighbours), in {space} features"
SLICED = "squared sliced 2-Wasserstein distance between the pixels of the samples and of the training images"
MEMORISATION = (
    "mean distance from the samples to their nearest training images, divided by that of held-out images; a value well "
    "below 1 means memorisation"
)
AGREEMENT = "fraction of the samples that the classifier assigns to the label they were generated for"
ERROR = "root mean square difference from the teacher's images per coordinate; a diagnostic"
NFE = "network evaluations per image"
SPEED = "sampling speed of one process, the median over chunks of samples"

QUALITY: list[QualityMetric] = [
    QualityMetric("frechet_distance_{space}", FRECHET, "FD {space}", ".4f", "lower", True, compute=_frechet_distance),
    QualityMetric(
        "frechet_distance_{space}_at_floor_count",
        AT_FLOOR_COUNT,
        "FD @{count}",
        ".4f",
        "lower",
        compute=_frechet_at_floor_count,
    ),
    QualityMetric("frechet_ratio_{space}", RATIO, "ratio", ".3f", "lower", compute=_frechet_ratio),
    QualityMetric("kid_{space}", KERNEL, "", ".5f", "lower", compute=_kernel_distance),
    QualityMetric(
        "precision_{space}", PRECISION, "precision", ".3f", "higher", compute=_precision, last_space_only=True
    ),
    QualityMetric("recall_{space}", RECALL, "recall", ".3f", "higher", compute=_recall, last_space_only=True),
    QualityMetric("sliced_wasserstein", SLICED, "sliced W2", ".5f", "lower", compute=_sliced_wasserstein),
    QualityMetric("memorisation", MEMORISATION, "memory ratio", ".3f", compute=_memorisation),
    QualityMetric(
        "label_agreement",
        AGREEMENT,
        "label agr.",
        ".4f",
        "higher",
        True,
        compute=lambda samples: samples.label_agreement,
    ),
    QualityMetric(
        "endpoint_error", ERROR, "endpoint err.", ".4f", "lower", compute=lambda samples: samples.endpoint_error
    ),
    QualityMetric("nfe", NFE, "NFE", ",.0f", "lower", compute=lambda samples: samples.nfe),
    QualityMetric("images_per_second", SPEED, "images /s", ",.0f", "higher", compute=lambda samples: samples.speed),
]
"""All metrics of samples, in the order of the table's columns, which are grouped by feature space."""


def at_floor_count(name: str) -> str:
    """Return the name of a Frechet distance at the number of held-out images."""
    return f"{name}_at_floor_count"


def quality_metrics(spaces: Sequence[str], floor_count: int | None = None) -> dict[str, QualityMetric]:
    """Return the metrics for these feature spaces, by name.

    Args:
        floor_count: the number of held-out images, if it is smaller than the number of samples. Frechet distances at
            this count are then included.
    """
    of_spaces = [metric for metric in QUALITY if "{space}" in metric.name]
    others = [metric for metric in QUALITY if "{space}" not in metric.name]
    filled = [_for_space(m, space, space == spaces[-1], floor_count) for space in spaces for m in of_spaces]
    return {m.name: m for m in (*filled, *others) if "at_floor_count" not in m.name or floor_count}


def _for_space(metric: QualityMetric, space: str, is_last: bool, floor_count: int | None) -> QualityMetric:
    texts = {
        "name": metric.name,
        "meaning": metric.meaning,
        "heading": "" if metric.last_space_only and not is_last else metric.heading,
    }
    filled = {name: text.format(space=space, count=floor_count) for name, text in texts.items()}
    return dataclasses.replace(metric, compute=partial(metric.compute, space=space), **filled)  # type: ignore[arg-type]
