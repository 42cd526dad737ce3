"""Parquet files with a column of encoded images, as in Hugging Face datasets: one file, or a folder of files.

``kac/data/layout.py`` finds the training files and the held-out files.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kac.data import layout
from kac.data.encoded import Decoder
from kac.data.source import Contents, Unit, count_classes, images_per_block
from kac.util import files
from kac.util.errors import DistillKacError, one_line
from kac.util.text import shorten

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MOST_SHOWN = 5
"""The most files in a message."""


class FileLabels(NamedTuple):
    """The labels of a file."""

    values: np.ndarray  # [rows], of the integer type in the file
    class_names: tuple[str, ...]  # by label; empty if the file has none


@dataclass(frozen=True)
class ParquetSource:
    """The Parquet files at or below ``root``. Without a ``label_column`` all images are of one class."""

    root: str
    decoder: Decoder
    image_column: str
    label_column: str | None

    def stamps(self) -> Iterator[files.Stamp]:
        """Yield every Parquet file."""
        return (stamp for stamp in files.walk(self.root) if not stamp.path or stamp.path.endswith(".parquet"))

    def contents(self) -> Contents:
        """Read the labels and the shape of the first image.

        Raises:
            DistillKacError: there are no files or no images, a column is missing, or labels are missing or wrong.
        """
        sizes = {stamp.path: stamp.size for stamp in self.stamps()}
        all_paths = list(sizes)
        if not all_paths:
            raise DistillKacError(f"{self.root} has no Parquet files{self._describe_other_files()}")
        splits = [layout.split_file(self.root, path) if path else None for path in all_paths]
        division = layout.choose(self.root, splits, all_paths, "files")
        parts = {path: split and split.part for path, split in zip(all_paths, splits, strict=True)}
        paths = [path for path in all_paths if parts[path] in division.used]
        read = {path: self._read_labels(path, sizes[path]) for path in paths}
        counts = [len(labels.values) for labels in read.values()]
        if not sum(counts):
            raise DistillKacError(f"{self.root} has Parquet files, but no rows in them. Give files with images.")
        num_classes = count_classes({self._name(path): labels.values for path, labels in read.items()})
        units = [unit for path in paths for unit in self._units(path)]
        held_out = [parts[path] == division.held_out for path in paths]
        return Contents(
            shape=self._first_shape(units),
            num_classes=num_classes,
            labels=np.concatenate([labels.values.astype(np.int64) for labels in read.values()]),
            held_out=np.repeat(held_out, counts) if division.held_out else None,
            units=units,
            class_names=self._class_names({path: labels.class_names for path, labels in read.items()}, num_classes),
            split=division.description,
        )

    def decode(self, content: tuple[str, int], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images of a row group, in blocks. ``content`` is a file and the number of the row group."""
        path, group = content
        row = 0
        for encoded in self._encoded(path, group, images_per_block(shape)):
            block = np.empty((len(encoded), *shape), np.uint8)
            for image, data in zip(block, encoded, strict=True):
                image[:] = self.decoder.decode(data, self._image_name(path, group, row), shape)
                row += 1
            yield block

    def _first_shape(self, units: list[Unit]) -> tuple[int, ...]:
        path, group = next(unit.content for unit in units if unit.images)
        return self.decoder.shape_of(next(self._encoded(path, group, 1))[0], self._image_name(path, group, 0))

    def _encoded(self, path: str, group: int, rows: int) -> Iterator[list[bytes]]:
        """Yield the encoded images of a row group, ``rows`` at a time."""
        import pyarrow as pa

        done = 0
        with self._open(path) as file:
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[self.image_column]):
                column = batch.column(self.image_column)
                images = (column.field("bytes") if pa.types.is_struct(column.type) else column).to_pylist()
                if None in images:
                    name = self._image_name(path, group, done + images.index(None))
                    raise DistillKacError(f"{name} has no image bytes. Embed the images in the file.")
                done += len(images)
                yield images

    def _units(self, path: str) -> Iterator[Unit]:
        with self._open(path) as file:
            for group in range(file.metadata.num_row_groups):
                yield Unit(file.metadata.row_group(group).num_rows, (path, group))

    def _describe_other_files(self) -> str:
        """Return the end of the message that there are no Parquet files."""
        names = [stamp.path for stamp in files.walk(self.root) if not stamp.path.endswith("/")]
        if any(name.endswith(".arrow") for name in names):
            return ", only Arrow files of datasets.save_to_disk. Write Parquet files with dataset.to_parquet(FILE)."
        return f", only {shorten(names, MOST_SHOWN)}." if names else ". It is empty."

    def _class_names(self, names_by_file: dict[str, tuple[str, ...]], num_classes: int) -> tuple[str, ...]:
        """Return the class names, after checking that all files with names agree."""
        named = {path: names for path, names in names_by_file.items() if names}
        if not named:
            return ()
        first, names = next(iter(named.items()))
        other = next((path for path in named if named[path] != names), None)
        if other is not None:
            raise DistillKacError(
                f"{self.root}: the column {self.label_column!r} has other class names in {other} than in {first}, so "
                "a label means different classes. Write both files with the same features."
            )
        if num_classes > len(names):
            raise DistillKacError(
                f"{self._name(first)} has too few class names ({len(names)}) for the column {self.label_column!r}, "
                f"because there is a label {num_classes - 1}. Correct the labels or the names."
            )
        return names[:num_classes]

    def _read_labels(self, path: str, size: int) -> FileLabels:
        import pyarrow as pa

        name = self._name(path)
        with self._open(path) as file:
            schema, rows = file.schema_arrow, _checked_rows(name, file, size)
            _check_image_column(name, schema, self.image_column)
            if self.label_column is None:
                return FileLabels(np.zeros(rows, np.int64), ())
            if self.label_column not in schema.names or not pa.types.is_integer(schema.field(self.label_column).type):
                raise DistillKacError(
                    f"{name} has no column {self.label_column!r} of integer labels. Set `data.label_column` to one of "
                    f"its columns ({_describe_columns(schema)}), or to None if the images have no classes."
                )
            column = file.read(columns=[self.label_column]).column(0)
            class_names = _read_class_names(name, schema, self.label_column)
        if len(column) != rows:
            raise DistillKacError(f"{name} has {len(column):,} labels for {rows:,} rows. Download it again.")
        if column.null_count:
            raise DistillKacError(f"{name} has rows without a label ({column.null_count:,}). Label or remove them.")
        return FileLabels(column.to_numpy(), class_names)

    @contextmanager
    def _open(self, path: str) -> "Iterator[pq.ParquetFile]":
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = self._name(path)
        location = files.locate(name)
        with files.errors_naming(name), location.fs.open(location.path) as raw:
            try:
                with pq.ParquetFile(raw, page_checksum_verification=True) as file:
                    yield file
            except (pa.ArrowException, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the disk or S3; pyarrow's have no errno
                    raise
                reason = one_line(error).rstrip(".")
                raise DistillKacError(
                    f"{name} is not a readable Parquet file ({reason}). Download it again; unpack archives first."
                ) from None

    def _name(self, path: str) -> str:
        return files.join(self.root, path) if path else self.root

    def _image_name(self, path: str, group: int, row: int) -> str:
        return f"{self._name(path)}: row {row} of row group {group}"


def _checked_rows(name: str, file: "pq.ParquetFile", size: int) -> int:
    """Return the number of rows in the footer, after checking that a file of ``size`` bytes can hold them."""
    rows = int(file.metadata.num_rows)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    if rows > size or rows != sum(groups) or min(groups, default=0) < 0:
        raise DistillKacError(
            f"{name} is damaged: its footer announces {rows:,} rows, in groups of {one_line(groups, 60)}, which do not "
            f"fit into {size:,} bytes. Download it again."
        )
    return rows


def _read_class_names(name: str, schema: Any, column: str) -> tuple[str, ...]:
    """Return the class names of a column that is a ``ClassLabel`` of Hugging Face; else an empty tuple.

    Raises:
        DistillKacError: the names are not distinct texts.
    """
    try:
        values = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = values["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names) or len({*names}) < len(names):
        raise DistillKacError(
            f"{name}: the class names of the column {column!r} are not distinct texts ({one_line(names, 100)}). Write "
            "the file again with a valid ClassLabel feature."
        )
    return tuple(names)


def _check_image_column(name: str, schema: Any, column: str) -> None:
    import pyarrow as pa

    kind = schema.field(column).type if column in schema.names else None
    if kind is not None and pa.types.is_struct(kind):
        kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), None)
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DistillKacError(
            f"{name} has no column {column!r} of encoded images (binary, or a struct with bytes). Set "
            f"`data.image_column` to one of its columns ({_describe_columns(schema)})."
        )


def _describe_columns(schema: Any) -> str:
    return ", ".join(f"{field.name}: {one_line(field.type, 40)}" for field in schema)
