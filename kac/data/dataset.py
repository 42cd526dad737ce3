"""Datasets by kind.

A new kind without files is a function that returns a ``Dataset``, and its line in ``BUNDLED``. A new kind of files is a
``Source``, and its line in ``KINDS``.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, PositiveInt, model_validator

from kac.data import decoded
from kac.data.bundled import digits, gaussians, moons
from kac.data.cifar10 import Cifar10Source
from kac.data.encoded import Decoder
from kac.data.folder import FolderSource
from kac.data.idx import IdxSource
from kac.data.parquet import ParquetSource
from kac.data.source import Source
from kac.data.splits import Dataset
from kac.util import files
from kac.util.options import Kinded
from kac.util.path_options import input_path

DataKind = Literal["digits", "moons", "gaussians", "idx", "cifar10", "folder", "parquet"]


class DataConfig(Kinded):
    """Which dataset."""

    kind: DataKind = Field(
        "digits",
        description="digits: 8x8 handwritten digits; moons, gaussians: points of the plane, two half circles or eight "
        "modes; idx: the four files of MNIST or Fashion-MNIST; cifar10: its Python archive; folder: ROOT/CLASS/IMAGE "
        "or ROOT/{train,test}/CLASS/IMAGE; parquet: images in a column, as Hugging Face has them",
    )
    root: str | None = input_path(
        None, "where its files are: a path or s3:// URI; digits, moons and gaussians have none", kind="any"
    )
    size: PositiveInt | None = Field(
        None, description="crop images to their middle square and resize it to this side; default: they are of one size"
    )
    channels: Literal[1, 3] | None = Field(
        None, description="make every image greyscale (1) or RGB (3); default: as they are, which must be the same"
    )
    image_column: str = Field("image", description="column of encoded images")
    label_column: str | None = Field("label", description="column of integer classes; None: all are of one class")
    horizontal_flip: bool = Field(False, description="mirror every other training image of a teacher left to right")

    @model_validator(mode="after")
    def _takes_what_its_kind_takes(self) -> Self:
        if self.kind in BUNDLED and self.root is not None:
            raise ValueError(f"`root`: expected none, since {self.kind} comes without files, found {self.root!r}")
        if self.kind in KINDS and not self.root:
            raise ValueError(f"`root`: expected where the files of {self.kind} are, a path or s3:// URI, found none")
        taken = {"kind", "root", *(KINDS[self.kind].options if self.kind in KINDS else ())}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in taken and value != field.default:
                raise ValueError(f"`{name}`: expected none, since it means nothing for {self.kind}, found {value!r}")
        return self


class FileKind(NamedTuple):
    """A kind of dataset that is read from files."""

    source: Callable[[DataConfig, str], Source]  # of the config and its root, which is absolute
    options: tuple[str, ...]  # those that mean something for it, beside kind and root


BUNDLED: dict[DataKind, Callable[[], Dataset]] = {"digits": digits, "moons": moons, "gaussians": gaussians}
"""Kinds without files, and what makes each."""

KINDS: dict[DataKind, FileKind] = {
    "idx": FileKind(lambda _, root: IdxSource(root), ("horizontal_flip",)),
    "cifar10": FileKind(lambda _, root: Cifar10Source(root), ("horizontal_flip",)),
    "folder": FileKind(
        lambda config, root: FolderSource(root, Decoder(config.size, config.channels)),
        ("size", "channels", "horizontal_flip"),
    ),
    "parquet": FileKind(
        lambda config, root: ParquetSource(
            root, Decoder(config.size, config.channels), config.image_column, config.label_column
        ),
        ("size", "channels", "image_column", "label_column", "horizontal_flip"),
    ),
}
"""Kinds that are read from files; their images are decoded once, into the cache."""

TRAINING_ONLY = ("horizontal_flip",)
"""Options that decide nothing of what is decoded."""


@functools.lru_cache(maxsize=4)
def open_dataset(config: DataConfig) -> Dataset:
    """The dataset; opened once per process. What is not in the cache is decoded first, in this process.

    Raises:
        DistillKacError: files are missing or damaged, or do not fit together.
    """
    if config.kind in BUNDLED:
        return BUNDLED[config.kind]()
    source, root, place = _found(config)
    return decoded.find(place) or decoded.decode_here(source, root, place)


def begin_decoding(config: DataConfig) -> AbstractContextManager[decoded.Decoding] | None:
    """For who decodes by many processes: the work that is to be done before ``open_dataset`` finds all in the cache.

    Returns None where there is nothing to do.
    """
    if config.kind in BUNDLED:
        return None
    source, root, place = _found(config)
    return None if decoded.find(place) else decoded.decoding(source, root, place)


def _found(config: DataConfig) -> tuple[Source, str, decoded.Place]:
    root = _absolute(config.root or "")
    kind = KINDS[config.kind]
    options: dict[str, Any] = {name: getattr(config, name) for name in kind.options if name not in TRAINING_ONLY}
    source = kind.source(config, root)
    return source, root, decoded.place_of(source, {"kind": config.kind, "root": root, **options})


def _absolute(root: str) -> str:
    return files.normal(root) if files.is_uri(root) else files.locate(root).path
