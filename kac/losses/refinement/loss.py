"""The refinement loss: a distance between delivered samples and training images, class by class.

To add a distance, write it in a module of its own, and add it to ``DISTANCES`` and ``DistanceName``. Its name is the
value of ``refine.distance`` and the name of its part of the loss.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kac.losses.refinement.energy import energy_distance, mean_distance
from kac.losses.refinement.spaces import RefinementSpace
from kac.util.images import delivered

DistanceName = Literal["energy"]

DISTANCES: dict[DistanceName, Callable[[Tensor, Tensor, int], Tensor]] = {
    "energy": lambda x, y, update: energy_distance(x, y)
}
"""(samples [n, width], real points [m, width], number of the update) -> distance, a scalar with a gradient.

The number of the update is the seed of random distances.
"""


def refinement_loss(
    samples: Tensor,
    label: Tensor | None,
    real: Tensor,
    real_label: Tensor,
    spaces: Sequence[RefinementSpace],
    class_weight: float,
    num_classes: int,
    update: int = 0,
    distance: DistanceName = "energy",
) -> Tensor:
    """The distance between samples and real images of the same class, averaged over ``spaces``; a scalar.

    Features are divided by the mean distance between real images, so all spaces have equal weight and the energy
    distance is about 1 for samples unrelated to the data.

    Args:
        samples, real: [batch, *sample].
        label, real_label: [batch]. If ``label`` is None, classes are ignored.
        class_weight: distance between images of different classes, in the same unit.
        update: seed of random spaces and distances.
        distance: key of ``DISTANCES``.
    """

    def one_hot(classes: Tensor) -> Tensor:
        return class_weight / 2**0.5 * nn.functional.one_hot(classes, num_classes).to(samples.dtype)

    classes, real_classes = ([], []) if label is None else ([one_hot(label)], [one_hot(real_label)])

    def compare(x: Tensor, y: Tensor) -> Tensor:
        unit = mean_distance(y).detach().clamp(min=1e-6)
        x, y = torch.cat([x / unit, *classes], 1), torch.cat([y / unit, *real_classes], 1)
        return DISTANCES[distance](x, y, update)

    means = [
        torch.stack([compare(*pair) for pair in zip(space(samples, update), space(real, update), strict=True)]).mean()
        for space in spaces
    ]
    return torch.stack(means).mean()


def straight_through(samples: Tensor) -> Tensor:
    """Delivered samples, whose gradient ignores the clipping and rounding."""
    return samples + (delivered(samples) - samples).detach()
