"""Image folders, ``ROOT/CLASS/IMAGE`` or ``ROOT/SPLIT/CLASS/IMAGE``. ``kac/data/layout.py`` finds the splits.

Classes are numbered in the natural order of their folder names. Hidden files and the files that operating systems add
are ignored; any other file that is not an image is an error.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kac.data import layout
from kac.data.class_names import in_order
from kac.data.encoded import Decoder
from kac.data.source import Contents, Unit, images_per_block
from kac.util import files
from kac.util.errors import DistillKacError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
IGNORED = {"Thumbs.db", "desktop.ini", "__MACOSX"}
"""Files and folders that Windows and macOS add."""

IMAGES_PER_UNIT = 1000
REMOTE_READS = 16
"""The number of images that are read from S3 in parallel."""


class FolderImages(NamedTuple):
    """The images to use, in the order of their paths."""

    paths: list[str]  # below the root
    classes: list[str]
    is_held_out: list[bool]
    division: layout.Division


@dataclass(frozen=True)
class FolderSource:
    """The images below ``root``."""

    root: str
    decoder: Decoder

    def stamps(self) -> Iterator[files.Stamp]:
        """Yield every file below the root."""
        return (stamp for stamp in files.walk(self.root) if IGNORED.isdisjoint(stamp.path.split("/")))

    def contents(self) -> Contents:
        """Find the images and their classes.

        Raises:
            DistillKacError: the folder is empty, contains other files, or has an unknown layout.
        """
        paths, classes, is_held_out, division = self._find_images()
        names = in_order({name for name, held_out in zip(classes, is_held_out, strict=True) if not held_out})
        label_of = {name: label for label, name in enumerate(names)}
        unknown = next((i for i, name in enumerate(classes) if name not in label_of), None)
        if unknown is not None:
            raise DistillKacError(
                f"{self.root}: the class {classes[unknown]!r} has held-out images ({paths[unknown]}), but no training "
                "images. Remove them, or add training images of this class."
            )
        return Contents(
            shape=self.decoder.shape_of(self._read(paths[0]), self._name(paths[0])),
            num_classes=len(names),
            labels=np.fromiter((label_of[name] for name in classes), np.int64, len(classes)),
            held_out=np.array(is_held_out) if division.held_out else None,
            units=[
                Unit(len(unit), unit)
                for unit in (paths[i : i + IMAGES_PER_UNIT] for i in range(0, len(paths), IMAGES_PER_UNIT))
            ],
            class_names=tuple(names),
            split=division.description,
        )

    def decode(self, content: Sequence[str], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images at the paths ``content``, in blocks."""
        rows = images_per_block(shape)
        for start in range(0, len(content), rows):
            paths = content[start : start + rows]
            block = np.empty((len(paths), *shape), np.uint8)
            for image, path, data in zip(block, paths, self._read_each(paths), strict=True):
                image[:] = self.decoder.decode(data, self._name(path), shape)
            yield block

    def _find_images(self) -> FolderImages:
        paths = [self._check_image(stamp.path) for stamp in self.stamps()]
        if not paths:
            raise DistillKacError(f"{self.root} is empty. Add images in folders named after their class.")
        unique: dict[str, str] = {}  # keeps one copy of each folder's name, not one per image
        folders = [unique.setdefault(folder, folder) for folder in (path.rpartition("/")[0] for path in paths)]
        roles = layout.split_folders(self.root, unique)
        splits = [roles[folder].split for folder in folders]
        if not any(splits):
            splits = layout.split_images(paths) or splits
        division = layout.choose(self.root, splits, folders, "images")
        used = [i for i, split in enumerate(splits) if (split and split.part) in division.used]
        return FolderImages(
            [paths[i] for i in used],
            [roles[folders[i]].class_name for i in used],
            [(split := splits[i]) is not None and split.part == division.held_out for i in used],
            division,
        )

    def _check_image(self, path: str) -> str:
        """Return ``path``; raise ``DistillKacError`` unless it is an image in a class folder."""
        name = self._name(path) if path else self.root
        folder, _, base = path.rpartition("/")
        if path and not base:
            raise DistillKacError(f"{name} has no images. Remove this folder or add images.")
        if not path or base.lower().endswith(ARCHIVES):
            wanted = "images in class folders" if path else "a folder of images"
            raise DistillKacError(f"{name} is a file. Give {wanted}; unpack archives first.")
        if not base.lower().endswith(ENDINGS):
            raise DistillKacError(f"{name} is not an image ({', '.join(ENDINGS)}). Move it away.")
        if not folder:
            raise DistillKacError(
                f"{name} is not in a class folder. Move the images of each class to a folder in {self.root} that is "
                "named after the class. Images without classes need one folder, such as "
                f"{files.join(self.root, 'all')}."
            )
        return path

    def _read_each(self, paths: Sequence[str]) -> Iterator[bytes]:
        if not self.root.startswith("s3://"):
            yield from map(self._read, paths)
            return
        with ThreadPoolExecutor(REMOTE_READS) as readers:
            for start in range(0, len(paths), REMOTE_READS):
                yield from readers.map(self._read, paths[start : start + REMOTE_READS])

    def _read(self, path: str) -> bytes:
        return files.read_bytes(self._name(path))

    def _name(self, path: str) -> str:
        return files.join(self.root, path)
