"""Claim: guidance in velocity space keeps the energy finite and trades energy for fidelity (arXiv 2509.21513).

u_w = (1 + w) u - w u_null can exceed the speed limit, by a factor of at most 1 + 2w. This module measures how kinetic
energy, label agreement and the number of values out of range grow with w.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kac.metrics.features import FeatureSpace
from kac.metrics.features.classifier import Classifier
from kac.sampling import generate
from kac.study.subject import Subject
from kac.util.images import delivered

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0)


class GuidancePoint(NamedTuple):
    """The effect of one guidance scale."""

    guidance: float
    out_of_range: float  # fraction of the network's output values outside [-1, 1]
    kinetic_energy: float  # integral of |u_w|^2 |dt|, the mean over samples
    agreement: float | None  # fraction of delivered samples that the classifier assigns to their label


def effect_of_guidance(
    subject: Subject, classifier: FeatureSpace | None, scales: Sequence[float] = SCALES
) -> Iterator[GuidancePoint]:
    """Yield the effect of each guidance scale.

    Args:
        classifier: the feature space of the classifier; None: label agreement is not measured.

    Raises:
        ArgumentError: the network has no null label.
    """
    for w in scales:
        outside, values, energy, correct = 0, 0, 0.0, 0
        for x_1, label in subject.starts():
            solution = generate(subject.network, x_1, label, subject.sampling._replace(guidance=w))
            outside += int((solution.x.abs() > 1).sum())
            values += solution.x.numel()
            energy += solution.kinetic_energy.double().sum().item()
            if classifier is not None:
                assert isinstance(classifier.network, Classifier)
                predicted = classifier.network.labels(classifier(delivered(solution.x.cpu())))
                correct += int((predicted == label.cpu()).sum())
        agreement = None if classifier is None else correct / subject.count
        yield GuidancePoint(w, outside / values, energy / subject.count, agreement)
