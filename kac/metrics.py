"""How good samples are: Frechet distance, label agreement, endpoint error."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from kac.data import Dataset


class Pixels(nn.Module):
    """The identity as a feature map: the flattened sample itself."""

    def __init__(self, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features = int(torch.Size(sample_shape).numel())

    def forward(self, images: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, num_features]."""
        return images.flatten(1)


def frechet_distance(real: Tensor, fake: Tensor, features: nn.Module | None = None) -> float:
    """|mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)) between the features of two sets of samples.

    Args:
        real, fake: [count, *sample], count >= 2.
        features: a module [batch, *sample] -> [batch, num_features] with that attribute; None: the pixels.
    """
    # A copy: set_dtype below reaches the features too.
    network = copy.deepcopy(features) or Pixels(tuple(real.shape[1:]))
    metric = FrechetInceptionDistance(feature=network, normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


Classifier = Callable[[Tensor], Tensor]
"""Samples [batch, *sample] to labels [batch]."""


def fit_classifier(data: Dataset) -> Classifier:
    """A support vector classifier (RBF kernel) of the real data, from scikit-learn."""
    from sklearn.svm import SVC

    svc = SVC(C=10.0).fit(data.images.flatten(1).numpy(), data.labels.numpy())
    return lambda images: torch.as_tensor(svc.predict(images.flatten(1).numpy()))


def label_agreement(classifier: Classifier, images: Tensor, label: Tensor) -> float:
    """The share of samples that the classifier gives the label they were made for."""
    return float((classifier(images) == label).double().mean())


def endpoint_error(student: Tensor, teacher: Tensor) -> float:
    """Root mean squared difference per coordinate of two endpoints [batch, *sample] from the same noise."""
    return float((student - teacher).double().square().mean().sqrt())
