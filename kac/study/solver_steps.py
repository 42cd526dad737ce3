"""Claim: a Kac flow needs few solver steps, because its velocities are bounded (arXiv 2509.21513).

This module measures the Frechet distance between delivered samples and the training images for each solver and number
of steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from kac.metrics.distances import frechet_distance
from kac.metrics.features import FeatureSpace
from kac.metrics.statistics import Moments
from kac.sampling import generate
from kac.solvers import STEPPERS, Method
from kac.study.subject import Subject
from kac.util.images import delivered

STEPS = (5, 10, 20, 50, 100)


class SolverPoint(NamedTuple):
    """The quality with one solver and one number of steps."""

    method: Method
    steps: int
    nfe: int
    distances: dict[str, float]  # Frechet distances by feature space


def moments_in(spaces: Sequence[FeatureSpace], parts: Iterable[Tensor]) -> dict[str, Moments]:
    """Return the moments of delivered samples, given in parts [rows, *sample], in each feature space."""
    moments: dict[str, Moments] = {}
    for part in parts:
        for space in spaces:
            rows = space(part)
            moments.setdefault(space.name, Moments(rows.shape[1])).add(rows)
    return moments


def quality_by_solver(
    subject: Subject,
    spaces: Sequence[FeatureSpace],
    train: dict[str, Moments],
    steps: Sequence[int] = STEPS,
) -> Iterator[SolverPoint]:
    """Yield the quality for each combination of solver and number of steps.

    Args:
        train: the moments of the training images, by feature space.
    """
    for method in STEPPERS:
        for count in steps:
            sampling = subject.sampling._replace(solver=method, steps=count)
            nfe = 0
            parts: list[Tensor] = []
            for x_1, label in subject.starts():
                solution = generate(subject.network, x_1, label, sampling)
                nfe = solution.nfe
                parts.append(delivered(solution.x.cpu()))
            moments = moments_in(spaces, parts)
            distances = {space.name: frechet_distance(train[space.name], moments[space.name]) for space in spaces}
            yield SolverPoint(method, count, nfe, distances)
