"""Parquet files with a column of encoded images, as Hugging Face publishes datasets: one file or a folder of them.

Files called ``train*`` are for training and those called ``test*`` are held out; under other names they are one set, of
which every fifth image of each class is held out.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kac import files
from kac.data.encoded import Decoder
from kac.data.source import Contents, Unit, images_a_block
from kac.errors import DistillKacError, one_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

PARTS = ("train", "test")


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
        paths = [stamp.path for stamp in self.stamps()]
        parts = [_part(path) for path in paths]
        if any(parts) and not all(parts):
            other = paths[parts.index("")]
            raise DistillKacError(f"{self.root}: expected files train* and test* alone, found {other}: move it away")
        if parts and "train" not in parts and any(parts):
            raise DistillKacError(f"{self.root}: expected files called train*, found test* alone")
        labels = [self._labels(path) for path in paths]
        if not sum(map(len, labels)):
            raise DistillKacError(f"{self.root}: expected Parquet files with images, found none")
        counts = [len(column) for column in labels]
        units = [unit for path in paths for unit in self._units(path)]
        return Contents(
            shape=self._first_shape(units),
            num_classes=1 + max(int(column.max()) for column in labels if len(column)),
            labels=np.concatenate(labels),
            held_out=np.repeat([part == "test" for part in parts], counts) if "test" in parts else None,
            units=units,
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

    def _labels(self, path: str) -> np.ndarray:
        """The labels of a file, [rows] int64."""
        import pyarrow as pa

        with self._open(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            _check_image_column(self._name(path), schema, self.image_column)
            if self.label_column is None:
                return np.zeros(rows, np.int64)
            if self.label_column not in schema.names or not pa.types.is_integer(schema.field(self.label_column).type):
                raise DistillKacError(
                    f"{self._name(path)}: expected a column {self.label_column!r} of integers, found "
                    f"{_described(schema)}: --data.label-column names another; None: no classes"
                )
            column = file.read(columns=[self.label_column]).column(0)
        if column.null_count:
            raise DistillKacError(
                f"{self._name(path)}: expected a label for each image, found {column.null_count} without"
            )
        labels: np.ndarray = column.to_numpy().astype(np.int64)
        return labels

    @contextmanager
    def _open(self, path: str) -> "Iterator[pq.ParquetFile]":
        import pyarrow as pa
        import pyarrow.parquet as pq

        location = files.locate(self._name(path))
        try:
            with files.naming(self._name(path)), location.fs.open(location.path) as raw, pq.ParquetFile(raw) as file:
                yield file
        except pa.ArrowException as error:
            raise DistillKacError(f"{self._name(path)}: expected Parquet, found: {one_line(error)}") from None

    def _name(self, path: str) -> str:
        return files.join(self.root, path) if path else self.root

    def _image_name(self, path: str, group: int, row: int) -> str:
        return f"{self._name(path)}: row {row} of row group {group}"


def _part(path: str) -> str:
    """train or test, if that is the first word of a file's name; else empty."""
    word = re.split(r"[^a-zA-Z]", path.rpartition("/")[2].removesuffix(".parquet"), maxsplit=1)[0].lower()
    return word if word in PARTS else ""


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
