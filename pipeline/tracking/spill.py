"""Files of entries that wait: one a process and server, first in, first out.

A process holds the lock of its file as long as it lives, so that whoever gets the lock may deliver what is in it.
"""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pipeline.tracking.entries import Entry
from pipeline.tracking.server import local_folder, name_of, without_password

READ_BYTES = 4 * 2**20
"""Read back at a time, and at least one line."""


class Spill:
    """The file of this process for one server; there is none while nothing waits in it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.path: Path | None = None
        self._file: IO[bytes] | None = None
        self._start = 0  # where the first entry that waits begins
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, entries: Iterable[Entry]) -> None:
        """Put entries at the end.

        Raises:
            OSError: the disk does not take them.
        """
        if self._file is None:
            self._open()
        assert self._file is not None
        lines = [entry.line().encode() for entry in entries]
        self._file.seek(0, os.SEEK_END)
        self._file.write(b"".join(lines))
        self._file.flush()
        self._count += len(lines)

    def prepend(self, entries: list[Entry]) -> None:
        """Put entries before those that wait.

        Raises:
            OSError: the disk does not take them.
        """
        waiting = self.first(most_bytes=-1) if self._count else []
        before, path = self._file, self.path
        self._file, self.path, self._count = None, None, 0
        self.append([*entries, *waiting])
        _remove(before, path)

    def first(self, most_bytes: int = READ_BYTES) -> list[Entry]:
        """The entries at the beginning; all of them for ``most_bytes`` of -1."""
        assert self._file is not None
        self._file.seek(self._start)
        return [Entry.of_line(line.decode()) for line in self._file.readlines(most_bytes)]

    def drop(self, count: int) -> None:
        """The first entries are delivered."""
        assert self._file is not None
        self._file.seek(self._start)
        for _ in range(count):
            self._file.readline()
        self._start, self._count = self._file.tell(), self._count - count
        if not self._count:
            _remove(self._file, self.path)
            self._file, self.path = None, None

    def _open(self) -> None:
        self.path = local_folder() / f"{name_of(self.uri)}-{uuid.uuid4().hex}.jsonl"
        self._file = self.path.open("w+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(json.dumps({"tracking_uri": without_password(self.uri)}).encode() + b"\n")
        self._start = self._file.tell()


def set_aside(uri: str, entry: Entry) -> None:
    """Keep one entry in a file that nobody holds, for a later ``leftovers``."""
    spill = Spill(uri)
    spill.append([entry])
    assert spill._file is not None
    spill._file.close()


class Leftover:
    """A file of a process that has ended."""

    def __init__(self, path: Path, lines: list[bytes]) -> None:
        self.path, self.lines = path, lines

    def entries(self) -> list[Entry]:
        """What waits in it, but for a line that was cut off."""
        found = []
        for line in self.lines[1:]:
            with contextlib.suppress(ValueError):
                found.append(Entry.of_line(line.decode()))
        return found

    def keep(self, entries: list[Entry]) -> None:
        """These still wait; none: the file is removed."""
        if not entries:
            self.path.unlink(missing_ok=True)
            return
        fresh = self.path.with_suffix(".tmp")
        fresh.write_bytes(self.lines[0] + "".join(entry.line() for entry in entries).encode())
        fresh.replace(self.path)


def servers_that_wait() -> set[str]:
    """The addresses (without passwords) of all servers for which there are files."""
    return {uri for path in local_folder().glob("*.jsonl") if (uri := _server_of(path))}


def _server_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return str(json.loads(file.readline())["tracking_uri"])
    except (OSError, ValueError, KeyError):
        return ""


def leftovers(uri: str) -> Iterator[Leftover]:
    """What ended processes have left for a server, the oldest first, each held while it is worked on."""
    for path in sorted(local_folder().glob(f"{name_of(uri)}-*.jsonl"), key=_age):
        try:
            file = path.open("rb")
        except OSError:
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its process is alive and delivers it itself
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino and (lines := file.readlines()):
                yield Leftover(path, lines)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(file: IO[bytes] | None, path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)
    if file is not None:
        file.close()
