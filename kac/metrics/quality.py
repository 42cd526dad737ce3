"""The table of what samples are judged by: one function and one line a metric."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from kac.metrics import distances
from kac.metrics.metric import Metric
from kac.metrics.statistics import Moments, Statistics
from kac.util.errors import ArgumentError, one_line

NEIGHBOURS = 3
MEMORISATION_ROWS = 2000
"""So many of the first rows are compared with every training image."""


class Reference:
    """The real data that samples are judged by.

    Args:
        train: of the training images, by feature space.
        held_out: pixel features [rows, width] of held-out images, the first ``MEMORISATION_ROWS`` of them.
        train_pixels: the pixel features of all training images, in parts [rows, width].
        floor_count: held-out images, if these are fewer than the samples.
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

    def width(self, space: str) -> int:
        """Features per row."""
        return self.train[space].width

    def frechet_distance(self, space: str, moments: Moments) -> float:
        """Of rows of these moments to the training images.

        Raises:
            ArgumentError: the covariances in this space have no eigenvalues that can be computed.
        """
        try:
            distance, problem = distances.frechet_distance(self.train[space].moments, moments), "it is not finite"
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            distance, problem = math.nan, one_line(error, 120)
        if not math.isfinite(distance):
            raise ArgumentError(
                f"`features` {space}: the Frechet distance cannot be computed from the covariances of these features "
                f"({problem}). Use a network with fewer features per image, scaled to about 1."
            )
        return distance

    def radii(self, space: str) -> Tensor:
        """How far the training images' neighbours are: [rows]."""
        if space not in self._radii:
            self._radii[space] = distances.neighbour_radii(self.train[space].kept, NEIGHBOURS)
        return self._radii[space]

    def distance_to_train(self, pixels: Tensor) -> float:
        """The mean distance of the first pixels [rows, width] to their nearest training images."""
        rows = pixels[:MEMORISATION_ROWS]
        nearest = [distances.nearest_distances(rows, part) for part in self.train_pixels()]
        return float(torch.stack(nearest).amin(0).double().mean())

    @cached_property
    def distance_of_held_out(self) -> float:
        """``distance_to_train`` of held-out images."""
        return self.distance_to_train(self.held_out)


@dataclass
class Judged:
    """What was gathered of the samples of one model, or of real images, and what they are judged by."""

    statistics: dict[str, Statistics]  # by feature space; pixels always
    reference: Reference
    label_agreement: float | None = None
    endpoint_error: float | None = None
    nfe: int | None = None  # None: real images
    speed: float | None = None  # images a second
    teacher: dict[str, float] | None = None  # a student's: the metrics of its teacher, from the same noise and labels
    _distances: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Samples."""
        return self.statistics[PIXELS].moments.count

    def frechet_distance(self, space: str) -> float:
        """To the training images; computed once for the metrics that need it."""
        if space not in self._distances:
            own = self.statistics[space].moments
            self._distances[space] = self.reference.frechet_distance(space, own)
        return self._distances[space]


@dataclass(frozen=True)
class QualityMetric(Metric):
    """A metric of samples. With ``{space}`` in its name there is one for each feature space.

    ``compute`` takes the samples, and the name of a space if there are several; it returns None if it does not apply.
    """

    compute: Callable[..., float | None] = field(kw_only=True)
    last_space_only: bool = field(default=False, kw_only=True)  # as a column: the others' are logged


def _frechet_of(judged: Judged, space: str) -> float:
    return judged.frechet_distance(space)


def _frechet_at_floor_count(judged: Judged, space: str) -> float | None:
    if judged.count == judged.reference.floor_count:
        return judged.frechet_distance(space)
    found = [judged.reference.frechet_distance(space, block) for block in judged.statistics[space].full_blocks()]
    return sum(found) / len(found) if found else None


def _ratio_of(judged: Judged, space: str) -> float | None:
    teacher = (judged.teacher or {}).get(f"frechet_distance_{space}")
    return judged.frechet_distance(space) / teacher if teacher else None


def _kernel_distance_of(judged: Judged, space: str) -> float:
    return distances.kernel_distance(judged.reference.train[space].kept, judged.statistics[space].kept)


def _precision_of(judged: Judged, space: str) -> float | None:
    real, fake = judged.reference.train[space].kept, judged.statistics[space].kept
    return distances.coverage(fake, real, judged.reference.radii(space)) if len(real) > NEIGHBOURS else None


def _recall_of(judged: Judged, space: str) -> float | None:
    real, fake = judged.reference.train[space].kept, judged.statistics[space].kept
    if len(fake) <= NEIGHBOURS:
        return None
    return distances.coverage(real, fake, distances.neighbour_radii(fake, NEIGHBOURS))


def _sliced_of(judged: Judged) -> float:
    return distances.sliced_wasserstein(judged.reference.train[PIXELS].kept, judged.statistics[PIXELS].kept)


def _memorisation_of(judged: Judged) -> float | None:
    reference = judged.reference
    if not reference.distance_of_held_out:
        return None
    return reference.distance_to_train(judged.statistics[PIXELS].kept) / reference.distance_of_held_out


PIXELS = "pixels"

FRECHET = "Frechet distance of the samples to the training images, in features: {space}"
AT_FLOOR = (
    "Frechet distance at the held-out images' count, {count}, the mean over disjoint blocks: to be compared with their "
    "row; in features: {space}"
)
RATIO = "a student's Frechet distance over its teacher's at the same guidance scale, in features: {space}"
KERNEL = "kernel distance (KID) of the samples to the training images, in features: {space}"
PRECISION = "share of the samples among the training images (3 nearest neighbours), in features: {space}"
RECALL = "share of the training images among the samples (3 nearest neighbours), in features: {space}"
SLICED = "squared sliced 2-Wasserstein distance of the pixels to the training images'"
MEMORISATION = "distance to the nearest training image over that of held-out images; well below 1: memorised"
AGREEMENT = "share of the samples that the classifier gives the label they were made for"
ERROR = "root mean squared difference per coordinate from the teacher's image; a diagnostic"
SPEED = "sampling speed of one process when the samples were drawn, the median over chunks"

QUALITY: list[QualityMetric] = [
    QualityMetric("frechet_distance_{space}", FRECHET, "FD {space}", ".4f", "lower", True, compute=_frechet_of),
    QualityMetric(
        "frechet_distance_{space}_at_floor_count",
        AT_FLOOR,
        "FD @{count}",
        ".4f",
        "lower",
        compute=_frechet_at_floor_count,
    ),
    QualityMetric("frechet_ratio_{space}", RATIO, "ratio", ".3f", "lower", compute=_ratio_of),
    QualityMetric("kid_{space}", KERNEL, "", ".5f", "lower", compute=_kernel_distance_of),
    QualityMetric(
        "precision_{space}", PRECISION, "precision", ".3f", "higher", compute=_precision_of, last_space_only=True
    ),
    QualityMetric("recall_{space}", RECALL, "recall", ".3f", "higher", compute=_recall_of, last_space_only=True),
    QualityMetric("sliced_wasserstein", SLICED, "sliced W2", ".5f", "lower", compute=_sliced_of),
    QualityMetric("memorisation", MEMORISATION, "memory ratio", ".3f", compute=_memorisation_of),
    QualityMetric(
        "label_agreement", AGREEMENT, "label agr.", ".4f", "higher", True, compute=lambda made: made.label_agreement
    ),
    QualityMetric("endpoint_error", ERROR, "endpoint err.", ".4f", "lower", compute=lambda made: made.endpoint_error),
    QualityMetric("nfe", "network evaluations per image", "NFE", ",.0f", "lower", compute=lambda made: made.nfe),
    QualityMetric("images_per_second", SPEED, "images /s", ",.0f", "higher", compute=lambda made: made.speed),
]
"""Every metric of samples, in the order of the table's columns; those of one space stand together."""


def at_floor_count(name: str) -> str:
    """The metric that is metric ``name`` at the held-out images' count, where these are fewer than the samples."""
    return f"{name}_at_floor_count"


def quality_metrics(spaces: Sequence[str], floor_count: int | None = None) -> dict[str, QualityMetric]:
    """The metrics of ``QUALITY`` for these feature spaces by name.

    Args:
        floor_count: held-out images, if these are fewer than the samples: Frechet distances at that count are added.
    """
    of_spaces = [metric for metric in QUALITY if "{space}" in metric.name]
    others = [metric for metric in QUALITY if "{space}" not in metric.name]
    made = [_for_space(m, space, space == spaces[-1], floor_count) for space in spaces for m in of_spaces]
    return {m.name: m for m in (*made, *others) if "at_floor_count" not in m.name or floor_count}


def _for_space(metric: QualityMetric, space: str, is_last: bool, floor_count: int | None) -> QualityMetric:
    heading = "" if metric.last_space_only and not is_last else metric.heading
    filled = {
        name: text.format(space=space, count=floor_count)
        for name, text in {"name": metric.name, "meaning": metric.meaning, "heading": heading}.items()
    }
    return dataclasses.replace(metric, compute=partial(metric.compute, space=space), **filled)  # type: ignore[arg-type]
