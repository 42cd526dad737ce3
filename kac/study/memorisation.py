"""Claim: extreme kinetic energies drive trajectories to near-copies of training images (arXiv 2602.07928).

If this is true, the rank correlation of energy and the distance to the nearest training image is negative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ENERGETIC = 0.05
MIN_CLASS_SAMPLES = 5
"""Classes with fewer samples are left out of the correlation within classes."""


class EnergyAndNearness(NamedTuple):
    """The relation between kinetic energies and distances to the training images."""

    correlation: float  # Spearman's, over all samples; NaN if either is constant
    p_value: float
    within_classes: float  # Spearman's within each class, the mean over classes, which differ in energy and distance
    classes: int  # number of classes with enough samples
    energetic_ratio: float  # mean distance of the MOST_ENERGETIC fraction, divided by that of all; far below 1: copies


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
    """Return Spearman's rank correlation of [rows] and [rows] with its two-sided p-value; NaN if one is constant."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return math.nan, math.nan
    result = spearmanr(a.double().numpy(), b.double().numpy())
    return float(result.statistic), float(result.pvalue)
