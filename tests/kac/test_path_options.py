"""Outputs do not overlap inputs, however their paths are written, and paths have the right kind."""

from pathlib import Path

import pytest
from pydantic import Field

from kac.util.errors import ArgumentError
from kac.util.options import Options
from kac.util.path_options import check_apart, check_kinds, input_path, output_path, reads


class Nested(Options):
    root: str | None = input_path(None, "a folder")


class Example(Options):
    out: str = output_path(..., "a folder")
    data: Nested = Nested()
    init: str = input_path("teacher", "a keyword or a folder", pattern="(?!teacher$).+")
    several: tuple[str, ...] = input_path((), "folders")
    features: tuple[str, ...] = Field((), description="names and files", json_schema_extra=reads("file", r".+\.pt"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a link to its folder ``data/real``."""
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data/real")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "read", "relation"),
    [
        ("data", "data", "is the same path as"),
        ("data/", "./data", "is the same path as"),
        ("data//real", "data/real/", "is the same path as"),
        ("HERE/data", "data", "is the same path as"),
        ("file://HERE/data", "data", "is the same path as"),
        ("data/real/../real", "data/real", "is the same path as"),
        ("link", "data/real", "is the same path as"),
        ("link/new/run", "data/real", "is inside"),
        ("data/real/run", "link", "is inside"),
        ("link/../run", "data", "is inside"),  # the link points into data
        ("data/run", "data", "is inside"),
        ("data", "data/real/file.parquet", "contains"),
        (".", "link", "contains"),
        ("/", "data", "contains"),
        ("..", "data", "contains"),
        ("s3://b/run", "s3://b/run", "is the same path as"),
        ("s3a://b/run/", "s3://b//run", "is the same path as"),
        ("s3://b/run/a", "s3://b/run", "is inside"),
        ("s3://b", "s3://b/run", "contains"),
    ],
)
def test_an_output_that_overlaps_an_input_is_refused(out: str, read: str, relation: str, here: Path):
    out = out.replace("HERE", str(here))
    with pytest.raises(ArgumentError, match=rf"^`out` .* {relation} `data\.root` "):
        check_apart(Example(out=out, data={"root": read}))


@pytest.mark.parametrize(
    ("out", "read"),
    [
        ("run", "data"),
        ("database", "data"),
        ("data/other", "data/real"),
        ("link/../other", "data/real"),
        ("run", "../data"),
        ("s3://b/run", "s3://b/ru"),
        ("s3://b/ru", "s3://b/run"),
        ("s3://b/run", "s3://c/run"),
        ("s3://b/run[1]", "s3://b/run1"),
        ("s3://b/a%2Fb", "s3://b/a"),
        ("b/run", "s3://b/run"),
    ],
)
def test_neighbours_do_not_overlap(out: str, read: str, here: Path):
    check_apart(Example(out=out, data={"root": read}))


def test_all_inputs_are_checked(here: Path):
    for values in ({"init": "out"}, {"several": ("a", "out/b")}, {"features": ("pixels", "out/net.pt")}):
        (option,) = values
        with pytest.raises(ArgumentError, match=rf"^`out` out .* `{option}` "):
            check_apart(Example(out="out", **values))
    with pytest.raises(ArgumentError, match=r"^`out` out .* the teacher's data out/data"):
        check_apart(Example(out="out"), {"the teacher's data": "out/data", "none": None})


def test_keywords_are_not_paths(here: Path):
    check_apart(Example(out="teacher"))
    check_apart(Example(out="pixels", features=("pixels",)))


def test_the_error_about_an_invalid_path_names_its_option():
    with pytest.raises(ArgumentError, match=r"^`data\.root` .*s3://"):
        check_apart(Example(out="out", data={"root": "s3://"}))


class Kinds(Options):
    folder: str = input_path("new", "a folder")
    file: str = output_path("new", "a file", kind="file")
    either: str = input_path("new", "a file or folder", kind="any")


@pytest.mark.parametrize("path", ["here", "file://HERE/here", "new", "new/below", "s3://bucket/file", "here/new"])
def test_paths_of_the_right_kind_are_accepted(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    path = path.replace("HERE", str(tmp_path))
    check_kinds(Kinds(folder=path, either=path, file="file"))
    check_kinds(Kinds(either="file"))


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("folder", "a", "a is a file"),
        ("folder", "link", "link is a file"),
        ("folder", "a/b", r"a/b is below \S*/a, which is a file"),
        ("folder", "a/b/c", r"a/b/c is below \S*/a, which is a file"),
        ("file", "here", "here is a folder"),
        ("file", "here/", "here/ is a folder"),
        ("file", "a/b", r"a/b is below \S*/a, which is a file"),
        ("either", "a/b", r"a/b is below \S*/a, which is a file"),
    ],
)
def test_a_path_of_the_wrong_kind_is_refused(
    option: str, path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ArgumentError, match=rf"^`{option}` {message}"):
        check_kinds(Kinds(**{option: path}))
