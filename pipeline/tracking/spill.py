"""Files of waiting log entries: one per process and server, first in, first out.

A process holds the lock of its file until it ends. Another process that gets the lock may deliver the entries.
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
from pipeline.tracking.server import file_name_of, local_folder, without_password

READ_BYTES = 4 * 2**20
"""How much is read from a file at a time; at least one line."""


class Spill:
    """The file of this process for one server. It exists only while entries wait in it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.path: Path | None = None
        self._file: IO[bytes] | None = None
        self._start = 0  # position of the first waiting entry
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries at the end.

        Raises:
            OSError: the disk is full, or cannot be written to.
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
        """Add entries before the waiting ones.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        waiting = self.first(max_bytes=-1) if self._count else []
        before, path = self._file, self.path
        self._file, self.path, self._count = None, None, 0
        self.append([*entries, *waiting])
        _remove(before, path)

    def first(self, max_bytes: int = READ_BYTES) -> list[Entry]:
        """The first entries, about ``max_bytes`` of them; -1 for all entries."""
        assert self._file is not None
        self._file.seek(self._start)
        return [Entry.of_line(line.decode()) for line in self._file.readlines(max_bytes)]

    def drop(self, count: int) -> None:
        """Remove the first ``count`` entries, which are delivered."""
        assert self._file is not None
        self._file.seek(self._start)
        for _ in range(count):
            self._file.readline()
        self._start, self._count = self._file.tell(), self._count - count
        if not self._count:
            _remove(self._file, self.path)
            self._file, self.path = None, None

    def _open(self) -> None:
        self.path = local_folder() / f"{file_name_of(self.uri)}-{uuid.uuid4().hex}.jsonl"
        self._file = self.path.open("w+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(json.dumps({"tracking_uri": without_password(self.uri)}).encode() + b"\n")
        self._start = self._file.tell()


def save_unlocked(uri: str, entry: Entry) -> None:
    """Save an entry in a file that no process locks, so that ``leftovers`` finds it later."""
    spill = Spill(uri)
    spill.append([entry])
    assert spill._file is not None
    spill._file.close()


class Leftover:
    """The file of a process that has ended."""

    def __init__(self, path: Path, lines: list[bytes]) -> None:
        self.path, self.lines = path, lines

    def entries(self) -> list[Entry]:
        """The waiting entries, without a line that was cut off."""
        entries = []
        for line in self.lines[1:]:
            with contextlib.suppress(ValueError):
                entries.append(Entry.of_line(line.decode()))
        return entries

    def keep(self, entries: list[Entry]) -> None:
        """Replace the file's entries by those that still wait. Without any, remove the file."""
        if not entries:
            self.path.unlink(missing_ok=True)
            return
        fresh = self.path.with_suffix(".tmp")
        fresh.write_bytes(self.lines[0] + "".join(entry.line() for entry in entries).encode())
        fresh.replace(self.path)


def waiting_servers() -> set[str]:
    """The addresses, without passwords, of all servers with entries waiting on this machine."""
    return {uri for path in local_folder().glob("*.jsonl") if (uri := _server_of(path))}


def _server_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return str(json.loads(file.readline())["tracking_uri"])
    except (OSError, ValueError, KeyError):
        return ""


def leftovers(uri: str) -> Iterator[Leftover]:
    """The files that ended processes left for a server, the oldest first. Each is locked while the caller uses it."""
    for path in sorted(local_folder().glob(f"{file_name_of(uri)}-*.jsonl"), key=_age):
        try:
            file = path.open("rb")
        except OSError:
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its process is alive and delivers the entries itself
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
