"""Read MNIST-like datasets and CIFAR-10 in the formats that their authors publish. No code in the files is run.

IDX files, the format of MNIST and its variants (http://yann.lecun.com/exdb/mnist), have a header followed by bytes. The
files are ``ROOT/{train,t10k}-{images-idx3,labels-idx1}-ubyte``, each with or without gzip (``.gz``). Some copies have a
dot instead of the hyphen before ``idx``. The t10k files are held out.

CIFAR-10 is read from the Python archive ``cifar-10-python.tar.gz`` (https://www.cs.toronto.edu/~kriz/cifar.html) or its
extracted folder. The test batch is held out.
"""

import hashlib
import io
import math
import pickle
import tarfile
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kac.data.dataset import Contents, Source, Unit, count_classes, reading
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.integrity import gunzip
from kac.util.text import shorten

PARTS = ("train", "t10k")
DIMENSIONS = {"labels": 1, "images": 3}
NAMES = {
    f"{part}-{kind}": [f"{part}-{kind}{dot}idx{size}-ubyte{packed}" for dot in "-." for packed in ("", ".gz")]
    for kind, size in DIMENSIONS.items()
    for part in PARTS
}
"""The possible names of each of the four files. The first existing file is read."""

SHA256 = {
    "MNIST": {
        "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels": "ff7bcfd416de33731a308c3f266cf351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "Fashion-MNIST": {
        "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
"""SHA-256 checksums of the published IDX files after decompression."""

ARCHIVE = "cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
MD5_EXTRACTED = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""MD5 checksums of the extracted files of CIFAR-10, which contain no checksums themselves."""

FOLDER = "cifar-10-batches-py"
BATCHES = tuple(MD5_EXTRACTED)
META = "batches.meta"
"""The file that contains the class names."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The published class names, for folders without ``META``."""

MOST_BYTES = 2**30
"""The largest valid size of the uncompressed archive, in bytes. The published archive is 186 MB."""

ADVICE = f"Download {ARCHIVE} again; its md5 is {MD5}."


Loaded = tuple[Contents, dict[str, np.ndarray]]
"""Everything in the files: the contents, and the images of each unit, [count, channels, height, width], uint8."""


@dataclass(frozen=True)
class PublishedSource(Source):
    """Published files, which are read completely into memory."""

    @cached_property
    @abstractmethod
    def loaded(self) -> Loaded:
        """The content of all files, read once per process: 184 MB for CIFAR-10."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle only ``root``, because the content is large."""
        return {"root": self.root}

    def contents(self) -> Contents:
        """Return everything in the files except the images."""
        return self.loaded[0]

    def decode(self, content: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield all images of the unit ``content`` in one block."""
        yield self.loaded[1][content]


def _load(images: dict[str, np.ndarray], labels: dict[str, np.ndarray], num_classes: int, **facts: Any) -> Loaded:
    """Combine parts into a dataset. The last part is held out."""
    *_, test = images
    contents = Contents(
        shape=images[test].shape[1:],
        num_classes=num_classes,
        labels=np.concatenate(list(labels.values())).astype(np.int64),
        held_out=np.concatenate([np.full(len(part), name == test) for name, part in labels.items()]),
        units=[Unit(len(part), name) for name, part in images.items()],
        **facts,
    )
    return contents, images


class IdxFile(NamedTuple):
    """The content of an IDX file."""

    path: str
    values: np.ndarray  # uint8
    sha256: str  # of the uncompressed file


@dataclass(frozen=True)
class IdxSource(PublishedSource):
    """The four IDX files in the folder ``root``."""

    def stamps(self) -> Iterator[files.Stamp]:
        """Yield the stamps of the files that exist."""
        names = {name for variants in NAMES.values() for name in variants}
        return (stamp for stamp in files.walk(self.root) if stamp.path in names)

    @cached_property
    def loaded(self) -> Loaded:
        """The content of the four files."""
        found = {file: self._read_file(file) for file in NAMES}
        labels, images = ({part: found[f"{part}-{kind}"].values for part in PARTS} for kind in DIMENSIONS)
        for part in PARTS:
            if len(images[part]) != len(labels[part]) or not images[part].size:
                problem = f"the {part} files have {len(images[part])} images and {len(labels[part])} labels"
                raise DistillKacError(f"{self.root}: {problem}. Give files with a label for each image.")
        train_size, test_size = (images[part].shape[1:] for part in PARTS)
        if train_size != test_size:
            problem = f"the train images have size {train_size}, but the t10k images have size {test_size}"
            raise DistillKacError(f"{self.root}: {problem}. Give files with images of one size.")
        train, test = (found[f"{part}-images"].path.rpartition("/")[2] for part in PARTS)
        return _load(
            {part: values[:, None] for part, values in images.items()},
            labels,
            count_classes({found[f"{part}-labels"].path: labels[part] for part in PARTS}),
            split=f"training images from {train}, held-out images from {test}",
            warnings=_unlike_published(found),
        )

    def _read_file(self, file: str) -> IdxFile:
        """Read one of the four files. ``file`` is a key of ``NAMES``."""
        found = [stamp.path for stamp in files.walk(self.root)]
        name = next((name for name in NAMES[file] if name in found), None)
        if name is None:
            others = f"only {shorten(found, 8)}" if found else "and no other files"
            raise DistillKacError(
                f"{self.root} has no {NAMES[file][0]} or {NAMES[file][1]}, {others}. Rename the file, or give the "
                "folder that contains it."
            )
        path, dimensions = self.name(name), DIMENSIONS[file.partition("-")[2]]
        start, magic = 4 + 4 * dimensions, bytes((0, 0, 0x08, dimensions))  # 0x08: unsigned bytes

        def read_shape(data: bytes) -> tuple[int, ...]:
            if data[:4] != magic or len(data) < start:
                raise ValueError(f"it begins with {data[:4].hex() or 'nothing'} instead of {magic.hex()}")
            return tuple(np.frombuffer(data[4:start], ">u4").tolist())

        data = files.read_bytes(path)
        with reading(path, f"an IDX file of bytes with {dimensions} dimensions"):
            if name.endswith(".gz"):
                data = gunzip(path, data, lambda head: start + math.prod(read_shape(head)))
            shape = read_shape(data)
            if len(data) != start + math.prod(shape):
                sides = " x ".join(f"{side:,}" for side in shape)
                raise ValueError(f"it has {len(data):,} bytes, but its header claims {sides} values")
        values = np.frombuffer(data, np.uint8, offset=start).reshape(shape)
        return IdxFile(path, values, hashlib.sha256(data).hexdigest())


def _unlike_published(found: dict[str, IdxFile]) -> tuple[str, ...]:
    """If some of the four files match a published data set, return a warning for each of the other files."""
    for name, published in SHA256.items():
        others = [file for file in published if found[file].sha256 != published[file]]
        if len(others) < len(published):
            return tuple(
                f"{found[file].path} differs from the file published for {name}, although other files match that data "
                f"set. The sha256 of its uncompressed content is {found[file].sha256} instead of {published[file]}."
                for file in others
            )
    return ()


@dataclass(frozen=True)
class Cifar10Source(PublishedSource):
    """The archive ``root``, or a folder that contains the archive or its extracted files."""

    def stamps(self) -> Iterator[files.Stamp]:
        """Return the stamp of the archive, or the stamps of the six batches and the file with class names."""
        found = {stamp.path: stamp for stamp in files.walk(self.root)}
        for below in ("", f"{FOLDER}/"):
            if all(below + name in found for name in BATCHES):
                return iter([found[below + name] for name in (*BATCHES, META) if below + name in found])
        archive = next((stamp for path, stamp in found.items() if path in {"", ARCHIVE}), None)
        if archive is None:
            raise DistillKacError(
                f"{self.root} contains neither {ARCHIVE} nor its folder {FOLDER} with all six batches. {ADVICE}"
            )
        return iter([archive])

    @cached_property
    def loaded(self) -> Loaded:
        """The content of the archive or of the extracted files."""
        paths = {stamp.path.rpartition("/")[2]: self.name(stamp.path) for stamp in self.stamps()}
        content = {name: files.read_bytes(path) for name, path in paths.items()}
        published = MD5_EXTRACTED if len(paths) > 1 else dict.fromkeys(paths, MD5)
        md5s = {name: hashlib.md5(content[name], usedforsecurity=False).hexdigest() for name in published}
        warnings = tuple(
            f"{paths[name]} differs from the published file of CIFAR-10. Its md5 is {md5} instead of {published[name]}."
            for name, md5 in md5s.items()
            if md5 != published[name]
        )
        if len(paths) == 1:
            (name,) = paths
            content = _unpack(paths[name], content[name])
        images, labels, names = {}, {}, CLASSES
        for name in BATCHES:
            with reading(f"{self.root}: {name}", "a batch of 32x32 images with labels", ADVICE):
                batch = _Unpickler(io.BytesIO(content[name]), encoding="bytes").load()
                images[name] = batch[b"data"].values.reshape(-1, 3, 32, 32)
                labels[name] = np.array(batch[b"labels"], np.int64).reshape(-1)
                if len(images[name]) != len(labels[name]):
                    raise ValueError(f"it has {len(images[name])} images, but {len(labels[name])} labels")
        if META in content:
            with reading(f"{self.root}: {META}", f"a file with {len(CLASSES)} class names", ADVICE):
                meta = _Unpickler(io.BytesIO(content[META]), encoding="bytes").load()
                names = tuple(name.decode("utf-8", "replace") for name in meta[b"label_names"])
                if len(names) != len(CLASSES):
                    raise ValueError(f"it has {len(names)} names")
        split = f"training images from {BATCHES[0]} .. {BATCHES[-2]}, held-out images from {BATCHES[-1]}"
        return _load(images, labels, len(CLASSES), split=split, class_names=names, warnings=warnings)


def _unpack(path: str, packed: bytes) -> dict[str, bytes]:
    """Return the contents of the archive's batches and ``META`` file, by name."""
    content, found = gunzip(path, packed, lambda _: MOST_BYTES, ADVICE), {}
    tar = io.BytesIO(content)
    with reading(path, f"a complete {ARCHIVE}", ADVICE), tarfile.open(fileobj=tar, mode="r:") as archive:
        for member in archive:
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder == FOLDER and name in (*BATCHES, META) and (file := archive.extractfile(member)):
                if member.size > len(content):
                    raise ValueError(f"{member.name} claims a size of {member.size:,} bytes, larger than the archive")
                found[name] = file.read()
        for name in BATCHES:
            if name not in found:
                raise ValueError(f"it has no {FOLDER}/{name}")
    return found


class _Unpickler(pickle.Unpickler):
    """Reads numbers, text, lists, dictionaries and arrays of bytes. It calls only the functions in this module."""

    def find_class(self, module: str, name: str) -> Any:
        """Return this module's replacement for a global name in a pickle."""
        known = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric", "_codecs"}
        if module not in known or name not in _STAND_INS:
            raise ValueError(f"it refers to {module}.{name}, which could run code; no code was run")
        return _STAND_INS[name]


class _Bytes:  # stands in for a numpy array of uint8
    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, is_fortran, data = state
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Uint8:  # stands in for numpy.dtype
    def __init__(self, name: str | bytes, *_: Any) -> None:
        if name not in ("u1", b"u1"):
            raise ValueError(f"the type of the values is {name!r}, not bytes")

    def __setstate__(self, state: Any) -> None:
        pass  # the state is the byte order, which single bytes do not need


def _from_buffer(data: bytes, _: Any, shape: tuple[int, ...], order: str) -> _Bytes:  # for pickles of protocol 5
    array = _Bytes()
    array.__setstate__((1, shape, None, order == "F", data))
    return array


def _encode(text: str, encoding: str) -> bytes:  # stands in for _codecs.encode in pickles of protocol 2
    if encoding != "latin1":
        raise ValueError(f"the encoding of its bytes is {encoding!r}, not latin1")
    return text.encode("latin1")


_STAND_INS: dict[str, Any] = {
    "_reconstruct": _Bytes,
    "ndarray": _Bytes,
    "dtype": _Uint8,
    "_frombuffer": _from_buffer,
    "encode": _encode,
}
