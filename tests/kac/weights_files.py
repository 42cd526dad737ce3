"""A ``WeightsFile`` for tests that needs no file on the disk."""

from collections.abc import Mapping

from torch import Tensor

from kac.networks.weight_files import WeightsFile


def file_of(weights: Mapping[str, Tensor]) -> WeightsFile:
    """Return a ``WeightsFile`` that holds only these weights."""
    return WeightsFile(dict(weights), {}, tuple(weights), "of the file")
