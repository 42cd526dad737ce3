"""Claim: since its velocities are bounded, a Kac flow is followed well in few solver steps (arXiv 2509.21513).

Measured is the Frechet distance of delivered samples to the training images for each solver and step count.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from kac.metrics.distances import frechet_distance
from kac.metrics.features import FeatureSpace
from kac.metrics.statistics import Moments
from kac.sampling import generate
from kac.solvers import Method
from kac.study.subject import Subject
from kac.util.images import delivered

STEPS = (5, 10, 20, 50, 100)
METHODS: tuple[Method, ...] = ("euler", "heun", "ab2")


class SolverPoint(NamedTuple):
    """The quality under one solver and step count."""

    method: Method
    steps: int
    nfe: int
    distances: dict[str, float]  # by feature space


def moments_in(spaces: Sequence[FeatureSpace], parts: Iterable[Tensor]) -> dict[str, Moments]:
    """The moments of delivered samples, which come in parts [rows, *sample], in each feature space."""
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
    methods: Sequence[Method] = METHODS,
    steps: Sequence[int] = STEPS,
) -> Iterator[SolverPoint]:
    """The points of every solver and step count, one at a time.

    Args:
        train: the training images' moments by feature space.
    """
    for method in methods:
        for count in steps:
            ways = subject.sampled(subject.sampling._replace(solver=method, steps=count))
            solutions = (generate(ways.network, x_1, label, ways.sampling) for x_1, label in ways.starts())
            nfe = 0
            made: list[Tensor] = []
            for solution in solutions:
                nfe = solution.nfe
                made.append(delivered(solution.x.cpu()))
            found = moments_in(spaces, made)
            distances = {space.name: frechet_distance(train[space.name], found[space.name]) for space in spaces}
            yield SolverPoint(method, count, nfe, distances)
