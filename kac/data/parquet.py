"""Parquet files with a column of encoded images, as in Hugging Face datasets: one file, or a folder of files.

``kac/data/split_layouts.py`` finds the training files and the held-out files.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kac.data import split_layouts
from kac.data.dataset import Contents, Unit, count_classes, reading
from kac.data.encoded import EncodedSource
from kac.util import files
from kac.util.errors import DistillKacError, one_line
from kac.util.text import shorten

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 16
"""Number of encoded images to read from a file at once."""


class ParquetLabels(NamedTuple):
    """Everything in a Parquet file except the images."""

    values: np.ndarray  # [rows], of the integer type in the file
    class_names: tuple[str, ...]  # by label; empty if the file has no class names
    groups: list[int]  # number of rows of each row group


@dataclass(frozen=True)
class ParquetSource(EncodedSource):
    """The Parquet files at or below ``root``. If ``label_column`` is None, all images belong to one class."""

    image_column: str
    label_column: str | None

    def stamps(self) -> Iterator[files.Stamp]:
        """Yield the stamps of all Parquet files."""
        return (stamp for stamp in files.walk(self.root) if not stamp.path or stamp.path.endswith(".parquet"))

    def contents(self) -> Contents:
        """Read the labels and the shape of the first image."""
        stamps = list(self.stamps())
        if not stamps:
            names = [stamp.path for stamp in files.walk(self.root) if not stamp.path.endswith("/")]
            found = f"it contains only {shorten(names, 5)}" if names else "it is empty"
            advice = "Convert Arrow files from datasets.save_to_disk with dataset.to_parquet(FILE)."
            raise DistillKacError(f"{self.root} has no Parquet files: {found}. {advice}")
        splits = [split_layouts.split_file(self.root, stamp.path) if stamp.path else None for stamp in stamps]
        division = split_layouts.divide(self.root, splits, [stamp.path for stamp in stamps], "files")
        read = {stamps[i].path: self._read_labels(stamps[i]) for i in division.used}
        units = [Unit(rows, (path, i)) for path, labels in read.items() for i, rows in enumerate(labels.groups)]
        first = next((unit.content for unit in units if unit.images), None)
        if first is None:
            raise DistillKacError(f"{self.root} has Parquet files, but the files have no rows. Give files with images.")
        num_classes = count_classes({self.name(path): labels.values for path, labels in read.items()})
        counts = [len(labels.values) for labels in read.values()]
        return Contents(
            shape=self.shape_of_first(first),
            num_classes=num_classes,
            labels=np.concatenate([labels.values.astype(np.int64) for labels in read.values()]),
            held_out=None if division.held_out is None else np.repeat(division.held_out, counts),
            units=units,
            class_names=self._class_names(read, num_classes),
            split=division.description,
        )

    def encoded(self, content: tuple[str, int]) -> Iterator[tuple[str, bytes]]:
        """Yield the images of a row group. ``content`` is the path of a file and the number of a row group."""
        import pyarrow as pa

        path, group = content
        row = 0
        with self._open(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.image_column]):
                column = batch.column(self.image_column)
                for image in (column.field("bytes") if pa.types.is_struct(column.type) else column).to_pylist():
                    name = f"{self.name(path)}: row {row} of row group {group}"
                    if image is None:
                        raise DistillKacError(f"{name} has no image bytes. Embed the images in the file.")
                    yield name, image
                    row += 1

    def _class_names(self, read: dict[str, ParquetLabels], num_classes: int) -> tuple[str, ...]:
        """Return the class names, after checking that all files with names agree."""
        named = {path: labels.class_names for path, labels in read.items() if labels.class_names}
        if not named:
            return ()
        first, names = next(iter(named.items()))
        other = next((path for path in named if named[path] != names), None)
        column = f"the column {self.label_column!r}"
        if other is not None:
            raise DistillKacError(
                f"{self.root}: {column} has different class names in {other} and in {first}, so the same label means "
                "different classes. Write both files with the same features."
            )
        if num_classes > len(names):
            problem = f"only {len(names)} class names for {column}, but there is a label {num_classes - 1}"
            raise DistillKacError(f"{self.name(first)} has {problem}. Correct the labels or the names.")
        return names[:num_classes]

    def _read_labels(self, stamp: files.Stamp) -> ParquetLabels:
        import pyarrow as pa

        name, column = self.name(stamp.path), self.label_column
        with self._open(stamp.path) as file:
            schema, groups = file.schema_arrow, _checked_groups(name, file, stamp.size)
            columns = ", ".join(f"{field.name}: {one_line(field.type, 40)}" for field in schema)
            if not _has_images(schema, self.image_column):
                raise DistillKacError(
                    f"{name} has no column {self.image_column!r} of encoded images (binary, or a struct with bytes). "
                    f"Set `data.image_column` to one of its columns ({columns})."
                )
            if column is None:
                return ParquetLabels(np.zeros(sum(groups), np.int64), (), groups)
            if column not in schema.names or not pa.types.is_integer(schema.field(column).type):
                raise DistillKacError(
                    f"{name} has no column {column!r} of integer labels. Set `data.label_column` to one of its columns "
                    f"({columns}), or to None if the images have no classes."
                )
            values = file.read(columns=[column]).column(0)
            class_names = _read_class_names(name, schema, column)
        if len(values) != sum(groups):
            raise DistillKacError(f"{name} has {len(values):,} labels for {sum(groups):,} rows. Download it again.")
        if values.null_count:
            raise DistillKacError(f"{name} has rows without a label ({values.null_count:,}). Label or remove them.")
        return ParquetLabels(values.to_numpy(), class_names, groups)

    @contextmanager
    def _open(self, path: str) -> "Iterator[pq.ParquetFile]":
        import pyarrow.parquet as pq

        name = self.name(path)
        with (
            files.errors_naming(name) as location,
            location.fs.open(location.path) as raw,
            reading(name, "a readable Parquet file", "Download it again; unpack archives first."),
            pq.ParquetFile(raw, page_checksum_verification=True) as file,
        ):
            yield file


def _checked_groups(name: str, file: "pq.ParquetFile", size: int) -> list[int]:
    """Return the number of rows of each row group, after checking that they can fit into a file of ``size`` bytes."""
    rows = int(file.metadata.num_rows)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    if rows > size or rows != sum(groups) or min(groups, default=0) < 0:
        raise DistillKacError(
            f"{name} is damaged: its footer claims {rows:,} rows, in groups of {one_line(groups, 60)}, which do not "
            f"fit into {size:,} bytes. Download it again."
        )
    return groups


def _read_class_names(name: str, schema: Any, column: str) -> tuple[str, ...]:
    """Return the class names of a Hugging Face ``ClassLabel`` column, or an empty tuple for any other column."""
    try:
        values = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = values["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names) or len({*names}) < len(names):
        raise DistillKacError(
            f"{name}: the class names of the column {column!r} are not distinct strings ({one_line(names, 100)}). "
            "Write a valid ClassLabel feature."
        )
    return tuple(names)


def _has_images(schema: Any, column: str) -> bool:
    """Return whether a column has encoded images: binary values, or structs with a binary field ``bytes``."""
    import pyarrow as pa

    kind = schema.field(column).type if column in schema.names else pa.null()
    if pa.types.is_struct(kind):
        kind = next((field.type for field in kind if field.name == "bytes"), pa.null())
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
