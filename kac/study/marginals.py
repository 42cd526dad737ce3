"""Claim: the flow moves noise through the marginals of the path, x_t = f(t) x_0 + K_{g(t)} (arXiv 2506.20641).

At each time, the states of a well-trained teacher have the distribution of data noised to that time. This module
measures the sliced Wasserstein distance between the two, and its floor: the distance between two independent sets of
noised data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kac.data import Dataset
from kac.metrics.distances import sliced_wasserstein
from kac.path import Path
from kac.solvers import knot_times
from kac.study.subject import TIME, ClaimResult, Inputs, panels, png


class Marginal(NamedTuple):
    """The squared sliced 2-Wasserstein distance between states at one time and noised data, with its floor."""

    t: float
    distance: float
    floor: float


def marginal(states: Tensor, t: float, path: Path, data: Dataset, generator: torch.Generator) -> Marginal:
    """Compare states [rows, *sample] at time ``t`` with the same number of training images noised to ``t``."""
    first, second = (noised(path, data, t, len(states), generator).flatten(1) for _ in range(2))
    return Marginal(t, sliced_wasserstein(first, states.flatten(1).float()), sliced_wasserstein(first, second))


def noised(path: Path, data: Dataset, t: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` training images with replacement, and noise them to time ``t``: [count, *sample]."""
    x_0 = data.train.rows(torch.randint(len(data.train), (count,), generator=generator)).images
    return path.sample(x_0, torch.tensor(t), generator).x_t


def measure(inputs: Inputs) -> ClaimResult | str:
    """Compare the stored states at every knot with noised data."""
    stored = inputs.trajectories
    if stored is None:
        return "no `store`"
    if stored.is_forward:
        return "a forward store has noised data instead of the teacher's states"
    if stored.sampling.guidance != 0:
        return "the store has no trajectories without guidance"
    path, generator = inputs.teacher.config.path.build(), torch.Generator().manual_seed(inputs.seed)
    times = knot_times(stored.knots, stored.sampling.knot_grid).tolist()
    found = [
        marginal(stored.read([name])[name], t, path, inputs.data, generator)
        for t, name in zip(times, stored.knot_columns, strict=True)
    ]
    image, worst = found[-1], max(found, key=lambda each: each.distance / each.floor)
    text = (
        f"w = 0: squared sliced W2 {image.distance:.5f} at the image, with a floor of {image.floor:.5f}; "
        f"the largest ratio to the floor is {worst.distance / worst.floor:.1f}, at t = {worst.t:g}"
    )
    metrics = {"image_distance": image.distance, "image_floor": image.floor}
    metrics |= {f"distance/t={each.t:g}": each.distance for each in found}
    values = {"guidance": stored.sampling.guidance, "knots": [each._asdict() for each in found]}
    return ClaimResult(text, values, metrics, _plot(found))


def _plot(found: Sequence[Marginal]) -> bytes:
    figure, (axis,) = panels(1, 1, width=8)
    t = [each.t for each in found]
    axis.plot(t, [each.distance for each in found], "o-", label="teacher's states to noised data")
    axis.plot(t, [each.floor for each in found], "s--", color="grey", label="floor: noised data to noised data")
    axis.set(ylabel="squared sliced W2", yscale="log", title="Marginals of the flow", **TIME)
    axis.legend()
    return png(figure)
