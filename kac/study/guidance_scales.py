"""Claim: guidance in velocity space keeps the energy finite and trades energy for fidelity (arXiv 2509.21513).

u_w = (1 + w) u - w u_null can exceed the speed limit, by a factor of at most 1 + 2w. A teacher with a guide uses the
guide's velocity instead of u_null. This module measures how kinetic energy, label agreement and the fraction of values
outside [-1, 1] grow with w.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kac.conditioning import guidance_problem, known_classes
from kac.metrics.classifier import Classifier
from kac.metrics.features import FeatureSpace
from kac.model import decoder_of
from kac.sampling import generate
from kac.study.subject import ClaimResult, Inputs, Subject, panels, png
from kac.util.images import delivered

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0)


class GuidancePoint(NamedTuple):
    """The effect of one guidance scale."""

    guidance: float
    out_of_range: float  # fraction of the images' values outside [-1, 1], before they are clipped
    kinetic_energy: float  # mean over samples of the integral of |u_w|^2 |dt|
    agreement: float | None  # fraction of delivered samples that the classifier assigns to their label


def effect_of_guidance(
    subject: Subject, classifier: FeatureSpace | None, scales: Sequence[float] = SCALES
) -> Iterator[GuidancePoint]:
    """Yield the effect of each guidance scale on a network with a null label.

    Args:
        classifier: the classifier's feature space. If it is None, label agreement is not measured.
    """
    for w in scales:
        outside, values, energy, correct = 0, 0, 0.0, 0
        for x_1, label in subject.starts():
            solution = generate(subject.network, x_1, label, subject.sampling._replace(guidance=w))
            images = decoder_of(subject.config)(solution.x)
            outside += int((images.abs() > 1).sum())
            values += images.numel()
            energy += solution.kinetic_energy.double().sum().item()
            if classifier is not None:
                assert isinstance(classifier.network, Classifier)
                predicted = classifier.network.labels(classifier(delivered(images.cpu())))
                correct += int((predicted == label.cpu()).sum())
        agreement = None if classifier is None else correct / subject.count
        yield GuidancePoint(w, outside / values, energy / subject.count, agreement)


def measure(inputs: Inputs) -> ClaimResult | str:
    """Sample the teacher at every guidance scale."""
    if reason := guidance_problem(inputs.teacher.config):
        return reason
    has_classes = bool(known_classes(inputs.teacher.config))
    classifier = next((space for space in inputs.spaces if has_classes and isinstance(space.network, Classifier)), None)
    found = list(effect_of_guidance(inputs.teacher_subject(), classifier))
    first, last = found[0], found[-1]
    text = (
        f"w = {first.guidance:g} to {last.guidance:g}: kinetic energy {first.kinetic_energy:.4g} to "
        f"{last.kinetic_energy:.4g}, share of values out of range {first.out_of_range:.2%} to {last.out_of_range:.2%}"
    )
    if first.agreement is not None and last.agreement is not None:
        text += f", label agreement {first.agreement:.2%} to {last.agreement:.2%}"
    values = [point._asdict() for point in found]
    metrics = {
        f"{name}/w={measured['guidance']:g}": value
        for measured in values
        for name, value in measured.items()
        if name != "guidance" and value is not None
    }
    return ClaimResult(text, {"teacher": values}, metrics, _plot(found))


def _plot(found: Sequence[GuidancePoint]) -> bytes:
    labels = {
        "kinetic_energy": "mean kinetic energy",
        "out_of_range": "fraction of raw values outside [-1, 1]",
        **({} if found[0].agreement is None else {"agreement": "label agreement"}),
    }
    figure, axes = panels(1, len(labels))
    for axis, (field, label) in zip(axes, labels.items(), strict=True):
        axis.plot([point.guidance for point in found], [getattr(point, field) for point in found], "o-")
        axis.set(xlabel="guidance scale w", ylabel=label)
        axis.grid(alpha=0.3)
    figure.suptitle("Guidance of the teacher")
    return png(figure)
