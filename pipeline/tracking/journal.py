"""Files of waiting log entries: one per process and server, first in, first out.

An entry is written to the file before it is sent, so that a killed process loses none. A process holds the lock of its
file until it ends. Another process that gets the lock may deliver the entries.
"""

import contextlib
import errno
import fcntl
import json
import os
import uuid
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

from pipeline.tracking.entries import REQUEST_LIMITS, Entry
from pipeline.tracking.server import file_name_of, local_folder, without_password

READ_BYTES = 2**16
"""How much is read from a file at a time; at least one line."""

HEADER_BYTES = 4096
"""Length of the first line of a file, which is rewritten in place."""

MEMORY_BYTES = 64 * 2**20
"""Limit of the entries that wait in memory while the disk refuses them."""


class Journal:
    """The file of this process for one server. It is not thread-safe.

    While the disk refuses entries, they wait in memory.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.path: Path | None = None
        self._file: IO[bytes] | None = None
        self._header = self._start = self._end = HEADER_BYTES  # ends of the header, the delivered and all entries
        self._memory: deque[bytes] = deque()  # entries after those in the file
        self._lengths: list[int] = []  # of the entries that ``first`` returned

    def __bool__(self) -> bool:
        """Whether entries wait."""
        return self._is_file_waiting or bool(self._memory)

    @property
    def is_on_disk(self) -> bool:
        """Whether no entry waits in memory."""
        return not self._memory

    def count(self) -> int:
        """The number of waiting entries."""
        starts = range(self._start, self._end, READ_BYTES)
        return len(self._memory) + sum(self._read(start, READ_BYTES).count(b"\n") for start in starts)

    def append(self, *entries: Entry) -> OSError | None:
        """Add entries at the end. Without entries, move the entries in memory to the file.

        Returns:
            The error of a disk that is full or cannot be written to. Entries then wait in memory, and the newest ones
            are lost if there are too many.
        """
        self._memory.extend(entry.line().encode() for entry in entries)
        try:
            while self._memory:
                self._write(self._memory[0])
                self._memory.popleft()
        except OSError as error:
            excess = sum(map(len, self._memory)) - MEMORY_BYTES
            while excess > 0:
                excess -= len(self._memory.pop())
            return error
        return None

    def first(self) -> list[Entry]:
        """The first entries, of which some or all can be dropped. The list is empty if all lines are damaged."""
        lines = self._first_lines() if self._is_file_waiting else islice(self._memory, REQUEST_LIMITS["metrics"])
        entries, damaged = [], 0
        self._lengths = []
        for line in lines:
            try:
                entries.append(Entry.of_line(line.decode()))
            except ValueError:
                damaged += len(line)
            else:
                self._lengths.append(damaged + len(line))
                damaged = 0
        if not entries:
            self._start += damaged
        return entries

    def drop(self, count: int) -> None:
        """Remove the first ``count`` entries, which are delivered."""
        for length in self._lengths[:count]:
            if self._is_file_waiting:
                self._start += length
            else:
                self._memory.popleft()
        if self._file is not None:
            with contextlib.suppress(OSError):  # entries that are delivered twice are stored once
                if not self._is_file_waiting:
                    os.ftruncate(self._file.fileno(), self._header)
                    self._start = self._end = self._header
                self._write_header()

    def close(self) -> None:
        """Close the file, and remove it if no entries wait in it."""
        if self._file is not None and self.path is not None:
            if not self._is_file_waiting:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    @property
    def _is_file_waiting(self) -> bool:
        return self._start < self._end

    def _first_lines(self) -> list[bytes]:
        size, waiting = READ_BYTES, self._end - self._start
        data = self._read(self._start, size)
        while b"\n" not in data and size < waiting:
            size *= 2
            data = self._read(self._start, size)
        return data[: data.rfind(b"\n") + 1 or None].splitlines(keepends=True)

    def _read(self, start: int, size: int) -> bytes:
        assert self._file is not None
        return os.pread(self._file.fileno(), min(size, self._end - start), start)

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        # A part of a line that a full disk accepted is overwritten by the next attempt.
        if os.pwrite(self._file.fileno(), line, self._end) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)

    def _open(self) -> None:
        self.path = local_folder() / f"{file_name_of(self.uri)}-{uuid.uuid4().hex}.jsonl"
        self._file = self.path.open("x+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._header = self._start = self._end = HEADER_BYTES
        self._write_header()

    def _write_header(self) -> None:
        assert self._file is not None
        header = json.dumps({"tracking_uri": without_password(self.uri), "delivered": self._start}).encode()
        if len(header) < self._header:  # files of earlier versions have no room
            os.pwrite(self._file.fileno(), header.ljust(self._header - 1) + b"\n", 0)

    @classmethod
    def _of_file(cls, uri: str, path: Path, file: IO[bytes]) -> "Journal":
        journal, header = cls(uri), file.readline()
        journal.path, journal._file, journal._header = path, file, len(header)
        try:
            journal._start = int(json.loads(header)["delivered"])
        except (KeyError, ValueError):
            journal._start = len(header)
        journal._end = os.fstat(file.fileno()).st_size
        return journal


def waiting_servers() -> set[str]:
    """The addresses, without passwords, of all servers with files of entries on this machine."""
    servers = set()
    for path in local_folder().glob("*.jsonl"):
        with contextlib.suppress(OSError, ValueError, KeyError), path.open("rb") as file:
            servers.add(str(json.loads(file.readline())["tracking_uri"]))
    return servers


def leftovers(uri: str) -> Iterator[Journal]:
    """The files that ended processes left for a server, the oldest first. Each is locked while the caller uses it."""
    for path in sorted(local_folder().glob(f"{file_name_of(uri)}-*.jsonl"), key=_age):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the process is alive
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                journal = Journal._of_file(uri, path, file)
                yield journal
                journal.close()


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
