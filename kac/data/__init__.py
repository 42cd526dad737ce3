"""Datasets: images in [-1, 1], or their latents, with integer labels, in a training split and a held-out split."""

from kac.data.autoencoder import open_autoencoder
from kac.data.dataset import DataDescription, Dataset, LabelledImages, all_rows
from kac.data.dataset_kinds import DataConfig, begin_decoding, describe_dataset, open_dataset
from kac.data.in_memory import ArrayData

__all__ = [
    "ArrayData",
    "DataConfig",
    "DataDescription",
    "Dataset",
    "LabelledImages",
    "all_rows",
    "begin_decoding",
    "describe_dataset",
    "open_autoencoder",
    "open_dataset",
]
