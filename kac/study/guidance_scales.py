"""Claim: guidance in velocity space keeps the energy finite, and buys fidelity with it (arXiv 2509.21513).

u_w = (1 + w) u - w u_null is not bounded by the speed limit, only by (1 + 2w) times it: how energy, labels and values
out of range grow with w is measured here.
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
    """What a guidance scale does."""

    guidance: float
    out_of_range: float  # share of the network's own values beyond [-1, 1]
    kinetic_energy: float  # the mean over samples of the integral of |u_w|^2 |dt|
    agreement: float | None  # share of delivered samples to which the classifier gives their label


def effect_of_guidance(
    subject: Subject, judge: FeatureSpace | None, scales: Sequence[float] = SCALES
) -> Iterator[GuidancePoint]:
    """The points of the scales, one at a time.

    Args:
        judge: the classifier's features; None: agreement is not judged.

    Raises:
        ArgumentError: the network has no null label.
    """
    for w in scales:
        outside, values, energy, right = 0, 0, 0.0, 0
        for x_1, label in subject.starts():
            solution = generate(subject.network, x_1, label, subject.sampling._replace(guidance=w))
            outside += int((solution.x.abs() > 1).sum())
            values += solution.x.numel()
            energy += solution.kinetic_energy.double().sum().item()
            if judge is not None:
                assert isinstance(judge.network, Classifier)
                named = judge.network.labels(judge(delivered(solution.x.cpu())))
                right += int((named == label.cpu()).sum())
        agreement = None if judge is None else right / subject.count
        yield GuidancePoint(w, outside / values, energy / subject.count, agreement)
