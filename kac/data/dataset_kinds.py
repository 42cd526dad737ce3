"""The dataset kinds, and the options that select a dataset.

To add a kind that reads no files, see ``kac/data/in_memory.py``. To add a kind that reads files, write a ``Source``,
register it in ``FILE_KINDS``, and add its name to ``DataKind``.
"""

import dataclasses
import functools
from contextlib import AbstractContextManager
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from kac.data import decoded, in_memory
from kac.data.autoencoder import LatentSource
from kac.data.dataset import DataDescription, Dataset, Source
from kac.data.folder import FolderSource
from kac.data.in_memory import BUNDLED, BundledKind
from kac.data.parquet import ParquetSource
from kac.data.published import Cifar10Source, IdxSource
from kac.util import files
from kac.util.fingerprint import unhashed
from kac.util.imports import ARGUMENTS_HELP, FactoryArguments, ImportPath
from kac.util.options import Kinded, number_of_text
from kac.util.path_options import input_path

DataKind = Literal[BundledKind, "idx", "cifar10", "folder", "parquet", "outside"]

FILE_KINDS: dict[DataKind, type[Source]] = {
    "idx": IdxSource,
    "cifar10": Cifar10Source,
    "folder": FolderSource,
    "parquet": ParquetSource,
}
"""The kinds that read files. Their images are decoded once, into the cache."""


class DataConfig(Kinded):
    """Options that select a dataset and control how it is read."""

    kind: DataKind = Field(
        "digits",
        description=f"{in_memory.HELP}; idx: the four files of MNIST or Fashion-MNIST; cifar10: the Python archive; "
        "folder: ROOT/CLASS/IMAGE or ROOT/{train,test}/CLASS/IMAGE; parquet: a column of images, as in Hugging Face "
        "datasets; outside: arrays from your own function, given by its import path",
    )
    root: str | None = input_path(None, "path or s3:// URI of the files, for kinds that read files", kind="any")
    factory: ImportPath | None = unhashed(
        None, "package.module:function, where the function is annotated to return a kac.data.ArrayData"
    )
    arguments: FactoryArguments = unhashed({}, ARGUMENTS_HELP)
    size: PositiveInt | None = Field(
        None, description="crop each image to its central square, resized to SIZE pixels; default: no cropping"
    )
    channels: Annotated[Literal[1, 3] | None, BeforeValidator(number_of_text)] = Field(
        None, description="convert images to greyscale (1) or RGB (3); default: keep the channels"
    )
    image_column: str = Field("image", description="column of encoded images")
    label_column: str | None = Field("label", description="column of integer labels; None: one class for all images")
    horizontal_flip: bool = Field(False, description="mirror training images left to right with probability 1/2")
    autoencoder: str | None = input_path(
        None,
        "folder of a diffusers AutoencoderKL, AutoencoderTiny or AutoencoderDC; models then work in its latents; "
        "default: in pixels",
    )

    def __hash__(self) -> int:
        """Return a hash for the cache of opened datasets. ``arguments`` may contain unhashable lists and mappings."""
        return hash(self.model_dump_json())

    @property
    def origin(self) -> str:
        """Where the data come from: the path of the files, the import path of the factory, or the kind."""
        return self.root or self.factory or self.kind

    @property
    def images(self) -> Self:
        """The dataset of pixels: these options without the autoencoder."""
        return self.model_copy(update={"autoencoder": None})

    def paths(self, of: str = "") -> dict[str, str | None]:
        """Return the paths to read, by option. Text such as " of the teacher" can follow the options' names."""
        return {f"`data.root`{of}": self.root, f"`data.autoencoder`{of}": self.autoencoder}

    @model_validator(mode="after")
    def _has_only_options_of_its_kind(self) -> Self:
        known = {"kind"} if self.kind in {"moons", "gaussians"} else {"kind", "autoencoder"}
        if self.kind in FILE_KINDS:
            known |= {"horizontal_flip", *_source_options(self.kind)}
            if not self.root:
                raise ValueError(f"`root` is missing. Give the path or s3:// URI of the {self.kind} files.")
        if self.kind == "outside":
            known |= {"factory", "arguments", "horizontal_flip"}
            if not self.factory:
                raise ValueError("`factory` is missing. Give package.module:function.")
        if self.autoencoder and self.horizontal_flip:
            raise ValueError("`horizontal_flip` cannot mirror the latents of `autoencoder`. Remove one of them.")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in known and value != field.default:
                raise ValueError(f"`{name}` is {value!r}, but has no effect on {self.kind}. Remove it.")
        return self


def _source_options(kind: DataKind) -> list[str]:
    return [field.name for field in dataclasses.fields(FILE_KINDS[kind])]


@functools.lru_cache(maxsize=4)
def open_dataset(config: DataConfig) -> Dataset:
    """Return the dataset, opened once per process. A dataset that is not in the cache is decoded in this process.

    With an autoencoder, the samples are latents. ``open_dataset(config.images)`` has the pixels of the same rows.

    Raises:
        DistillKacError: files are missing, damaged or inconsistent, a factory or its data is invalid, or the
            autoencoder does not fit.
    """
    if config.kind in BUNDLED and not config.autoencoder:
        return BUNDLED[config.kind]()
    if config.factory is not None and not config.autoencoder:
        return in_memory.open_arrays(config.factory, config.arguments, config.horizontal_flip)
    source, paths = _locate(config)
    return decoded.find(paths) or decoded.decode_here(source, paths)


def begin_decoding(config: DataConfig) -> AbstractContextManager[decoded.Decoding] | None:
    """Begin to decode the dataset, for callers that distribute the decoding over many processes.

    Returns None if the dataset has no files or is already in the cache.
    """
    if config.kind not in FILE_KINDS and not config.autoencoder:
        return None
    source, paths = _locate(config)
    return None if decoded.find(paths) else decoded.decoding(source, paths)


def describe_dataset(config: DataConfig) -> DataDescription:
    """Return a dataset's description. If the samples are latents, no image is encoded for this."""
    return _latents(config).describe() if config.autoencoder else open_dataset(config).description


def _latents(config: DataConfig) -> LatentSource:
    return LatentSource(config.autoencoder or "", functools.partial(open_dataset, config.images))


def _locate(config: DataConfig) -> tuple[Source, decoded.CachePaths]:
    if config.autoencoder:
        latents = _latents(config)
        return latents, decoded.cache_paths(latents, {"kind": "latents", "sha256": latents.describe().sha256})
    root = config.root or ""
    root = files.normal(root) if files.is_uri(root) else files.locate(root).path
    options = {name: getattr(config, name) for name in _source_options(config.kind)} | {"root": root}
    source = FILE_KINDS[config.kind](**options)
    return source, decoded.cache_paths(source, {"kind": config.kind, **options})
