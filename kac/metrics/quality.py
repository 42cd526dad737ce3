"""The table of sample metrics, ``QUALITY``. Each metric is one function and one entry."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from kac.metrics import distances
from kac.metrics.statistics import NEIGHBOURS, Moments, Statistics
from kac.util.errors import ArgumentError, one_line

PIXELS = "pixels"
MEMORISATION_ROWS = 2000
"""The number of samples that are compared with all training images."""

COPIES_BELOW = 0.97
"""Models with a smaller memorisation ratio are reported. With 355 held-out images, the ratio of other real images would
be 1 with a standard error of 0.012."""


@dataclass(frozen=True)
class Metric:
    """A metric that is logged, and how it is displayed."""

    name: str  # the name in MLflow and in stored records
    meaning: str
    heading: str = ""  # the heading of the metric's column in the table; empty if it has no column
    format: str = ".4f"
    better: Literal["lower", "higher", ""] = ""
    is_plotted: bool = False  # whether to plot it against NFE; only for metrics that teachers and students share


@dataclass
class Reference:
    """The real data that samples are compared with."""

    train: dict[str, Statistics]  # statistics of the training images, by feature space
    held_out: Tensor  # pixel features [rows, width] of the first MEMORISATION_ROWS held-out images
    train_pixels: Callable[[], Iterator[Tensor]]  # returns the pixel features of the training images in parts
    floor_count: int | None = None  # number of held-out images, if there are fewer than samples
    held_out_statistics: dict[str, Statistics] | None = None  # of the held-out images, by feature space

    def frechet_distance(self, space: str, moments: Moments, real: Statistics | None = None) -> float:
        """Return the Frechet distance between samples with these moments and the training images, or ``real``.

        Raises:
            ArgumentError: the distance cannot be computed, for example from the moments of one sample.
        """
        try:
            real_moments = (real or self.train[space]).moments
            distance, problem = distances.frechet_distance(real_moments, moments), "it is not finite"
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            distance, problem = math.nan, one_line(error, 120).rstrip(".")
        if not math.isfinite(distance):
            raise ArgumentError(
                f"`features` {space}: the Frechet distance of {moments.count:,} samples cannot be computed from these "
                f"features ({problem}). Use more samples, or a network with fewer features, scaled to about 1."
            )
        return distance

    def distance_to_train(self, pixels: Tensor) -> float:
        """Return the mean distance from the first rows of ``pixels`` [rows, width] to their nearest training images."""
        rows = pixels[:MEMORISATION_ROWS]
        nearest = [distances.nearest_distances(rows, part) for part in self.train_pixels()]
        return float(torch.stack(nearest).amin(0).double().mean())

    @cached_property
    def distance_of_held_out(self) -> float:
        """The ``distance_to_train`` of the held-out images."""
        return self.distance_to_train(self.held_out)


@dataclass
class Evaluated:
    """Statistics of one model's samples, or of real images, and the reference that they are compared with."""

    statistics: dict[str, Statistics]  # by feature space; always includes pixels
    reference: Reference
    label_agreement: float | None = None
    endpoint_error: float | None = None
    nfe: int | None = None  # None for real images
    speed: float | None = None  # images per second
    teacher: dict[str, float] | None = None  # for a student: its teacher's metrics, from the same noise and labels
    _distances: dict[str, float] = field(default_factory=dict)

    def frechet_distance(self, space: str) -> float:
        """Return the Frechet distance to the training images. It is computed once per feature space."""
        if space not in self._distances:
            self._distances[space] = self.reference.frechet_distance(space, self.statistics[space].moments)
        return self._distances[space]


@dataclass(frozen=True)
class QualityMetric(Metric):
    """A metric of samples. If its name contains ``{space}``, there is one metric per feature space.

    ``compute`` takes an ``Evaluated``, and ``space=`` if there is one metric per space. It returns None if the metric
    does not apply.
    """

    compute: Callable[..., float | None] = field(kw_only=True)
    last_space_only: bool = field(default=False, kw_only=True)  # if set, only the last space has a column


def at_floor_count(name: str) -> str:
    """Return the name of the metric ``name`` for only as many samples as there are held-out images."""
    return f"{name}_at_floor_count"


def to_held_out(name: str) -> str:
    """Return the name of the distance ``name``, measured to the held-out instead of the training images."""
    return f"{name}_to_held_out"


def _at_floor_count(samples: Evaluated, space: str) -> float | None:
    statistics = samples.statistics[space]
    if statistics.moments.count == samples.reference.floor_count:
        return samples.frechet_distance(space)
    values = [samples.reference.frechet_distance(space, block) for block in statistics.full_blocks()]
    return sum(values) / len(values) if values else None


def _frechet_ratio(samples: Evaluated, space: str) -> float | None:
    teacher = (samples.teacher or {}).get(f"frechet_distance_{space}")
    return samples.frechet_distance(space) / teacher if teacher else None


def _kernel_distance(samples: Evaluated, space: str) -> float:
    return distances.kernel_distance(samples.reference.train[space].kept, samples.statistics[space].kept)


def _against_held_out(samples: Evaluated, space: str) -> tuple[Statistics, Statistics]:
    """The statistics of the held-out images and of the samples; for the held-out images, of the training images."""
    assert samples.reference.held_out_statistics is not None
    held_out, own = samples.reference.held_out_statistics[space], samples.statistics[space]
    return held_out, samples.reference.train[space] if held_out is own else own


def _frechet_to_held_out(samples: Evaluated, space: str) -> float:
    held_out, compared = _against_held_out(samples, space)
    return samples.reference.frechet_distance(space, compared.moments, held_out)


def _kernel_to_held_out(samples: Evaluated, space: str) -> float:
    held_out, compared = _against_held_out(samples, space)
    return distances.kernel_distance(held_out.kept, compared.kept)


def _precision(samples: Evaluated, space: str) -> float | None:
    return _coverage(samples.statistics[space], samples.reference.train[space])


def _recall(samples: Evaluated, space: str) -> float | None:
    return _coverage(samples.reference.train[space], samples.statistics[space])


def _coverage(rows: Statistics, centres: Statistics) -> float | None:
    return distances.coverage(rows.kept, centres.kept, centres.radii) if len(centres.kept) > NEIGHBOURS else None


def _sliced_wasserstein(samples: Evaluated) -> float:
    return distances.sliced_wasserstein(samples.reference.train[PIXELS].kept, samples.statistics[PIXELS].kept)


def _memorisation(samples: Evaluated) -> float | None:
    floor = samples.reference.distance_of_held_out
    return samples.reference.distance_to_train(samples.statistics[PIXELS].kept) / floor if floor else None


FRECHET = "Frechet distance between the samples and the training images, in {space} features"
AT_FLOOR = (
    "Frechet distance of {count} samples, as many as there are held-out images, in {space} features, averaged over "
    "disjoint blocks of samples; compare it with the row of the held-out images"
)
RATIO = "a student's Frechet distance divided by its teacher's at the same guidance, in {space} features"
KERNEL = "kernel distance (KID) between the samples and the training images, in {space} features"
PRECISION = "fraction of the samples that are near training images (3 nearest neighbours), in {space} features"
RECALL = "fraction of the training images that are near samples (3 nearest neighbours), in {space} features"
HELD_OUT = (
    "between the samples and the held-out images, in {space} features; in the row of the held-out images, between the "
    "training images and the held-out images"
)
SLICED = "squared sliced 2-Wasserstein distance between the pixels of the samples and of the training images"
MEMORISATION = (
    "mean distance from the samples to their nearest training images, divided by the same mean for held-out images; a "
    "value well below 1 means memorisation"
)
AGREEMENT = "fraction of the samples that the classifier assigns to the label they were generated for"
ERROR = "root mean square difference per coordinate from the teacher's images; only a diagnostic"
NFE = "network evaluations per image"
SPEED = "sampling speed of one process, the median over chunks of samples"

QUALITY: list[QualityMetric] = [
    QualityMetric(
        "frechet_distance_{space}", FRECHET, "FD {space}", ".4f", "lower", True, compute=Evaluated.frechet_distance
    ),
    QualityMetric(
        at_floor_count("frechet_distance_{space}"), AT_FLOOR, "FD @{count}", better="lower", compute=_at_floor_count
    ),
    QualityMetric("frechet_ratio_{space}", RATIO, "ratio", ".3f", "lower", compute=_frechet_ratio),
    QualityMetric("kid_{space}", KERNEL, "", ".5f", "lower", compute=_kernel_distance),
    QualityMetric(
        "precision_{space}", PRECISION, "precision", ".3f", "higher", compute=_precision, last_space_only=True
    ),
    QualityMetric("recall_{space}", RECALL, "recall", ".3f", "higher", compute=_recall, last_space_only=True),
    QualityMetric(
        to_held_out("frechet_distance_{space}"),
        f"Frechet distance {HELD_OUT}",
        "FD held-out",
        better="lower",
        compute=_frechet_to_held_out,
        last_space_only=True,
    ),
    QualityMetric(
        to_held_out("kid_{space}"),
        f"kernel distance (KID), which does not depend on the number of images, {HELD_OUT}",
        "KID held-out",
        ".4g",
        "lower",
        compute=_kernel_to_held_out,
        last_space_only=True,
    ),
    QualityMetric("memorisation", MEMORISATION, "memory ratio", ".3f", compute=_memorisation),
    QualityMetric("sliced_wasserstein", SLICED, "sliced W2", ".5f", "lower", compute=_sliced_wasserstein),
    QualityMetric(
        "label_agreement", AGREEMENT, "label agr.", ".4f", "higher", True, compute=attrgetter("label_agreement")
    ),
    QualityMetric("endpoint_error", ERROR, "endpoint err.", ".4f", "lower", compute=attrgetter("endpoint_error")),
    QualityMetric("nfe", NFE, "NFE", ",.0f", "lower", compute=attrgetter("nfe")),
    QualityMetric("images_per_second", SPEED, "images /s", ",.0f", "higher", compute=attrgetter("speed")),
]
"""All metrics of samples, in the order of the table's columns. The table groups columns by feature space."""


def quality_metrics(spaces: Sequence[str], floor_count: int | None = None) -> dict[str, QualityMetric]:
    """Return the metrics for these feature spaces, by name.

    Args:
        floor_count: the number of held-out images, if it is smaller than the number of samples. The metrics then
            include Frechet distances at this count. Otherwise, they include Frechet distances to the held-out images.
    """
    skipped = to_held_out("frechet_distance_{space}") if floor_count else at_floor_count("frechet_distance_{space}")
    filled = []
    for space in spaces:
        for metric in QUALITY:
            if "{space}" in metric.name and metric.name != skipped:
                texts = {name: getattr(metric, name) for name in ("name", "meaning", "heading")}
                has_column = metric.name != to_held_out("kid_{space}") or floor_count
                if not has_column or (metric.last_space_only and space != spaces[-1]):
                    texts["heading"] = ""
                texts = {name: text.format(space=space, count=floor_count) for name, text in texts.items()}
                filled.append(dataclasses.replace(metric, compute=partial(metric.compute, space=space), **texts))
    others = [metric for metric in QUALITY if "{space}" not in metric.name]
    return {metric.name: metric for metric in (*filled, *others)}
