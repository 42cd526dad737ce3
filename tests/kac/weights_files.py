"""Files of weights for tests, without a file."""

from collections.abc import Mapping

from torch import Tensor

from kac.networks.weight_files import WeightsFile


def file_of(weights: Mapping[str, Tensor]) -> WeightsFile:
    """A file that holds these weights only."""
    return WeightsFile(dict(weights), {}, tuple(weights), "of the file")
