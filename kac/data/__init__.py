"""Datasets: images in [-1, 1] with integer labels, in a training split and a held-out split."""

from kac.data.dataset import DataDescription, Dataset, LabelledImages, all_rows
from kac.data.in_memory import ArrayData
from kac.data.kinds import DataConfig, begin_decoding, open_dataset

__all__ = [
    "ArrayData",
    "DataConfig",
    "DataDescription",
    "Dataset",
    "LabelledImages",
    "all_rows",
    "begin_decoding",
    "open_dataset",
]
