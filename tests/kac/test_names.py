"""All functions agree on which file a path names, on a disk and on S3, whatever characters the path contains."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from kac.util import files, probes, s3
from kac.util.errors import DistillKacError
from tests.pipeline.s3_server import SERVER, Fault, FaultyS3, environment

# Set during collection, before any test starts Ray, because the workers inherit this environment.
os.environ.update(environment())

BUCKET = "names"

NAMES = [
    "run[1]",
    "run[!1]",
    "run?",
    "run*",
    "**",
    "run{1,2}",
    "run#1",
    "run%",
    "run%201",
    "run 1",
    " run",
    "run ",
    "run+1",
    "run&a=1",
    "run;1",
    "run?versionId=1",
    "s3:run",
    "file:run",
    "a::b",
    "~",
    "~run",
    "..run",
    "...",
    "run\\1",
    "run'1'",
    'run"1"',
    "<run>",
    "läuft",
    "la\u0308uft",
    "走る",
    "run\U0001f680",
    "k" * 200,
]

NEIGHBOURS = ["run1", "run2", "runX", "run", "run 1", "x", "ab", "run[1]2", "läuft2"]
"""Names that would be reached if a name in ``NAMES`` were used as a pattern, decoded or cut."""


@pytest.fixture(scope="module")
def server(s3_server: FaultyS3) -> FaultyS3:
    s3_server.client().create_bucket(Bucket=BUCKET)
    return s3_server


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: FaultyS3) -> str:
    """An empty folder on the disk or an empty prefix on S3."""
    return str(tmp_path) if request.param == "disk" else f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def prefix(server: FaultyS3, tmp_path: Path) -> str:
    """An empty prefix on S3."""
    return tmp_path.name


def put(key: str, data: bytes = b"") -> None:
    """Write an object without using the tested code."""
    SERVER.client().put_object(Bucket=BUCKET, Key=key, Body=data)


def keys(prefix: str) -> list[str]:
    """Return the keys of all objects below a prefix, without using the tested code."""
    found = SERVER.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")
    return [entry["Key"] for entry in found.get("Contents", [])]


def raw_names(place: str) -> list[str]:
    """Return the files below a folder or prefix, without using the tested code."""
    if place.startswith("s3://"):
        key = place.removeprefix(f"s3://{BUCKET}/")
        return sorted(name.removeprefix(f"{key}/") for name in keys(key))
    return sorted(str(path.relative_to(place)) for path in Path(place).rglob("*") if path.is_file())


@pytest.mark.parametrize("name", NAMES)
def test_every_function_finds_a_written_file_and_leaves_its_neighbours_unchanged(place: str, name: str) -> None:
    neighbours = [neighbour for neighbour in NEIGHBOURS if neighbour != name]
    others = {files.join(place, f"{neighbour}/training/state"): neighbour.encode() for neighbour in neighbours}
    for path, data in others.items():
        files.write_bytes(path, data)
    folder = files.join(place, name)
    state, deep = (files.join(folder, below) for below in ("training/state", f"training/{name}/deep"))
    before = raw_names(place)

    assert not files.exists(folder)
    assert files.write_bytes(state, b"1")
    assert files.write_bytes(deep, b"22", if_absent=True)
    assert not files.write_bytes(deep, b"333", if_absent=True)
    assert sorted({*raw_names(place)} - {*before}) == sorted([f"{name}/training/state", f"{name}/training/{name}/deep"])

    assert files.exists(folder) and files.exists(state) and files.exists(deep)
    assert files.list_sizes(folder) == {"training/state": 1, f"training/{name}/deep": 2}
    assert files.names_in(folder) == ["training"]
    assert files.names_in(files.join(folder, "training")) == sorted([name, "state"])
    assert name in files.names_in(place)
    shown = [] if name.startswith(".") else [f"training/{name}/deep"]
    assert {stamp.path: stamp.size for stamp in files.walk(folder)} == {"training/state": 1, **dict.fromkeys(shown, 2)}
    assert [stamp.path for stamp in files.walk(deep)] == [""]
    assert (files.read_bytes(state), files.read_bytes(deep)) == (b"1", b"22")

    probes.check_answers(folder)
    probes.check_writable(folder)
    files.remove_orphans(folder)
    assert files.list_sizes(folder) == {"training/state": 1, f"training/{name}/deep": 2}
    files.remove(state)
    assert files.list_sizes(folder) == {f"training/{name}/deep": 2}
    files.write_bytes(state, b"1")
    files.remove_tree(files.join(folder, "training"))
    assert files.list_sizes(folder) == {}
    assert raw_names(place) == before
    assert {path: files.read_bytes(path) for path in others} == others


@pytest.mark.parametrize("name", NAMES)
def test_ray_train_and_pyarrow_see_the_same_names(place: str, name: str, tmp_path: Path) -> None:
    """Ray Train writes and removes checkpoints through pyarrow's view of the filesystem."""
    neighbours = {f"{neighbour}/checkpoint/x" for neighbour in NEIGHBOURS if neighbour != name}
    for other in neighbours:
        files.write_bytes(files.join(place, other), b"")
    location = files.locate(place) / name
    fs = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(location.fs))
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "state.pt").write_bytes(b"123")
    fs.create_dir(f"{location.path}/checkpoint")
    pyarrow.fs.copy_files(str(tmp_path / ".local"), f"{location.path}/checkpoint", destination_filesystem=fs)
    (tmp_path / ".local" / "state.pt").unlink()
    assert {*raw_names(place)} - neighbours == {f"{name}/checkpoint/state.pt"}
    assert files.list_sizes(files.join(place, name)) == {"checkpoint/state.pt": 3}
    below = fs.get_file_info(pyarrow.fs.FileSelector(location.path, recursive=True))
    assert {info.path for info in below if info.is_file} == {f"{location.path}/checkpoint/state.pt"}
    with fs.open_input_file(f"{location.path}/checkpoint/state.pt") as file:
        assert file.read() == b"123"
    fs.delete_dir(f"{location.path}/checkpoint")
    assert {*raw_names(place)} == neighbours


SPELLINGS = ["{place}//teacher", "{place}///teacher", "{place}/./teacher", "{place}/teacher/", "{place}/teacher//"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_empty_parts_and_slashes_at_the_end_do_not_change_a_path(place: str, spelling: str) -> None:
    """For example, ``$OUT/teacher`` after ``OUT=s3://bucket/``."""
    plain, variant = f"{place}/teacher", spelling.format(place=place)
    files.write_bytes(files.join(variant, "training//state"), b"1")
    assert raw_names(place) == ["teacher/training/state"]
    for path in (plain, variant):
        assert files.normal(path) == plain
        assert files.exists(path)
        assert files.list_sizes(path) == {"training/state": 1}
        assert files.names_in(path) == ["training"]
        assert [stamp.path for stamp in files.walk(path)] == ["training/state"]
        assert files.read_bytes(files.join(path, "training/state")) == b"1"
        assert not files.write_bytes(files.join(path, "training/state"), b"2", if_absent=True)
        probes.check_writable(path)
    files.remove_tree(files.join(variant, "/training/"))
    assert raw_names(place) == []


def test_uris_of_local_files_are_local_paths(tmp_path: Path) -> None:
    for scheme in ("file", "local"):
        files.write_bytes(f"{scheme}://{tmp_path}/100%25 [1]/x", scheme.encode())
        assert raw_names(str(tmp_path)) == ["100%25 [1]/x"]
        assert files.list_sizes(f"{scheme}://{tmp_path}/") == {"100%25 [1]/x": len(scheme)}
        assert files.read_bytes(f"{tmp_path}/100%25 [1]/x") == scheme.encode()
        assert files.normal(f"{scheme}://{tmp_path}//x/") == f"{tmp_path}/x"
        files.remove_tree(f"{scheme}://{tmp_path}/100%25 [1]")


def test_s3a_is_s3(prefix: str) -> None:
    files.write_bytes(f"s3a://{BUCKET}/{prefix}/run[1]/x", b"")
    files.write_bytes(f"s3a://{BUCKET}/{prefix}/run1/x", b"")
    files.remove_tree(f"s3a://{BUCKET}/{prefix}/run[1]")
    assert keys(prefix) == [f"{prefix}/run1/x"]
    assert files.normal(f"s3a://{BUCKET}//x/") == f"s3://{BUCKET}/x"


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.normal("~/runs") == files.locate("~/runs").path == str(tmp_path / "runs")
    assert files.locate("runs/~/x").path == str(Path.cwd() / "runs/~/x")


CALLS: dict[str, Callable[[str], Any]] = {
    "normal": files.normal,
    "locate": files.locate,
    "exists": files.exists,
    "list_sizes": files.list_sizes,
    "names_in": files.names_in,
    "walk": lambda path: list(files.walk(path)),
    "read_bytes": files.read_bytes,
    "write_bytes": lambda path: files.write_bytes(path, b""),
    "write_bytes if_absent": lambda path: files.write_bytes(path, b"", if_absent=True),
    "remove": files.remove,
    "remove_tree": files.remove_tree,
    "remove_orphans": files.remove_orphans,
    "check_writable": probes.check_writable,
}


@pytest.mark.parametrize(
    "path", ["", "s3://", "s3:///key", "s3:////", "s3://names/a/../b", "s3://names/..", "s3://../b"]
)
@pytest.mark.parametrize("call", CALLS)
def test_every_function_refuses_an_invalid_path(call: str, path: str, server: FaultyS3) -> None:
    with pytest.raises(DistillKacError) as error:
        CALLS[call](path)
    assert str(error.value).startswith(f"{path}: ") if path else "empty" in str(error.value)


def test_the_disk_resolves_two_dots(tmp_path: Path) -> None:
    """After a symbolic link, ``..`` is the parent of the link's target."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    path = f"{tmp_path}/link/../file"
    files.write_bytes(path, b"1")
    assert (tmp_path / "elsewhere" / "file").read_bytes() == files.read_bytes(path) == b"1"
    assert files.list_sizes(f"{tmp_path}/link/..") == {"file": 1}


def test_keys_that_consoles_create_for_folders_are_not_files(prefix: str) -> None:
    folder = f"s3://{BUCKET}/{prefix}/data"
    for marker in ("", "data/", "data/train/", "data/train/cats/", "empty/"):
        put(f"{prefix}/{marker}")
    put(f"{prefix}/data/train/cats/1.png", b"1")
    put(f"{prefix}/data/zero.png")
    assert files.list_sizes(folder) == {"train/cats/1.png": 1, "zero.png": 0}
    assert files.names_in(folder) == ["train", "zero.png"]
    assert files.names_in(f"s3://{BUCKET}/{prefix}") == ["data", "empty"]
    assert [stamp.path for stamp in files.walk(folder)] == ["train/cats/1.png", "zero.png"]
    assert files.list_sizes(f"s3://{BUCKET}/{prefix}/empty") == {}
    assert files.names_in(f"s3://{BUCKET}/{prefix}/empty") == []
    assert files.exists(f"s3://{BUCKET}/{prefix}/empty")
    with pytest.raises(DistillKacError, match=f"{prefix}/empty "):
        list(files.walk(f"s3://{BUCKET}/{prefix}/empty"))
    fs, inner = files.locate(folder)
    assert fs.find(inner) == [f"{inner}/train/cats/1.png", f"{inner}/zero.png"]
    files.remove_tree(folder)
    assert keys(prefix) == [f"{prefix}/", f"{prefix}/empty/"]


@pytest.mark.parametrize("key", ["data//x.png", "data/./x.png", "data/../x.png", "data/a//b/x.png", "data/x/"])
@pytest.mark.parametrize("call", [files.list_sizes, lambda path: list(files.walk(path))])
def test_keys_that_are_not_normal_paths_are_refused(prefix: str, key: str, call: Callable[[str], Any]) -> None:
    put(f"{prefix}/data/a.png", b"1")
    put(f"{prefix}/{key}", b"1")
    with pytest.raises(DistillKacError, match=f"{prefix}/data: .*{prefix}/{key}"):
        call(f"s3://{BUCKET}/{prefix}/data")
    files.remove_tree(f"s3://{BUCKET}/{prefix}/data")
    assert keys(prefix) == []


def test_a_tree_is_removed_in_several_requests(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "KEYS_PER_REQUEST", 3)
    for number in range(8):
        put(f"{prefix}/tree/{number}")
    put(f"{prefix}/tree-2")
    files.remove_tree(f"s3://{BUCKET}/{prefix}/tree")
    assert keys(prefix) == [f"{prefix}/tree-2"]


def test_a_tree_that_s3_does_not_remove_is_an_error(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 responds with status 200 and lists the keys that it did not remove."""
    path = f"s3://{BUCKET}/{prefix}/tree"
    put(f"{prefix}/tree/x")
    with SERVER.failing(Fault("deny", ("POST",))), pytest.raises(DistillKacError, match=path):
        files.remove_tree(path)
    fs = files.locate(path).fs
    real = fs.call_s3

    def kept(call: str, **request: Any) -> Any:
        refusal = {"Errors": [{"Key": f"{prefix}/tree/x", "Message": "Access Denied"}]}
        return refusal if call == "delete_objects" else real(call, **request)

    monkeypatch.setattr(fs, "call_s3", kept)
    with pytest.raises(DistillKacError, match=f"{path}: .*tree/x.*Access Denied"):
        files.remove_tree(path)


def test_a_folder_is_not_read_or_written_as_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    for call in (files.read_bytes, lambda path: files.write_bytes(path, b"1")):
        with pytest.raises(files.FolderError) as error:
            call(str(folder))
        assert str(error.value).startswith(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["run[1]"]
