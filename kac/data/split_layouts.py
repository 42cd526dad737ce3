"""Decide which files are for training and which are held out, for image folders and Parquet files.

A name belongs to a split if it contains one of the split's words: ``train2017``, ``my-test-set``, ``trainA``. Hugging
Face uses the same words. The held-out images are the test split, or the validation split if there is no test split.
Ambiguous names raise an error, so that a misread name never adds a file to the training images.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from kac.data.dataset import EVERY_FIFTH
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.text import shorten

Part = Literal["train", "validation", "test"]

WORDS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""The words that name a split."""

NOUN = re.compile("(set|split|data|images|imgs)$")
"""Nouns that may follow a split word without a space, as in ``trainset``."""

MOST_SHOWN = 3
"""Maximum number of names in a message."""


class SplitName(NamedTuple):
    """A split, and the name that indicates it."""

    part: Part
    name: str  # name of a file, or name of a folder followed by a slash


class FolderRole(NamedTuple):
    """The split and the class of the images in a folder."""

    split: SplitName | None
    class_name: str


class Division(NamedTuple):
    """The division of a dataset into training images and held-out images."""

    used: list[int]  # indices of the files or images to read
    held_out: np.ndarray | None  # [used] bool; None: every fifth image of each class
    description: str  # how the dataset is divided, and why


def split_file(root: str, path: str) -> SplitName | None:
    """Return the split that a data file or its folders below ``root`` name, or None if they name no split.

    Raises:
        DistillKacError: the file and its folders name several splits.
    """
    *folders, base = path.split("/")
    stem = base.rpartition(".")[0]
    named = [SplitName(part, base) for part in _parts_of(stem)]
    if named and _parts_of(_words(stem)[0]):
        named = named[:1]  # the first word decides: "train_no_test" is for training
    return _only_split(root, path, [*_splits_of_folders(folders), *named])


def split_folders(root: str, folders: Iterable[str]) -> dict[str, FolderRole]:
    """Return the role of each of ``folders``, which are paths below ``root``.

    The layouts are ``CLASS``, ``SPLIT/CLASS`` and ``CLASS/SPLIT``. ``SPLIT/CLASS`` may be inside folders that all
    images share. A class name may contain a split word, but must also contain a different word.

    Raises:
        DistillKacError: a split has no classes, classes are nested, or names are ambiguous.
    """
    parts = {folder: folder.split("/") for folder in folders}
    above = {path: _only_split(root, path, _splits_of_folders(names[:-1])) for path, names in parts.items()}
    bare = {
        path: SplitName(named[0], f"{path}/")
        for path, names in parts.items()
        if (named := _parts_of(names[-1])) and len(_words(names[-1])) == 1
    }
    if any(above.values()):  # SPLIT/CLASS
        around = {path: [name for name in names[:-1] if not _parts_of(name)] for path, names in parts.items()}
        usual = next(around[path] for path, split in above.items() if split)
        odd = [path for path in parts if above[path] is None or around[path] != usual or len(bare) == len(parts)]
        roles = {path: FolderRole(above[path], names[-1]) for path, names in parts.items()}
    elif bare:  # CLASS/SPLIT
        odd = [path for path, names in parts.items() if path not in bare or len(names) != 2]
        roles = {path: FolderRole(split, parts[path][0]) for path, split in bare.items()}
    else:  # CLASS
        parts_of = [set(_parts_of(path)) for path in parts]
        are_splits = all(parts_of) and len(set.union(*parts_of)) > 1
        odd = [path for path, names in parts.items() if are_splits or len(names) > 1]
        roles = {path: FolderRole(None, path) for path in parts}
    if odd:
        others = [path for path in parts if path not in odd]
        contrast = f", although it is clear in {shorten(others, 1)}" if others else ""
        raise DistillKacError(
            f"{root}: the split or the class of the images in {shorten(odd, MOST_SHOWN)} is unclear{contrast}. Use "
            "ROOT/CLASS/IMAGE or ROOT/{train,test}/CLASS/IMAGE for all images. Images without classes need one class "
            "folder, such as ROOT/train/all. Rename a class that is named like a split."
        )
    return roles


def split_images(paths: Iterable[str]) -> list[SplitName | None] | None:
    """Return each image's split from the first word of the image's name, as in ``cat/train_001.png``.

    Returns None unless every name begins with a split and at least one split is not training. If all names begin with
    ``train``, the images may simply show trains.
    """
    known = {word: SplitName(part, f"{word}*") for word, part in WORDS.items()}
    words = (_words(path.rpartition("/")[2]) for path in paths)
    splits = [known.get(first[0]) if first else None for first in words]
    parts = {split and split.part for split in splits}
    return splits if None not in parts and {"train"} < parts else None


def divide(root: str, splits: Sequence[SplitName | None], paths: Sequence[str], unit: str) -> Division:
    """Choose which files or images to read, and which of them to hold out.

    Args:
        splits: the split of each file or image.
        paths: for each file, its path below the root; for each image, the path of its folder below the root.
        unit: "files" or "images", for messages.

    Raises:
        DistillKacError: only some files or images belong to a split, or there is no training split.
    """
    known = [split for split in splits if split]
    everything = list(range(len(splits)))
    if not known:
        reason = "there is only one file" if list(paths) == [""] else "no folder or file is named train or test"
        return Division(everything, None, f"{EVERY_FIFTH}, because {reason}")
    if None in splits:
        plain = paths[splits.index(None)] or files.join(root, "")
        raise DistillKacError(
            f"{root}: {known[0].name} names the {known[0].part} split, but {plain} names no split. Move one of the "
            "two away, or use the words train, validation and test in the names of all splits."
        )
    described: dict[Part, str] = {}
    for part in dict.fromkeys(split.part for split in known):
        names = [split.name for split in known if split.part == part]
        described[part] = shorten(list(dict.fromkeys(names)), MOST_SHOWN)
        if any(name.endswith(("/", "*")) for name in names):  # names of folders or groups, not of single files
            described[part] += f" ({len(names):,} {unit if len(names) > 1 else unit.removesuffix('s')})"
    if "train" not in described:
        raise DistillKacError(
            f"{root}: there is only the {' and '.join(described)} split ({'; '.join(described.values())}), with "
            "nothing to train on. Add a folder or file with the word train in its name, or rename the training images."
        )
    chosen = next((part for part in ("test", "validation") if part in described), None)
    if chosen is None:
        reason = "nothing is named test or validation"
        return Division(everything, None, f"{EVERY_FIFTH} of {described['train']}, because {reason}")
    unused = [f"{text} is not used" for part, text in described.items() if part not in {"train", chosen}]
    source = f"training images from {described['train']}, held-out images from {described[chosen]}, by their names"
    used = [i for i, split in enumerate(known) if split.part in {"train", chosen}]
    return Division(used, np.array([known[i].part == chosen for i in used]), "; ".join([source, *unused]))


def _splits_of_folders(folders: Sequence[str]) -> list[SplitName]:
    """Return the splits in the names of the folders on a path, outermost first."""
    return [
        SplitName(part, "/".join(folders[: i + 1]) + "/")
        for i, folder in enumerate(folders)
        for part in _parts_of(folder)
    ]


def _only_split(root: str, path: str, splits: Sequence[SplitName]) -> SplitName | None:
    """Return the only split in ``splits``, or None if it is empty. Raises ``DistillKacError`` if there are several."""
    parts = list(dict.fromkeys(split.part for split in splits))
    if len(parts) > 1:
        raise DistillKacError(
            f"{root}: {path} names several splits, {' and '.join(parts)}. Rename it so that it names only one."
        )
    return splits[0] if splits else None


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case. A word is a run of letters; ``aB`` is two words."""
    return [word.lower() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name) if word]


def _parts_of(name: str) -> list[Part]:
    """Return the splits that a name refers to, one per split word."""
    parts = (WORDS.get(word) or WORDS.get(NOUN.sub("", word)) for word in _words(name))
    return [part for part in parts if part]
