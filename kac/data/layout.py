"""Which files are for training and which are held out: the one rule for image folders and Parquet files.

A name belongs to a split if one of its words is a split's: ``train2017``, ``my-test-set``, ``trainA``. The words are
those of Hugging Face. The held-out images are the test split, or the validation split if there is no test split. Names
that leave a doubt are an error: nothing is trained on because its name was not understood.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from kac import files
from kac.data.splits import EVERY_FIFTH
from kac.errors import DistillKacError

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
"""What may follow such a word without a space: ``trainset``."""

SHOWN = 3
"""How many names a message lists."""


class Named(NamedTuple):
    """The split that a name belongs to."""

    part: Part
    name: str  # the file or folder that says so, a folder with a slash at its end


class Placed(NamedTuple):
    """What the folder of an image says."""

    named: Named | None
    class_name: str


class Split(NamedTuple):
    """How a dataset is divided."""

    held_out: Part | None  # None: every fifth image of each class
    description: str  # how that was decided

    @property
    def used(self) -> set[Part | None]:
        """The parts that are read; None: files without a split."""
        return {"train", self.held_out} if self.held_out else {"train", None}


def split_file(root: str, path: str) -> Named | None:
    """The split of a data file, by its name or those of its folders below ``root``; None if no name says.

    Raises:
        DistillKacError: the names say several.
    """
    *folders, base = path.split("/")
    stem = base.rpartition(".")[0]
    words = _words(stem)
    first = _part_of(words[0]) if words else None
    named = [Named(first, base)] if first else _named(base, stem)
    return _only(root, path, [*_named_folders(folders), *named])


def split_folders(root: str, folders: Iterable[str]) -> dict[str, Placed]:
    """Split and class of the images in each of ``folders``, paths below ``root``.

    Understood are ``CLASS``, ``SPLIT/CLASS``, which may be inside other folders that all images share, and
    ``CLASS/SPLIT``. The name of a class may contain a split's word, but may not consist of it.

    Raises:
        DistillKacError: splits without classes, nested classes, or names that leave a doubt.
    """
    parts = {folder: folder.split("/") for folder in folders}
    above = {path: _only(root, path, _named_folders(names[:-1])) for path, names in parts.items()}
    bare = {path: part for path, names in parts.items() if (part := _only_word(names[-1]))}
    if any(above.values()):
        return _splits_of_classes(root, parts, above, bare)
    if bare:
        return _classes_of_splits(root, parts, bare)
    deep = next((path for path, names in parts.items() if len(names) > 1), None)
    if deep is not None:
        raise DistillKacError(
            f"{root}: found images in {deep}, which is too deep for a class folder and names no split. Use ROOT/CLASS/"
            "IMAGE or ROOT/{train,test}/CLASS/IMAGE"
        )
    found = {path: {word.part for word in _named(path, path)} for path in parts}
    if all(found.values()) and len(set.union(*found.values())) > 1:
        raise DistillKacError(
            f"{root}: the names of all folders are those of splits, {_listed(list(parts))}, but there are no class "
            f"folders in them. {_ADVICE}"
        )
    return {path: Placed(None, path) for path in parts}


_ADVICE = (
    "Use ROOT/{train,test}/CLASS/IMAGE, with one class folder for images without classes, such as ROOT/train/all; "
    "rename a class whose name says a split"
)


def _splits_of_classes(
    root: str, parts: Mapping[str, Sequence[str]], above: Mapping[str, Named | None], bare: Mapping[str, Part]
) -> dict[str, Placed]:
    """``SPLIT/CLASS``."""
    for path, named in above.items():
        if named is None:
            other = next(place.name for place in above.values() if place)
            found = f"images directly in {path}/" if path in bare else f"{path}/, which names no split"
            raise DistillKacError(
                f"{root}: expected every image in a class folder of a split, as in {other}, found {found}. Move it "
                "away, or use ROOT/{train,test}/CLASS/IMAGE for all images"
            )
    if len(bare) == len(parts):
        raise DistillKacError(
            f"{root}: found folders of splits in folders of splits, {_listed(list(parts))}, and no class folders. "
            f"{_ADVICE}"
        )
    around = {path: tuple(name for name in names[:-1] if not _named(name, name)) for path, names in parts.items()}
    first, *others = parts
    unlike = next((path for path in others if around[path] != around[first]), None)
    if unlike is not None:
        raise DistillKacError(
            f"{root}: found {first}/ and {unlike}/, so it is not clear which folders are the classes. Use ROOT/"
            "{train,test}/CLASS/IMAGE"
        )
    return {path: Placed(above[path], names[-1]) for path, names in parts.items()}


def _classes_of_splits(root: str, parts: Mapping[str, Sequence[str]], bare: Mapping[str, Part]) -> dict[str, Placed]:
    """``CLASS/SPLIT``."""
    plain = next((path for path in parts if path not in bare), None)
    if plain is not None:
        raise DistillKacError(
            f"{root}: found {next(iter(bare))}/, which names a split, beside {plain}/, which does not. Rename it if it "
            "is a class; if it is a split, put all class folders into folders of splits, ROOT/{train,test}/CLASS/IMAGE"
        )
    wrong = next((path for path, names in parts.items() if len(names) != 2), None)
    if wrong is not None:
        raise DistillKacError(f"{root}: found images directly in {wrong}/, which names a split and no class. {_ADVICE}")
    return {path: Placed(Named(bare[path], f"{path}/"), names[0]) for path, names in parts.items()}


def split_images(paths: Iterable[str]) -> list[Named | None] | None:
    """The splits of images by the first words of their own names, as in ``cat/train_001.png``.

    None unless all names begin with a split's word and some of them with that of another split than training: an
    image may also show a train.
    """
    known = {word: Named(part, f"{word}*") for word, part in WORDS.items()}
    words = (_words(path.rpartition("/")[2]) for path in paths)
    found = [known.get(first[0]) if first else None for first in words]
    parts = {named and named.part for named in found}
    return found if None not in parts and {"train"} < parts else None


def choose(root: str, named: Sequence[Named | None], paths: Sequence[str], unit: str) -> Split:
    """What is held out of files or folders whose names say this.

    Args:
        paths: of the same, below the root. unit: what they are, in the plural.

    Raises:
        DistillKacError: only some belong to a split, or none is for training.
    """
    counts: dict[Part, Counter[str]] = {}
    for name in named:
        if name:
            counts.setdefault(name.part, Counter())[name.name] += 1
    if not counts and list(paths) == [""]:
        return Split(None, f"{EVERY_FIFTH} of the one file")
    if not counts:
        return Split(None, f"{EVERY_FIFTH}, since no name of a folder or file says train or test")
    if None in named:
        known = next(name for name in named if name)
        raise DistillKacError(
            f"{root}: found {known.name}, which names the {known.part} split, beside "
            f"{paths[named.index(None)] or files.join(root, '')}, which names no split. Move one of them away, or name "
            "the splits of all by the words train, validation and test"
        )
    described = {part: _described(names, unit) for part, names in counts.items()}
    if "train" not in counts:
        raise DistillKacError(
            f"{root}: found the {' and '.join(described)} split, {'; '.join(described.values())}, and nothing to "
            "train on. Add a folder or file with the word train in its name, or rename what is for training"
        )
    held_out: Part | None = next((part for part in ("test", "validation") if part in counts), None)
    if held_out is None:
        return Split(None, f"{EVERY_FIFTH} of {described['train']}, since no name says test or validation")
    unused = ", ".join(f"{described[part]} is not used" for part in counts if part not in {"train", held_out})
    return Split(
        held_out,
        f"training images from {described['train']}, held-out images from {described[held_out]}, as the names say"
        + (f"; {unused}" if unused else ""),
    )


def _described(names: Counter[str], unit: str) -> str:
    total = sum(names.values())
    is_listed = not any(name.endswith(("/", "*")) for name in names)
    return _listed(list(names)) + ("" if is_listed else f" ({total:,} {unit if total > 1 else unit.removesuffix('s')})")


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def _named_folders(folders: Sequence[str]) -> list[Named]:
    """What the folders on a path say, outermost first."""
    below = ["/".join(folders[: i + 1]) + "/" for i in range(len(folders))]
    return [named for folder, name in zip(folders, below, strict=True) for named in _named(name, folder)]


def _named(name: str, words_of: str) -> list[Named]:
    return [Named(part, name) for word in _words(words_of) if (part := _part_of(word))]


def _only(root: str, path: str, found: Sequence[Named]) -> Named | None:
    if len({named.part for named in found}) > 1:
        parts = " and ".join(dict.fromkeys(named.part for named in found))
        raise DistillKacError(f"{root}: {path} names several splits, {parts}. Rename it so that it names one")
    return found[0] if found else None


def _only_word(name: str) -> Part | None:
    """The split that a name says and nothing else: ``train``, ``val2017``."""
    words = _words(name)
    return _part_of(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    """The words of a name, in small letters: runs of letters, and each capital after a small letter begins another."""
    return [word.lower() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name) if word]


def _part_of(word: str) -> Part | None:
    return WORDS.get(word) or WORDS.get(NOUN.sub("", word))
