"""Decide which files are for training and which are held out, for image folders and Parquet files.

A name belongs to a split if it contains a word of the split: ``train2017``, ``my-test-set``, ``trainA``. Hugging Face
uses the same words. The held-out images are the test split, or the validation split if there is no test split.
Ambiguous names raise an error, so that no file is used for training because its name was misread.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from kac.data.splits import EVERY_FIFTH
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
"""Nouns that may follow such a word without a space: ``trainset``."""

MOST_SHOWN = 3
"""The most names in a message."""


class SplitName(NamedTuple):
    """A split, and the name that indicates it."""

    part: Part
    name: str  # of a file or folder; a folder ends in a slash


class FolderRole(NamedTuple):
    """The split and the class of the images in a folder."""

    split: SplitName | None
    class_name: str


class Division(NamedTuple):
    """How a dataset is divided."""

    held_out: Part | None  # None: every fifth image of each class
    description: str  # how it is divided, and why

    @property
    def used(self) -> set[Part | None]:
        """The parts to read. None stands for files without a split."""
        return {"train", self.held_out} if self.held_out else {"train", None}


def split_file(root: str, path: str) -> SplitName | None:
    """Return the split of a data file, from its name or its folders below ``root``; None if no name contains a split.

    Raises:
        DistillKacError: the names contain several splits.
    """
    *folders, base = path.split("/")
    stem = base.rpartition(".")[0]
    words = _words(stem)
    first = _part_of(words[0]) if words else None
    named = [SplitName(first, base)] if first else _find_splits(base, stem)
    return _only_split(root, path, [*_splits_of_folders(folders), *named])


def split_folders(root: str, folders: Iterable[str]) -> dict[str, FolderRole]:
    """Return the role of each of ``folders``, which are paths below ``root``.

    The layouts are ``CLASS``, ``SPLIT/CLASS`` and ``CLASS/SPLIT``. ``SPLIT/CLASS`` may be inside folders that all
    images share. The name of a class may contain the word of a split, but must contain another word too.

    Raises:
        DistillKacError: splits without classes, nested classes, or ambiguous names.
    """
    parts = {folder: folder.split("/") for folder in folders}
    above = {path: _only_split(root, path, _splits_of_folders(names[:-1])) for path, names in parts.items()}
    bare = {path: part for path, names in parts.items() if (part := _whole_name_part(names[-1]))}
    if any(above.values()):
        return _splits_of_classes(root, parts, above, bare)
    if bare:
        return _classes_of_splits(root, parts, bare)
    deep = next((path for path, names in parts.items() if len(names) > 1), None)
    if deep is not None:
        raise DistillKacError(
            f"{root}: images in {deep} are too deep for a class folder, and no folder on the way names a split. Use "
            "ROOT/CLASS/IMAGE or ROOT/{train,test}/CLASS/IMAGE."
        )
    named = {path: {split.part for split in _find_splits(path, path)} for path in parts}
    if all(named.values()) and len(set.union(*named.values())) > 1:
        raise DistillKacError(
            f"{root}: all folders are named like splits ({shorten(list(parts), MOST_SHOWN)}), but there are no class "
            f"folders in them. {_ADVICE}"
        )
    return {path: FolderRole(None, path) for path in parts}


_ADVICE = (
    "Use ROOT/{train,test}/CLASS/IMAGE; images without classes need one class folder, such as ROOT/train/all. Rename a "
    "class that is named like a split."
)


def _splits_of_classes(
    root: str, parts: Mapping[str, Sequence[str]], above: Mapping[str, SplitName | None], bare: Mapping[str, Part]
) -> dict[str, FolderRole]:
    """Return the roles for the layout ``SPLIT/CLASS``."""
    for path, split in above.items():
        if split is None:
            other = next(named.name for named in above.values() if named)
            problem = f"there are images directly in {path}/" if path in bare else f"{path}/ names no split"
            raise DistillKacError(
                f"{root}: {problem}, but other images are in class folders of a split, such as {other}. Move it away, "
                "or use ROOT/{train,test}/CLASS/IMAGE for all images."
            )
    if len(bare) == len(parts):
        raise DistillKacError(
            f"{root}: there are splits inside splits ({shorten(list(parts), MOST_SHOWN)}), and no class folders. "
            f"{_ADVICE}"
        )
    around = {path: tuple(name for name in names[:-1] if not _find_splits(name, name)) for path, names in parts.items()}
    first, *others = parts
    unlike = next((path for path in others if around[path] != around[first]), None)
    if unlike is not None:
        raise DistillKacError(
            f"{root}: {first}/ and {unlike}/ are nested differently, so it is unclear which folders are the classes. "
            "Use ROOT/{train,test}/CLASS/IMAGE."
        )
    return {path: FolderRole(above[path], names[-1]) for path, names in parts.items()}


def _classes_of_splits(
    root: str, parts: Mapping[str, Sequence[str]], bare: Mapping[str, Part]
) -> dict[str, FolderRole]:
    """Return the roles for the layout ``CLASS/SPLIT``."""
    plain = next((path for path in parts if path not in bare), None)
    if plain is not None:
        raise DistillKacError(
            f"{root}: {next(iter(bare))}/ names a split, but {plain}/ does not. If the first is a class, rename it. If "
            "it is a split, put all class folders into folders of splits: ROOT/{train,test}/CLASS/IMAGE."
        )
    wrong = next((path for path, names in parts.items() if len(names) != 2), None)
    if wrong is not None:
        raise DistillKacError(
            f"{root}: there are images directly in {wrong}/, which is a split and no class. {_ADVICE}"
        )
    return {path: FolderRole(SplitName(bare[path], f"{path}/"), names[0]) for path, names in parts.items()}


def split_images(paths: Iterable[str]) -> list[SplitName | None] | None:
    """Return the splits of images from the first words of their own names, as in ``cat/train_001.png``.

    Returns None unless every name begins with a split, and some name with another split than training: an image may
    simply show a train.
    """
    known = {word: SplitName(part, f"{word}*") for word, part in WORDS.items()}
    words = (_words(path.rpartition("/")[2]) for path in paths)
    splits = [known.get(first[0]) if first else None for first in words]
    parts = {split and split.part for split in splits}
    return splits if None not in parts and {"train"} < parts else None


def choose(root: str, splits: Sequence[SplitName | None], paths: Sequence[str], unit: str) -> Division:
    """Choose what is held out.

    Args:
        splits: of each file or folder.
        paths: of the same files or folders, below the root.
        unit: what they are, in the plural.

    Raises:
        DistillKacError: only some belong to a split, or no split is for training.
    """
    counts: dict[Part, Counter[str]] = {}
    for split in splits:
        if split:
            counts.setdefault(split.part, Counter())[split.name] += 1
    if not counts and list(paths) == [""]:
        return Division(None, f"{EVERY_FIFTH}, because there is only one file")
    if not counts:
        return Division(None, f"{EVERY_FIFTH}, because no folder or file is named train or test")
    if None in splits:
        known = next(split for split in splits if split)
        raise DistillKacError(
            f"{root}: {known.name} names the {known.part} split, but "
            f"{paths[splits.index(None)] or files.join(root, '')} names no split. Move one of them away, or use the "
            "words train, validation and test in the names of all splits."
        )
    described = {part: _describe(names, unit) for part, names in counts.items()}
    if "train" not in counts:
        raise DistillKacError(
            f"{root}: there is only the {' and '.join(described)} split ({'; '.join(described.values())}), and nothing "
            "to train on. Add a folder or file with the word train in its name, or rename the training images."
        )
    held_out: Part | None = next((part for part in ("test", "validation") if part in counts), None)
    if held_out is None:
        return Division(None, f"{EVERY_FIFTH} of {described['train']}, because nothing is named test or validation")
    unused = ", ".join(f"{described[part]} is not used" for part in counts if part not in {"train", held_out})
    return Division(
        held_out,
        f"training images from {described['train']}, held-out images from {described[held_out]}, by their names"
        + (f"; {unused}" if unused else ""),
    )


def _describe(names: Counter[str], unit: str) -> str:
    total = sum(names.values())
    is_files = not any(name.endswith(("/", "*")) for name in names)
    count = "" if is_files else f" ({total:,} {unit if total > 1 else unit.removesuffix('s')})"
    return shorten(list(names), MOST_SHOWN) + count


def _splits_of_folders(folders: Sequence[str]) -> list[SplitName]:
    """Return the splits in the names of the folders on a path, outermost first."""
    paths = ["/".join(folders[: i + 1]) + "/" for i in range(len(folders))]
    return [split for folder, path in zip(folders, paths, strict=True) for split in _find_splits(path, folder)]


def _find_splits(name: str, text: str) -> list[SplitName]:
    """Return a ``SplitName`` of ``name`` for each word of ``text`` that names a split."""
    return [SplitName(part, name) for word in _words(text) if (part := _part_of(word))]


def _only_split(root: str, path: str, splits: Sequence[SplitName]) -> SplitName | None:
    """Return the only split of ``path``, or None; raise ``DistillKacError`` if there are several."""
    parts = list(dict.fromkeys(split.part for split in splits))
    if len(parts) > 1:
        raise DistillKacError(
            f"{root}: {path} names several splits, {' and '.join(parts)}. Rename it so that it names one."
        )
    return splits[0] if splits else None


def _whole_name_part(name: str) -> Part | None:
    """Return the split of a name that contains no other word: ``train``, ``val2017``."""
    words = _words(name)
    return _part_of(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case. A word is a run of letters; aB is two words."""
    return [word.lower() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name) if word]


def _part_of(word: str) -> Part | None:
    return WORDS.get(word) or WORDS.get(NOUN.sub("", word))
