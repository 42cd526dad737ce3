"""Image folders: ``ROOT/CLASS/IMAGE``, or ``ROOT/train/CLASS/IMAGE`` and ``ROOT/test/CLASS/IMAGE``.

Classes are numbered by the sorted names of their folders. Hidden files are left out; any other that is no image is
refused.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kac import files
from kac.data.encoded import Decoder
from kac.data.source import Contents, Unit, images_a_block
from kac.errors import DistillKacError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PARTS = ("train", "test")
IMAGES_A_UNIT = 1000
REMOTE_READS = 16
"""How many images of a prefix on S3 are read at once."""


class ImageFile(NamedTuple):
    """Where an image is and what that says."""

    path: str  # below the root
    part: str  # train, test, or empty where the folder has no such parts
    class_name: str


@dataclass(frozen=True)
class FolderSource:
    """The images below ``root``."""

    root: str
    decoder: Decoder

    def stamps(self) -> Iterator[files.Stamp]:
        """Every file below the root."""
        return files.walk(self.root)

    def contents(self) -> Contents:
        """Raises ``DistillKacError``: an empty folder, files that are no images, or images without classes."""
        paths, parts, classes = self._columns()
        names = sorted({name for name, part in zip(classes, parts, strict=True) if part != "test"})
        numbers = {name: number for number, name in enumerate(names)}
        strange = next((name for name in classes if name not in numbers), None)
        if strange is not None:
            raise DistillKacError(f"{self.root}: expected the classes of train in test, found test/{strange}")
        has_test = "test" in set(parts)
        return Contents(
            shape=self.decoder.shape_of(self._read(paths[0]), self._name(paths[0])),
            num_classes=len(names),
            labels=np.fromiter((numbers[name] for name in classes), np.int64, len(classes)),
            held_out=np.array([part == "test" for part in parts]) if has_test else None,
            units=[
                Unit(len(unit), unit)
                for unit in (paths[i : i + IMAGES_A_UNIT] for i in range(0, len(paths), IMAGES_A_UNIT))
            ],
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

    def _columns(self) -> tuple[list[str], list[str], list[str]]:
        """Path, part and class of each image; the names of parts and classes are kept once, not once an image."""
        paths, parts, classes, kept = [], [], [], dict[str, str]()
        for stamp in self.stamps():
            image = _placed(self.root, stamp.path)
            paths.append(image.path)
            parts.append(kept.setdefault(image.part, image.part))
            classes.append(kept.setdefault(image.class_name, image.class_name))
            if bool(image.part) != bool(parts[0]):
                raise DistillKacError(
                    f"{self.root}: expected all images in class folders or all in train and test, found {paths[0]} and "
                    f"{image.path}"
                )
        if not paths:
            raise DistillKacError(
                f"{self.root}: expected images in folders named by their class, found an empty folder"
            )
        return paths, parts, classes

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


def _placed(root: str, path: str) -> ImageFile:
    """An image by its path below the root."""
    name = files.join(root, path)
    *folders, base = path.split("/")
    if not base:
        raise DistillKacError(f"{name}: expected images in this folder, found none: remove it or fill it")
    if not base.lower().endswith(ENDINGS):
        raise DistillKacError(f"{name}: expected images alone ({', '.join(ENDINGS)}), found this file: move it away")
    if len(folders) == 1:
        return ImageFile(path, "", folders[0])
    if len(folders) == 2 and folders[0] in PARTS:
        return ImageFile(path, folders[0], folders[1])
    raise DistillKacError(
        f"{name}: expected ROOT/CLASS/IMAGE or ROOT/{{train,test}}/CLASS/IMAGE, found this place: images without "
        "classes go into one folder below ROOT"
    )
