"""Counter-based noise and labels: the noise and the label of sample i depend only on (seed, i).

Each sample has its own section of the random stream of NumPy's Philox generator. This stream is the same in all NumPy
versions and on all platforms, so a sample does not depend on batches, shards, processes or machines. All numbers are
drawn on the CPU in float64, and rounded once at the end.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kac.path import Path

NOISE_STREAM, LABEL_STREAM, DATA_STREAM = 0, 1, 2
WORDS_PER_COUNT = 4  # 64-bit numbers that Philox4x64 generates per counter value


def uniforms(seed: int, stream: int, ids: range, width: int) -> Tensor:
    """Return uniforms in (0, 1): [len(ids), width], float64. Row i depends only on (seed, stream, ids[i], width)."""
    if ids.step != 1:
        raise ValueError(f"`ids` is {ids}, but must be a range of step 1.")
    counts = -(-width // WORDS_PER_COUNT)
    bits = np.random.Philox(key=[seed, stream], counter=ids.start * counts)
    words = bits.random_raw(len(ids) * counts * WORDS_PER_COUNT).reshape(len(ids), counts * WORDS_PER_COUNT)[:, :width]
    return torch.from_numpy(((words >> 12) + 0.5) * 2.0**-52)


def noise(path: Path, seed: int, ids: range, sample_shape: Sequence[int]) -> Tensor:
    """Return the noise x_1 of the samples ``ids``: [len(ids), *sample_shape], float32."""
    return path.point(0.0, 1.0, noise_uniforms(path, seed, ids, sample_shape)).float()


def noise_uniforms(path: Path, seed: int, ids: range, sample_shape: Sequence[int]) -> Tensor:
    """Return the uniforms that determine the noise of ``ids``: [uniforms_per_coordinate, len(ids), *sample_shape]."""
    per_coordinate, size = path.uniforms_per_coordinate, math.prod(sample_shape)
    draws = uniforms(seed, NOISE_STREAM, ids, per_coordinate * size)
    return draws.reshape(len(ids), per_coordinate, *sample_shape).movedim(1, 0)


def labels(seed: int, ids: range, class_frequencies: Sequence[float]) -> Tensor:
    """Draw the labels of the samples ``ids`` with the probabilities ``class_frequencies``: [len(ids)], int64."""
    edges = torch.tensor(class_frequencies, dtype=torch.float64).cumsum(0)[:-1]
    return torch.searchsorted(edges, uniforms(seed, LABEL_STREAM, ids, 1)[:, 0].contiguous(), right=True)


def data_points(seed: int, ids: range, count: int, intervals: int) -> tuple[Tensor, Tensor]:
    """Draw a data index below ``count`` and an interval below ``intervals`` for each id of a forward rollout."""
    draws = uniforms(seed, DATA_STREAM, ids, 2)
    return (draws[:, 0] * count).long(), (draws[:, 1] * intervals).long()
