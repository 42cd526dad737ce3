"""Local folders and ``s3://`` prefixes behind one door, and files that are published whole or not at all.

S3 endpoint and keys come from the standard AWS_* variables (or what else botocore finds, such as a node's role): no
option holds them and nothing here prints them. ``pipeline/sweep/trials.py`` keeps them out of Ray Tune's logs.
"""

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import fsspec
from botocore.exceptions import BotoCoreError
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from kac.util.errors import DistillKacError, one_line

S3_OPTIONS: dict[str, Any] = {
    # Another process may publish at any moment: a cached listing is a wrong one.
    "use_listings_cache": False,
    # Readers here ask for exact ranges (Parquet footers and column chunks); read-ahead would fetch the other columns.
    "default_cache_type": "none",
    # 503 SlowDown, resets and time-outs are retried with back-off, and the end of it is an error. s3fs repeats what
    # botocore gave up on 5 times: 4 attempts here are up to 20, some 20 seconds.
    "config_kwargs": {
        "retries": {"mode": "standard", "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "4"))},
        "connect_timeout": 10,
        "read_timeout": 60,
    },
}

TEMPORARY_SUFFIX = ".tmp"
STALE_SECONDS = 3600.0
"""A temporary file of another host is an orphan after this long."""


class FolderError(DistillKacError, IsADirectoryError):
    """A folder where a file is expected."""


class Location(NamedTuple):
    """A filesystem and a path on it."""

    fs: AbstractFileSystem
    path: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.fs, join(self.path, name))


SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


def normal(path: str) -> str:
    """The one name of a path or URI, by which every function here and every stage knows it.

    Empty parts and ``.`` are dropped, and so is a slash at the end, on S3 as on a disk. ``file://`` is a local path,
    ``s3a://`` is ``s3://``. All other characters stand for themselves: nothing is decoded, and no pattern is expanded.

    Raises:
        DistillKacError: an empty path, ``s3://`` without a bucket, or ``..`` in a key, which S3 does not resolve.
    """
    if not path:
        raise DistillKacError("expected a path or s3:// URI, found an empty one")
    match = SCHEME.match(path)
    scheme, rest = (match[1], match[2]) if match else ("", path)
    parts = [part for part in rest.split("/") if part not in {"", "."}]
    if scheme in {"s3", "s3a"}:
        if rest.startswith("/") or not parts:
            raise DistillKacError(f"{path}: expected s3://BUCKET/PREFIX, found no bucket")
        if ".." in parts:
            raise DistillKacError(f"{path}: '..' is not resolved on S3. Write the path without it.")
        return f"s3://{'/'.join(parts)}"
    if scheme not in {"", "file", "local"}:
        return path.rstrip("/")
    if not scheme and parts and parts[0] == "~" and not rest.startswith("/"):
        return os.path.join(os.path.expanduser("~"), *parts[1:])
    return ("/" if rest.startswith("/") else "") + "/".join(parts) or "."


def is_uri(path: str) -> bool:
    """Whether a path is a URI of another place than the local disk."""
    match = SCHEME.match(path)
    return match is not None and match[1] not in {"file", "local"}


def locate(path: str) -> Location:
    """The filesystem of a path or URI, and the path there.

    Raises:
        DistillKacError: as ``normal``, or a URI scheme that is not installed.
    """
    name = normal(path)
    if name.startswith("s3://"):
        from kac.util.s3 import ExactS3

        return Location(ExactS3(**S3_OPTIONS), name.removeprefix("s3://"))
    if not is_uri(name):
        return Location(LocalFileSystem(), os.path.join(os.getcwd(), name) if name != "." else os.getcwd())
    try:
        fs = fsspec.filesystem(name.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise DistillKacError(f"{path}: expected a local path or s3:// URI, found {error}") from None
    return Location(fs, str(fs._strip_protocol(name)).rstrip("/"))


def join(path: str, name: str) -> str:
    """``name`` below a path or URI."""
    return f"{path.rstrip('/')}/{name}"


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Raise ``FolderError`` for a folder instead of a file, and ``DistillKacError`` for S3, which names no path."""
    try:
        yield
    except IsADirectoryError:
        raise FolderError(f"{path}: expected a file, found a folder. Give the file.") from None
    except (FileNotFoundError, FileExistsError, NotADirectoryError):
        raise
    except (OSError, BotoCoreError) as error:
        if not path.startswith("s3://"):
            raise
        found = one_line(error)
        raise DistillKacError(f"{path}: expected S3 to answer, found: {found}: check AWS_* and try again") from error


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    location = locate(path)
    with naming(path):
        return bool(location.fs.exists(location.path))


def kind_at(path: str) -> Literal["a file", "a folder", "nothing"]:
    """What is at a path, in the words of an error message."""
    location = locate(path)
    with naming(path):
        if location.fs.isfile(location.path):
            return "a file"
        return "a folder" if location.fs.exists(location.path) else "nothing"


def list_sizes(folder: str) -> dict[str, int]:
    """Every file below a folder by its path there, with its size in bytes, sorted; none if there is no folder.

    Raises:
        DistillKacError: a key on S3 that no path names.
    """
    location = locate(folder)
    try:
        with naming(folder):
            found = location.fs.find(location.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {name: int(found[path]["size"]) for path, name in sorted(_names_below(folder, location, found))}


def names_in(folder: str) -> list[str]:
    """What a folder holds, without what its own folders do, sorted; empty if there is none.

    Raises:
        DistillKacError: a key on S3 that no path names.
    """
    location = locate(folder)
    try:
        with naming(folder):
            found = location.fs.ls(location.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for _, name in _names_below(folder, location, found) if name)


def _names_below(folder: str, location: Location, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Paths of a filesystem with their names below a folder; the name is empty for a file in place of the folder.

    Raises:
        DistillKacError: a key on S3 that no path names: reading its name would read another key.
    """
    prefix = f"{location.path.rstrip('/')}/"
    for path in paths:
        name = path.removeprefix(prefix) if path != location.path else ""
        if name and not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise DistillKacError(
                f"{folder}: found the key {path}, which no path names, since it has an empty part, '.' or '..' between "
                "slashes. Rename or remove it."
            )
        yield path, name


class Stamp(NamedTuple):
    """A file, and what changes when its content does."""

    path: str  # below the folder that was walked; empty if that is the file itself
    size: int  # in bytes
    version: str


def walk(path: str) -> Iterator[Stamp]:
    """A file, or every file below a folder, sorted by the parts of its path; hidden ones are left out.

    A local folder without any is given as its path with a slash at the end.

    Raises:
        DistillKacError: there is nothing.
    """
    location = locate(path)
    if not isinstance(location.fs, LocalFileSystem):
        yield from _walk_remote(path, location)
    elif os.path.isdir(location.path):
        yield from _walk_local(location.path, "")
    elif os.path.exists(location.path):
        yield _local_stamp("", os.stat(location.path))
    else:
        raise DistillKacError(f"{path}: expected a file or folder, found none")


def _walk_remote(path: str, location: Location) -> Iterator[Stamp]:
    with naming(path):
        found = location.fs.find(location.path, detail=True)
    if not found:
        raise DistillKacError(f"{path}: expected a file or folder, found none")
    names = {name: below.split("/") for name, below in _names_below(path, location, found)}
    for name in sorted(names, key=lambda name: names[name]):
        if not any(part.startswith(".") for part in names[name]):
            info = found[name]
            version = info.get("ETag") or info.get("LastModified") or ""
            yield Stamp("/".join(names[name]), int(info["size"]), str(version))


def _walk_local(folder: str, below: str) -> Iterator[Stamp]:
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from _walk_local(entry.path, f"{below}{entry.name}/")
        else:
            yield _local_stamp(f"{below}{entry.name}", entry.stat())
    if not entries and below:
        yield Stamp(below, 0, "")


def _local_stamp(path: str, status: os.stat_result) -> Stamp:
    return Stamp(path, status.st_size, str(status.st_mtime_ns))


def read_bytes(path: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: there is none. FolderError: a folder on the disk.
    """
    location = locate(path)
    with naming(path):
        return location.fs.cat_file(location.path)  # type: ignore[no-any-return]


def write_bytes(path: str, data: bytes, if_absent: bool = False) -> bool:
    """Publish ``data`` under ``path``: readers see all of it or nothing. Returns whether it was written.

    Locally a temporary file is synced and renamed; on S3 it is one PUT or a completed multipart upload.

    Args:
        if_absent: leave a file that is already there as it is.
    """
    with naming(path):
        return _write(locate(path), data, if_absent)


def _write(location: Location, data: bytes, if_absent: bool) -> bool:
    if isinstance(location.fs, LocalFileSystem):
        return _write_local(location.path, data, if_absent)
    if if_absent and location.fs.exists(location.path):
        return False
    try:
        location.fs.pipe_file(location.path, data, mode="create" if if_absent else "overwrite")
    except OSError:
        # S3 servers report a lost race in different ways; and a PUT that is retried because its answer was lost finds
        # its own first copy.
        if if_absent and location.fs.exists(location.path):
            return False
        raise
    return True


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    location = locate(path)
    with naming(path), contextlib.suppress(FileNotFoundError):
        location.fs.rm_file(location.path)


def remove_tree(path: str) -> None:
    """Remove a folder and all below it, if it is there; nothing else, whatever characters its name has."""
    fs, inner = locate(path)
    with naming(path):
        if not isinstance(fs, LocalFileSystem):
            if normal(path).startswith("s3://"):
                fs.remove_tree(inner)
            else:
                for name in fs.find(inner):
                    fs.rm_file(name)
        elif os.path.isdir(inner) and not os.path.islink(inner):
            shutil.rmtree(inner)
        elif os.path.lexists(inner):
            os.unlink(inner)


def temporary_name(path: str) -> str:
    """A hidden name beside ``path`` that says which process writes it."""
    folder, name = os.path.split(path)
    writer = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    return os.path.join(folder, f".{name}.{writer}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """Whether a file's base name is one of ``temporary_name``'s."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def remove_orphans(folder: str) -> int:
    """Remove what dead writers left in a local folder; returns how many. On S3 an unfinished upload is no object."""
    location = locate(folder)
    if not isinstance(location.fs, LocalFileSystem) or not os.path.isdir(location.path):
        return 0
    orphans = [entry for entry in os.scandir(location.path) if is_temporary(entry.name) and _is_orphan(entry)]
    return sum(_remove_folder(entry.path) if entry.is_dir() else _unlink(entry.path) for entry in orphans)


def _remove_folder(path: str) -> bool:
    shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too
    return not os.path.exists(path)


def _unlink(path: str) -> bool:
    """Remove a file; whether it was there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _is_orphan(entry: "os.DirEntry[str]") -> bool:
    writer, _, pid = entry.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0].rpartition(".")
    if pid.isdigit() and writer.endswith(f".{socket.gethostname()}"):
        return not _alive(int(pid))
    try:
        return time.time() - entry.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another user's refuses the signal
    return True


def _write_local(path: str, data: bytes, if_absent: bool) -> bool:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if if_absent:
            return _link(temporary, path)
        os.replace(temporary, path)
        return True
    finally:
        _unlink(temporary)


def _link(temporary: str, path: str) -> bool:
    """Give the file its name unless another process was first."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a filesystem without hard links: the rename is atomic too, but the later writer wins
        if os.path.exists(path):
            return False
        os.replace(temporary, path)
    return True
