"""How good samples are. A new metric is one function and its line in ``QUALITY``: the table, MLflow, the report and the
plots take it from there.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from kac.data import Dataset, LabelledImages, all_rows


@dataclass(frozen=True)
class Metric:
    """A number that is logged, and how it is shown."""

    name: str  # in MLflow and in records
    meaning: str
    heading: str = ""  # of its column in the table; empty: it has none
    format: str = ".4f"
    better: Literal["lower", "higher", ""] = ""
    is_plotted: bool = False  # against network evaluations; then it must apply to teachers and students


class Reference:
    """The data that samples are judged by: the training images."""

    def __init__(self, data: Dataset) -> None:
        self.train: LabelledImages = all_rows(data.train)

    @cached_property
    def classifier(self) -> "Classifier":
        """Fitted to the training images."""
        return fit_classifier(self.train)


@dataclass
class Judged:
    """Samples of one model, what they cost, and what they are judged by."""

    images: Tensor  # [samples, *sample]
    label: Tensor  # [samples], the labels that they were made for
    nfe: int
    speed: float  # images a second
    reference: Reference
    teacher: "Judged | None" = None  # a student's: its samples are from the same noise and labels
    _scores: dict[str, float | None] = field(default_factory=dict)

    def score(self, name: str) -> float | None:
        """A metric of ``QUALITY``, computed once; None if it does not apply."""
        if name not in self._scores:
            self._scores[name] = QUALITY[name].compute(self)
        return self._scores[name]


@dataclass(frozen=True)
class QualityMetric(Metric):
    """A metric of samples."""

    compute: Callable[[Judged], float | None] = field(kw_only=True)


def frechet_distance(real: Tensor, fake: Tensor, features: nn.Module | None = None) -> float:
    """|mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)) between the features of two sets of samples.

    Args:
        real, fake: [count, *sample], count >= 2.
        features: a module [batch, *sample] -> [batch, num_features] with that attribute; None: the pixels.
    """
    # A copy: set_dtype below reaches the features too.
    network = copy.deepcopy(features) or Pixels(real.shape[1:])
    metric = FrechetInceptionDistance(feature=network, normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def label_agreement(classifier: "Classifier", images: Tensor, label: Tensor) -> float:
    """The share of samples that the classifier gives the label they were made for."""
    return float((classifier(images) == label).double().mean())


def endpoint_error(student: Tensor, teacher: Tensor) -> float:
    """Root mean squared difference per coordinate of two endpoints [batch, *sample] from the same noise."""
    return float((student - teacher).double().square().mean().sqrt())


def _frechet_of(judged: Judged) -> float:
    return frechet_distance(judged.reference.train.images, judged.images)


def _ratio_of(judged: Judged) -> float | None:
    own, teacher = (samples and samples.score("frechet_distance") for samples in (judged, judged.teacher))
    return own / teacher if own and teacher else None


def _agreement_of(judged: Judged) -> float:
    return label_agreement(judged.reference.classifier, judged.images, judged.label)


def _endpoint_error_of(judged: Judged) -> float | None:
    return endpoint_error(judged.images, judged.teacher.images) if judged.teacher else None


def _nfe_of(judged: Judged) -> float:
    return judged.nfe


def _speed_of(judged: Judged) -> float:
    return judged.speed


FRECHET = "Frechet distance of the samples to the training images"
RATIO = "a student's Frechet distance over its teacher's at the same guidance scale"
AGREEMENT = "share of the samples that a classifier of the training images gives the label they were made for"
ERROR = "root mean squared difference per coordinate from the teacher's image"

QUALITY: dict[str, QualityMetric] = {
    metric.name: metric
    for metric in (
        QualityMetric("nfe", "network evaluations per image", "NFE", ",.0f", "lower", compute=_nfe_of),
        QualityMetric("frechet_distance", FRECHET, "Frechet", ".4f", "lower", True, compute=_frechet_of),
        QualityMetric("frechet_ratio", RATIO, "ratio", ".3f", "lower", compute=_ratio_of),
        QualityMetric("label_agreement", AGREEMENT, "label agr.", ".4f", "higher", True, compute=_agreement_of),
        QualityMetric("endpoint_error", ERROR, "endpoint err.", ".4f", "lower", compute=_endpoint_error_of),
        QualityMetric("images_per_second", "sampling speed", "images/s", ",.0f", "higher", compute=_speed_of),
    )
}
"""Every metric of samples by its name, in the order of the table's columns."""

Classifier = Callable[[Tensor], Tensor]
"""Samples [batch, *sample] to labels [batch]."""


def fit_classifier(data: LabelledImages) -> Classifier:
    """A support vector classifier (RBF kernel), from scikit-learn."""
    from sklearn.svm import SVC

    svc = SVC(C=10.0).fit(data.images.flatten(1).numpy(), data.labels.numpy())
    return lambda images: torch.as_tensor(svc.predict(images.flatten(1).numpy()))


class Pixels(nn.Module):
    """The flattened sample itself as its features."""

    def __init__(self, sample_shape: Sequence[int]) -> None:
        super().__init__()
        self.num_features = math.prod(sample_shape)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, num_features]."""
        return images.flatten(1)
