"""Claim: extreme kinetic energies drive trajectories to near-copies of training images (arXiv 2602.07928).

If this is true, the rank correlation between energy and distance to the nearest training image is negative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kac.metrics.distances import nearest_distances
from kac.model import deliver
from kac.sampling import BATCH_SIZE
from kac.study.subject import ClaimResult, Inputs, panels, png

MOST_ENERGETIC = 0.05
MIN_CLASS_SAMPLES = 5
"""Classes with fewer samples than this are left out of the correlation within classes."""


class EnergyAndNearness(NamedTuple):
    """The relation between kinetic energies and distances to the training images."""

    correlation: float  # Spearman's correlation over all samples; NaN if energy or distance is constant
    p_value: float
    within_classes: float  # mean of Spearman's correlation within each class; classes differ in both values
    classes: int  # number of classes with enough samples
    energetic_ratio: float  # mean distance of the MOST_ENERGETIC samples / of all samples; far below 1 for copies


def energy_and_nearness(kinetic_energy: Tensor, distance: Tensor, label: Tensor) -> EnergyAndNearness:
    """Correlate energies [rows] with distances [rows] by rank, over all rows and within each label [rows]."""
    correlation, p_value = spearman(kinetic_energy, distance)
    by_class = []
    for one in label.unique().tolist():  # type: ignore[no-untyped-call]
        rows = label == one
        own = spearman(kinetic_energy[rows], distance[rows])[0] if int(rows.sum()) >= MIN_CLASS_SAMPLES else math.nan
        by_class += [] if math.isnan(own) else [own]
    top = kinetic_energy >= torch.quantile(kinetic_energy.double(), 1 - MOST_ENERGETIC)
    ratio = (distance[top].double().mean() / distance.double().mean()).item()
    within = sum(by_class) / len(by_class) if by_class else math.nan
    return EnergyAndNearness(correlation, p_value, within, len(by_class), ratio)


def spearman(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return Spearman's rank correlation of two tensors [rows] and its two-sided p-value. Constants yield NaN."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return math.nan, math.nan
    result = spearmanr(a.double().numpy(), b.double().numpy())
    return float(result.statistic), float(result.pvalue)


def measure(inputs: Inputs) -> ClaimResult | str:
    """Compare the energies of stored trajectories with the distances of their images to the training images."""
    stored = inputs.trajectories
    if stored is None:
        return "no `store`"
    if stored.is_forward:
        return "a forward store has only the energies of single intervals"
    rows = stored.read(["label", "kinetic_energy", stored.knot_columns[-1]])
    energy, label = rows["kinetic_energy"], rows["label"]
    pixels, w = inputs.pixels, stored.sampling.guidance
    states = torch.split(rows[stored.knot_columns[-1]].float(), BATCH_SIZE)
    samples = torch.cat([pixels(deliver(inputs.teacher.config, part)) for part in states])
    nearest = [nearest_distances(samples, part) for part in pixels.of_training_images(inputs.images)]
    distance = torch.stack(nearest).amin(0)
    found = energy_and_nearness(energy, distance, label)
    text = (
        f"w = {w:g}, {len(distance):,} trajectories, energy against distance to the nearest training image: Spearman "
        f"{found.correlation:+.3f} (p = {found.p_value:.1g}), within classes {found.within_classes:+.3f}; distance of "
        f"the 5 % with the most energy: {found.energetic_ratio:.3f} of the mean"
    )
    metrics = {name: float(value) for name, value in found._asdict().items()}
    picture = _plot(energy, distance, label, found)
    return ClaimResult(text, {"guidance": w, **found._asdict()}, metrics, picture)


def _plot(energy: Tensor, distance: Tensor, label: Tensor, found: EnergyAndNearness) -> bytes:
    """Plot one dot per trajectory, coloured by class."""
    figure, (axis,) = panels(1, 1, width=8)
    dots = axis.scatter(energy.numpy(), distance.numpy(), c=label.numpy(), cmap="tab10", s=8, alpha=0.6)
    figure.colorbar(dots, ax=axis, label="class")
    correlation = f"Spearman {found.correlation:+.3f}, within classes {found.within_classes:+.3f}"
    axis.set(xlabel="kinetic energy of the trajectory", ylabel="distance to the nearest training image")
    axis.set_title(f"Energy and near-copies: {correlation}")
    return png(figure)
