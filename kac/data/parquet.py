"""Parquet files with a column of encoded images, as Hugging Face publishes datasets: one file or a folder of them.

``kac/data/layout.py`` says which files are for training and which are held out.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kac import files
from kac.data import layout
from kac.data.encoded import Decoder
from kac.data.source import Contents, Unit, count_classes, images_a_block
from kac.errors import DistillKacError, one_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

SHOWN = 5
"""How many files a message lists."""


class Labels(NamedTuple):
    """The labels of a file."""

    values: np.ndarray  # [rows], of the file's own integer type
    class_names: tuple[str, ...]  # by number; empty: the file does not say


@dataclass(frozen=True)
class ParquetSource:
    """The files at or below ``root``; ``label_column`` None: all images are of one class."""

    root: str
    decoder: Decoder
    image_column: str
    label_column: str | None

    def stamps(self) -> Iterator[files.Stamp]:
        """Every Parquet file."""
        return (stamp for stamp in files.walk(self.root) if not stamp.path or stamp.path.endswith(".parquet"))

    def contents(self) -> Contents:
        """Raises ``DistillKacError``: no files, no such columns, labels that are missing, no images."""
        sizes = {stamp.path: stamp.size for stamp in self.stamps()}
        found = list(sizes)
        if not found:
            raise DistillKacError(f"{self.root}: expected Parquet files with images, found {self._others()}")
        named = [layout.split_file(self.root, path) if path else None for path in found]
        split = layout.choose(self.root, named, found, "files")
        parts = {path: name and name.part for path, name in zip(found, named, strict=True)}
        paths = [path for path in found if parts[path] in split.used]
        read = {path: self._labels(path, sizes[path]) for path in paths}
        if not sum(len(labels.values) for labels in read.values()):
            raise DistillKacError(f"{self.root}: expected Parquet files with images, found no rows in them")
        num_classes = count_classes({self._name(path): labels.values for path, labels in read.items()})
        counts = [len(labels.values) for labels in read.values()]
        units = [unit for path in paths for unit in self._units(path)]
        return Contents(
            shape=self._first_shape(units),
            num_classes=num_classes,
            labels=np.concatenate([labels.values.astype(np.int64) for labels in read.values()]),
            held_out=np.repeat([parts[path] == split.held_out for path in paths], counts) if split.held_out else None,
            units=units,
            class_names=self._class_names({path: labels.class_names for path, labels in read.items()}, num_classes),
            split=split.description,
        )

    def decode(self, content: tuple[str, int], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The images of one row group: a file, and which group of it."""
        path, group = content
        row = 0
        for encoded in self._encoded(path, group, images_a_block(shape)):
            block = np.empty((len(encoded), *shape), np.uint8)
            for image, data in zip(block, encoded, strict=True):
                image[:] = self.decoder.decode(data, self._image_name(path, group, row), shape)
                row += 1
            yield block

    def _first_shape(self, units: list[Unit]) -> tuple[int, ...]:
        path, group = next(unit.content for unit in units if unit.images)
        return self.decoder.shape_of(next(self._encoded(path, group, 1))[0], self._image_name(path, group, 0))

    def _encoded(self, path: str, group: int, rows: int) -> Iterator[list[bytes]]:
        """The encoded images of a row group, so many at a time."""
        import pyarrow as pa

        done = 0
        with self._open(path) as file:
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[self.image_column]):
                column = batch.column(self.image_column)
                images = (column.field("bytes") if pa.types.is_struct(column.type) else column).to_pylist()
                if None in images:
                    name = self._image_name(path, group, done + images.index(None))
                    raise DistillKacError(f"{name}: expected the bytes of an image, found none: embed the images")
                done += len(images)
                yield images

    def _units(self, path: str) -> Iterator[Unit]:
        with self._open(path) as file:
            for group in range(file.metadata.num_row_groups):
                yield Unit(file.metadata.row_group(group).num_rows, (path, group))

    def _others(self) -> str:
        """What is there that is not Parquet, in a few words."""
        names = [stamp.path for stamp in files.walk(self.root) if not stamp.path.endswith("/")]
        if any(name.endswith(".arrow") for name in names):
            return "Arrow files, as datasets.save_to_disk writes them. Write Parquet files by dataset.to_parquet(FILE)"
        listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
        return f"none, only {listed}" if names else "an empty folder"

    def _class_names(self, found: dict[str, tuple[str, ...]], num_classes: int) -> tuple[str, ...]:
        """The names of the classes that are there, which all files that have names must agree on."""
        named = {path: names for path, names in found.items() if names}
        if not named:
            return ()
        first, names = next(iter(named.items()))
        other = next((path for path in named if named[path] != names), None)
        if other is not None:
            raise DistillKacError(
                f"{self.root}: the column {self.label_column!r} has other class names in {other} than in {first}, so "
                "that the same label means different classes. Write both files with the same features"
            )
        if num_classes > len(names):
            raise DistillKacError(
                f"{self._name(first)}: found the label {num_classes - 1}, but the column {self.label_column!r} has "
                f"only {len(names)} class names. Correct the labels or the names"
            )
        return names[:num_classes]

    def _labels(self, path: str, size: int) -> Labels:
        import pyarrow as pa

        with self._open(path) as file:
            schema, rows = file.schema_arrow, self._rows(path, file, size)
            _check_image_column(self._name(path), schema, self.image_column)
            if self.label_column is None:
                return Labels(np.zeros(rows, np.int64), ())
            if self.label_column not in schema.names or not pa.types.is_integer(schema.field(self.label_column).type):
                raise DistillKacError(
                    f"{self._name(path)}: expected a column {self.label_column!r} of integers, found "
                    f"{_described(schema)}: --data.label-column names another; None: no classes"
                )
            column = file.read(columns=[self.label_column]).column(0)
            names = _names_of(self._name(path), schema, self.label_column)
        if len(column) != rows:
            raise DistillKacError(
                f"{self._name(path)}: expected {rows:,} labels, found {len(column):,}: fetch it again"
            )
        if column.null_count:
            raise DistillKacError(
                f"{self._name(path)}: expected a label for each image, found {column.null_count} without"
            )
        return Labels(column.to_numpy(), names)

    def _rows(self, path: str, file: "pq.ParquetFile", size: int) -> int:
        """The number of rows in the footer; refused if a file of ``size`` bytes cannot hold that number of images."""
        rows = int(file.metadata.num_rows)
        groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        if rows > size or rows != sum(groups) or min(groups, default=0) < 0:
            raise DistillKacError(
                f"{self._name(path)}: the footer names {rows:,} rows, in groups of {one_line(groups, 60)}, which do "
                f"not fit into {size:,} bytes. The file is damaged: fetch it again"
            )
        return rows

    @contextmanager
    def _open(self, path: str) -> "Iterator[pq.ParquetFile]":
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = self._name(path)
        location = files.locate(name)
        with files.naming(name), location.fs.open(location.path) as raw:
            try:
                with pq.ParquetFile(raw, page_checksum_verification=True) as file:
                    yield file
            except (pa.ArrowException, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the disk or S3; pyarrow's have none
                    raise
                raise DistillKacError(
                    f"{name}: expected Parquet, found: {one_line(error)}. Fetch the file again; unpack archives first"
                ) from None

    def _name(self, path: str) -> str:
        return files.join(self.root, path) if path else self.root

    def _image_name(self, path: str, group: int, row: int) -> str:
        return f"{self._name(path)}: row {row} of row group {group}"


def _names_of(name: str, schema: Any, column: str) -> tuple[str, ...]:
    """The names of the classes of a column, if it is a ``ClassLabel`` of Hugging Face.

    Raises:
        DistillKacError: the names are not different texts.
    """
    try:
        values = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = values["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names) or len({*names}) < len(names):
        raise DistillKacError(
            f"{name}: expected different class names of the column {column!r} in the metadata of Hugging Face, found "
            f"{one_line(names, 100)}. Write the file again with a ClassLabel"
        )
    return tuple(names)


def _check_image_column(name: str, schema: Any, column: str) -> None:
    import pyarrow as pa

    kind = schema.field(column).type if column in schema.names else None
    if kind is not None and pa.types.is_struct(kind):
        kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), None)
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DistillKacError(
            f"{name}: expected a column {column!r} of encoded images, binary or a struct with bytes, found "
            f"{_described(schema)}: --data.image-column names another"
        )


def _described(schema: Any) -> str:
    return ", ".join(f"{field.name}: {one_line(field.type, 40)}" for field in schema)
