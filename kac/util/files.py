"""One interface to local folders and ``s3://`` prefixes, with atomic writes.

The S3 endpoint and keys come from the standard AWS_* variables, or from another source that botocore knows, such as a
node's IAM role. No option takes a key, and this module never prints keys.
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
from typing import Any, NamedTuple

import fsspec
from botocore.exceptions import BotoCoreError
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from kac.util.errors import DistillKacError, StorageError, one_line


def _attempts() -> int:
    given = os.environ.get("AWS_MAX_ATTEMPTS", "").strip()
    return max(1, int(given)) if given.isdecimal() else 4


S3_OPTIONS: dict[str, Any] = {
    # Other processes publish files at any time, so a cached listing would be out of date.
    "use_listings_cache": False,
    # Readers request exact ranges (Parquet footers and column chunks). Read-ahead would also fetch unneeded columns.
    "default_cache_type": "none",
    # botocore retries 503 SlowDown, connection resets and timeouts with backoff, then raises an error. s3fs repeats a
    # failed call up to 5 times, so botocore's 4 attempts can become 20 attempts, which take about 20 seconds.
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": _attempts()},
        "connect_timeout": 10,
        "read_timeout": 60,
    },
}

TEMPORARY_SUFFIX = ".tmp"
STALE_SECONDS = 3600.0
"""The age at which a temporary file from another host counts as an orphan."""


SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


class FolderError(DistillKacError, IsADirectoryError):
    """A path that should be a file is a folder."""


class Location(NamedTuple):
    """A filesystem and a path on it."""

    fs: AbstractFileSystem
    path: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.fs, join(self.path, name))


class Stamp(NamedTuple):
    """A file's path, size and version. If the file's content changes, its size or version changes too."""

    path: str  # relative to the path given to ``walk``; empty if that path is a file
    size: int  # in bytes
    version: str


def normal(path: str) -> str:
    """Return the normal form of a path or URI. All functions in this module and all stages use this form.

    Empty parts, ``.`` and a trailing slash are dropped, both on S3 and on a local disk. ``file://`` becomes a local
    path, and ``s3a://`` becomes ``s3://``. All other characters are literal, including ``%`` and wildcards.

    Raises:
        DistillKacError: the path is empty, is an S3 URI without a bucket, or has ``..`` in its S3 key.
    """
    if not path:
        raise DistillKacError("The path is empty. Give a path or an s3:// URI.")
    match = SCHEME.match(path)
    scheme, rest = (match[1], match[2]) if match else ("", path)
    parts = [part for part in rest.split("/") if part not in {"", "."}]
    if scheme in {"s3", "s3a"}:
        if rest.startswith("/") or not parts:
            raise DistillKacError(f"{path}: the bucket is missing. Write s3://BUCKET/PREFIX.")
        if ".." in parts:
            raise DistillKacError(f"{path}: S3 does not resolve '..'. Write the path without it.")
        return f"s3://{'/'.join(parts)}"
    if scheme not in {"", "file", "local"}:
        return path.rstrip("/")
    if not scheme and parts and parts[0] == "~" and not rest.startswith("/"):
        return os.path.join(os.path.expanduser("~"), *parts[1:])
    return ("/" if rest.startswith("/") else "") + "/".join(parts) or "."


def is_uri(path: str) -> bool:
    """Return whether a path is a URI with a scheme other than ``file`` and ``local``."""
    match = SCHEME.match(path)
    return match is not None and match[1] not in {"file", "local"}


def locate(path: str) -> Location:
    """Return a path's filesystem and its path on that filesystem. Raises ``DistillKacError`` if the path is invalid."""
    name = normal(path)
    if name.startswith("s3://"):
        from kac.util.s3 import ExactS3

        return Location(ExactS3(**S3_OPTIONS), name.removeprefix("s3://"))
    if not is_uri(name):
        return Location(LocalFileSystem(), os.path.join(os.getcwd(), name) if name != "." else os.getcwd())
    try:
        fs = fsspec.filesystem(name.partition("://")[0])
    except (ImportError, ValueError) as error:
        reason = one_line(error).rstrip(".")
        raise DistillKacError(f"{path}: {reason}. Give a local path or an s3:// URI.") from None
    return Location(fs, str(fs._strip_protocol(name)).rstrip("/"))


def join(path: str, name: str) -> str:
    """Append ``name`` to a path or URI."""
    return f"{path.rstrip('/')}/{name}"


@contextmanager
def errors_naming(path: str) -> Iterator[Location]:
    """Locate a path. Raise ``FolderError`` if it is a folder, and ``StorageError`` if a request to S3 fails."""
    try:
        yield locate(path)
    except IsADirectoryError:
        raise FolderError(f"{path} is a folder. Give a file.") from None
    except (FileNotFoundError, FileExistsError, NotADirectoryError):
        raise
    except (OSError, BotoCoreError) as error:
        if not path.startswith("s3://"):
            raise
        reason = one_line(error).rstrip(".")
        raise StorageError(f"{path}: a request to S3 failed ({reason}). Check AWS_* and try again.") from error


def exists(path: str) -> bool:
    """Return whether a file or folder exists at a path."""
    with errors_naming(path) as location:
        return bool(location.fs.exists(location.path))


def list_sizes(folder: str) -> dict[str, int]:
    """Return the sizes in bytes of all files below a folder, sorted by path. A folder that does not exist has none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), errors_naming(folder) as location:
        infos = location.fs.find(location.path, detail=True)
        return {name: int(infos[path]["size"]) for path, name in sorted(_names_below(folder, location, infos))}
    return {}


def names_in(folder: str) -> list[str]:
    """Return the sorted names of the files and folders in a folder. A folder that does not exist has none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), errors_naming(folder) as location:
        paths = location.fs.ls(location.path, detail=False)
        return sorted(name for _, name in _names_below(folder, location, paths) if name)
    return []


def _names_below(folder: str, location: Location, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each path with its name relative to ``folder``. The name is empty if ``folder`` is itself a file.

    Raises:
        DistillKacError: an S3 key is not in normal form, so ``normal`` would turn it into a different key.
    """
    prefix = f"{location.path.rstrip('/')}/"
    for path in paths:
        name = path.removeprefix(prefix) if path != location.path else ""
        if name and not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise DistillKacError(
                f"{folder}: the key {path} has an empty part, '.' or '..' between slashes, which no path can name. "
                "Rename or remove the key."
            )
        yield path, name


def walk(path: str) -> Iterator[Stamp]:
    """Yield the stamp of a file, or of all non-hidden files below a folder, sorted by the parts of their paths.

    A local subfolder that is empty or has only hidden entries is also yielded, with a slash at the end of its path.
    Raises ``DistillKacError`` if the path does not exist.
    """
    with errors_naming(path) as location:
        is_local = isinstance(location.fs, LocalFileSystem)
        infos = {} if is_local else location.fs.find(location.path, detail=True)
    if not (os.path.exists(location.path) if is_local else infos):
        raise DistillKacError(f"{path} does not exist. Give an existing file or folder.")
    if is_local and os.path.isdir(location.path):
        yield from _walk_local(location.path, "")
    elif is_local:
        yield _local_stamp("", os.stat(location.path))
    names = {key: name.split("/") for key, name in _names_below(path, location, infos)}
    for key in sorted(names, key=lambda key: names[key]):
        if not any(part.startswith(".") for part in names[key]):
            version = infos[key].get("ETag") or infos[key].get("LastModified") or ""
            yield Stamp("/".join(names[key]), int(infos[key]["size"]), str(version))


def _walk_local(folder: str, below: str) -> Iterator[Stamp]:
    with os.scandir(folder) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if os.fsencode(entry.name) != entry.name.encode(errors="replace"):
            shown = os.fsencode(entry.path).decode(errors="replace")
            raise DistillKacError(f"{shown}: this name is not UTF-8. Rename the file or folder.")
        if entry.is_dir():
            yield from _walk_local(entry.path, f"{below}{entry.name}/")
        else:
            yield _local_stamp(f"{below}{entry.name}", entry.stat())
    if not entries and below:
        yield Stamp(below, 0, "")


def _local_stamp(path: str, status: os.stat_result) -> Stamp:
    return Stamp(path, status.st_size, str(status.st_mtime_ns))


def read_bytes(path: str) -> bytes:
    """Return the content of a file. Raises ``FileNotFoundError``, or ``FolderError`` if the path is a local folder."""
    with errors_naming(path) as location:
        return location.fs.cat_file(location.path)  # type: ignore[no-any-return]


def write_bytes(path: str, data: bytes, if_absent: bool = False) -> bool:
    """Write a file atomically: readers see all of ``data`` or nothing. Returns whether the file was written.

    On a local disk, the data go to a temporary file, which is synced and renamed. On S3, one PUT or one
    multipart upload sends them. With ``if_absent``, an existing file stays unchanged.
    """
    with errors_naming(path) as location:
        if isinstance(location.fs, LocalFileSystem):
            return _write_local(location.path, data, if_absent)
        if if_absent and location.fs.exists(location.path):
            return False
        try:
            location.fs.pipe_file(location.path, data, mode="create" if if_absent else "overwrite")
        except OSError:
            # Another writer may have been first, which S3 servers report in different ways. Or the response to our
            # first PUT was lost, and the retry found the file that this PUT had written.
            if if_absent and location.fs.exists(location.path):
                return False
            raise
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
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                return False
            except OSError:  # without hard links, a rename is also atomic, but the last writer wins
                if os.path.exists(path):
                    return False
        os.replace(temporary, path)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def remove(path: str) -> None:
    """Remove a file if it exists."""
    with contextlib.suppress(FileNotFoundError), errors_naming(path) as location:
        location.fs.rm_file(location.path)


def remove_tree(path: str) -> None:
    """Remove a folder and everything in it, if the folder exists. Wildcards in the path are literal characters."""
    with errors_naming(path) as (fs, inner):
        if normal(path).startswith("s3://"):
            fs.remove_tree(inner)
        elif not isinstance(fs, LocalFileSystem):
            for name in fs.find(inner):
                fs.rm_file(name)
        elif os.path.isdir(inner) and not os.path.islink(inner):
            shutil.rmtree(inner)
        elif os.path.lexists(inner):
            os.unlink(inner)


def temporary_name(path: str) -> str:
    """Return a hidden path in the same folder as ``path``. Its name contains this process's host name and ID."""
    folder, name = os.path.split(path)
    writer = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    return os.path.join(folder, f".{name}.{writer}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """Return whether a file name has the form that ``temporary_name`` produces."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def remove_orphans(folder: str) -> int:
    """Remove dead processes' temporary files from a local folder, and return their number. Do nothing on S3."""
    location = locate(folder)
    if not isinstance(location.fs, LocalFileSystem) or not os.path.isdir(location.path):
        return 0
    removed = 0
    for entry in [entry for entry in os.scandir(location.path) if is_temporary(entry.name) and _is_orphan(entry)]:
        with contextlib.suppress(FileNotFoundError):  # another process may remove the file at the same time
            if entry.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
                removed += not os.path.exists(entry.path)
            else:
                os.unlink(entry.path)
                removed += 1
    return removed


def _is_orphan(entry: "os.DirEntry[str]") -> bool:
    writer, _, pid = entry.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0].rpartition(".")
    try:
        if not pid.isdigit() or not writer.endswith(f".{socket.gethostname()}"):
            return time.time() - entry.stat().st_mtime > STALE_SECONDS
        os.kill(int(pid), 0)
    except (FileNotFoundError, PermissionError):  # the file no longer exists, or another user owns the process
        return False
    except ProcessLookupError:
        return True
    return False
