"""Image folders: ``ROOT/CLASS/IMAGE`` or ``ROOT/SPLIT/CLASS/IMAGE``; ``kac/data/layout.py`` says which are splits.

Classes are numbered by the names of their folders, in the order that people expect of numbers. Hidden files and those
that operating systems leave behind are left out; any other file that is no image is refused.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kac import files
from kac.data import layout
from kac.data.class_names import in_order
from kac.data.encoded import Decoder
from kac.data.source import Contents, Unit, images_a_block
from kac.errors import DistillKacError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LEFT_BEHIND = {"Thumbs.db", "desktop.ini", "__MACOSX"}
"""Files and folders of Windows and macOS."""

IMAGES_A_UNIT = 1000
REMOTE_READS = 16
"""How many images of a prefix on S3 are read at once."""


class Images(NamedTuple):
    """The images that are used, in the order of their paths."""

    paths: list[str]  # below the root
    classes: list[str]
    is_held_out: list[bool]
    split: layout.Split


@dataclass(frozen=True)
class FolderSource:
    """The images below ``root``."""

    root: str
    decoder: Decoder

    def stamps(self) -> Iterator[files.Stamp]:
        """Every file below the root."""
        return (stamp for stamp in files.walk(self.root) if LEFT_BEHIND.isdisjoint(stamp.path.split("/")))

    def contents(self) -> Contents:
        """Raises ``DistillKacError``: an empty folder, files that are no images, or a layout that is not understood."""
        paths, classes, is_held_out, split = self._images()
        names = in_order({name for name, held_out in zip(classes, is_held_out, strict=True) if not held_out})
        numbers = {name: number for number, name in enumerate(names)}
        strange = next((i for i, name in enumerate(classes) if name not in numbers), None)
        if strange is not None:
            raise DistillKacError(
                f"{self.root}: found held-out images of the class {classes[strange]!r} ({paths[strange]}), "
                f"which has no training images. Remove them, or add training images of this class"
            )
        return Contents(
            shape=self.decoder.shape_of(self._read(paths[0]), self._name(paths[0])),
            num_classes=len(names),
            labels=np.fromiter((numbers[name] for name in classes), np.int64, len(classes)),
            held_out=np.array(is_held_out) if split.held_out else None,
            units=[
                Unit(len(unit), unit)
                for unit in (paths[i : i + IMAGES_A_UNIT] for i in range(0, len(paths), IMAGES_A_UNIT))
            ],
            class_names=tuple(names),
            split=split.description,
        )

    def decode(self, content: Sequence[str], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The images at the paths ``content``."""
        rows = images_a_block(shape)
        for start in range(0, len(content), rows):
            paths = content[start : start + rows]
            block = np.empty((len(paths), *shape), np.uint8)
            for image, path, data in zip(block, paths, self._read_each(paths), strict=True):
                image[:] = self.decoder.decode(data, self._name(path), shape)
            yield block

    def _images(self) -> Images:
        paths = [self._checked(stamp.path) for stamp in self.stamps()]
        if not paths:
            raise DistillKacError(
                f"{self.root}: expected images in folders named by their class, found an empty folder"
            )
        kept: dict[str, str] = {}  # the name of a folder once, not once per image
        folders = [kept.setdefault(folder, folder) for folder in (path.rpartition("/")[0] for path in paths)]
        places = layout.split_folders(self.root, kept)
        named = [places[folder].named for folder in folders]
        if not any(named):
            named = layout.split_images(paths) or named
        split = layout.choose(self.root, named, folders, "images")
        used = [i for i, name in enumerate(named) if (name and name.part) in split.used]
        return Images(
            [paths[i] for i in used],
            [places[folders[i]].class_name for i in used],
            [(name := named[i]) is not None and name.part == split.held_out for i in used],
            split,
        )

    def _checked(self, path: str) -> str:
        """The path of an image below the root."""
        name = self._name(path) if path else self.root
        folder, _, base = path.rpartition("/")
        if path and not base:
            raise DistillKacError(f"{name}: expected images in this folder, found none: remove it or fill it")
        if not path or base.lower().endswith(ARCHIVES):
            where = "images in class folders" if path else "a folder of images"
            raise DistillKacError(f"{name}: expected {where}, found this file. Unpack archives first")
        if not base.lower().endswith(ENDINGS):
            raise DistillKacError(
                f"{name}: expected images alone ({', '.join(ENDINGS)}), found this file: move it away"
            )
        if not folder:
            raise DistillKacError(
                f"{name}: found an image that is in no class folder. Put the images of each class into a folder below "
                f"{self.root} that is named by the class; images without classes into one folder, such as "
                f"{files.join(self.root, 'all')}"
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
