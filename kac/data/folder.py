"""Image folders, ``ROOT/CLASS/IMAGE`` or ``ROOT/SPLIT/CLASS/IMAGE``. ``kac/data/split_layouts.py`` finds the splits.

Classes are numbered in the natural order of their folder names. Hidden files and files that operating systems add are
ignored. Any other file that is not an image raises an error.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kac.data import split_layouts
from kac.data.class_names import in_order
from kac.data.dataset import Contents, Unit
from kac.data.encoded import EncodedSource
from kac.util import files
from kac.util.errors import DistillKacError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
IGNORED = {"Thumbs.db", "desktop.ini", "__MACOSX"}
"""Names of files and folders that Windows and macOS add."""

IMAGES_PER_UNIT = 1000
REMOTE_READS = 16
"""The number of images that are read from S3 in parallel."""


@dataclass(frozen=True)
class FolderSource(EncodedSource):
    """The images below ``root``."""

    def stamps(self) -> Iterator[files.Stamp]:
        """Yield the stamps of all files below the root, except ignored files."""
        return (stamp for stamp in files.walk(self.root) if IGNORED.isdisjoint(stamp.path.split("/")))

    def contents(self) -> Contents:
        """Find the images and their classes."""
        paths = [self._check_image(stamp.path) for stamp in self.stamps()]
        if not paths:
            raise DistillKacError(f"{self.root} is empty. Add images in folders named after their class.")
        unique: dict[str, str] = {}  # keeps one copy of each folder's name, instead of one copy per image
        folders = [unique.setdefault(folder, folder) for folder in (path.rpartition("/")[0] for path in paths)]
        roles = split_layouts.split_folders(self.root, unique)
        splits = [roles[folder].split for folder in folders]
        if not any(splits):
            splits = split_layouts.split_images(paths) or splits
        division = split_layouts.divide(self.root, splits, folders, "images")
        paths = [paths[i] for i in division.used]
        classes = [roles[folders[i]].class_name for i in division.used]
        train = ~division.held_out if division.held_out is not None else np.ones(len(paths), bool)
        names = in_order({name for name, is_train in zip(classes, train, strict=True) if is_train})
        label_of = {name: label for label, name in enumerate(names)}
        for name, path in zip(classes, paths, strict=True):
            if name not in label_of:
                problem = f"the class {name!r} has held-out images ({path}), but no training images"
                raise DistillKacError(f"{self.root}: {problem}. Add training images of this class.")
        parts = [paths[i : i + IMAGES_PER_UNIT] for i in range(0, len(paths), IMAGES_PER_UNIT)]
        return Contents(
            shape=self.shape_of_first(paths[:1]),
            num_classes=len(names),
            labels=np.fromiter((label_of[name] for name in classes), np.int64, len(classes)),
            held_out=division.held_out,
            units=[Unit(len(part), part) for part in parts],
            class_names=tuple(names),
            split=division.description,
        )

    def encoded(self, content: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the images at the paths ``content``."""
        names = [self.name(path) for path in content]
        if not self.root.startswith("s3://"):
            yield from ((name, files.read_bytes(name)) for name in names)
            return
        with ThreadPoolExecutor(REMOTE_READS) as readers:
            for start in range(0, len(names), REMOTE_READS):
                part = names[start : start + REMOTE_READS]
                yield from zip(part, readers.map(files.read_bytes, part), strict=True)

    def _check_image(self, path: str) -> str:
        """Return ``path``. Raises ``DistillKacError`` unless ``path`` is an image in a class folder."""
        folder, _, base = path.rpartition("/")
        if path and not base:
            problem = "has no images. Remove this folder or add images."
        elif not path or base.lower().endswith(ARCHIVES):
            problem = "is a file. Give a folder that contains one folder of images per class. Unpack archives first."
        elif not base.lower().endswith(ENDINGS):
            problem = f"is not an image ({', '.join(ENDINGS)}). Remove it."
        elif not folder:
            problem = (
                f"is not in a class folder. Move the images of each class to a folder in {self.root} that is named "
                f"after the class. Images without classes need one folder, such as {self.name('all')}."
            )
        else:
            return path
        raise DistillKacError(f"{self.name(path)} {problem}")
