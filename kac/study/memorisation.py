"""Claim: extreme kinetic energies drive trajectories to near-copies of training images (arXiv 2602.07928).

If so, energy and the distance to the nearest training image go against each other: their rank correlation is negative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ENERGETIC = 0.05
FEWEST = 5
"""Samples of a class below which it has no correlation of its own."""


class EnergyAndNearness(NamedTuple):
    """How kinetic energies go with distances to the training images."""

    correlation: float  # Spearman's, over all samples; NaN if either is constant
    p_value: float
    within_classes: float  # Spearman's, the mean over classes: classes differ in both
    classes: int  # that were large enough
    energetic_ratio: float  # mean distance of the MOST_ENERGETIC share over the mean of all; well below 1: copies


def energy_and_nearness(kinetic_energy: Tensor, distance: Tensor, label: Tensor) -> EnergyAndNearness:
    """Spearman's rank correlation of energies [rows] with distances [rows], over all rows and within labels [rows]."""
    correlation, p_value = spearman(kinetic_energy, distance)
    own = []
    for each in label.unique().tolist():  # type: ignore[no-untyped-call]
        rows = label == each
        found = spearman(kinetic_energy[rows], distance[rows])[0] if int(rows.sum()) >= FEWEST else math.nan
        own += [] if math.isnan(found) else [found]
    top = kinetic_energy >= torch.quantile(kinetic_energy.double(), 1 - MOST_ENERGETIC)
    ratio = (distance[top].double().mean() / distance.double().mean()).item()
    within = sum(own) / len(own) if own else math.nan
    return EnergyAndNearness(correlation, p_value, within, len(own), ratio)


def spearman(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Spearman's rank correlation of [rows] with [rows], and its two-sided p value; NaN where one is constant."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return math.nan, math.nan
    found = spearmanr(a.double().numpy(), b.double().numpy())
    return float(found.statistic), float(found.pvalue)
