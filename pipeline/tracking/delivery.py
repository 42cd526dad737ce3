"""Deliver log entries to a tracking server: one thread sends this process's entries in order.

A failing server never stops the work. A file keeps a copy of all waiting entries, so a killed process loses none of
them. A process locks its file until the process ends. If entries are left in the file, they are delivered by the next
run on the same server, or by ``python -m jobs.runs sync``.
"""

import atexit
import contextlib
import errno
import fcntl
import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kac.util.errors import DistillKacError, one_line, without_keys
from kac.util.log import log
from pipeline.config import Spec
from pipeline.tracking.entries import Entry, Sender, first_batch
from pipeline.tracking.server import client_of, file_name_of, is_refusal, local_folder, tracking_uri

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""First and longest pause between two attempts, in seconds. The pause doubles with each failure."""

END_SECONDS = 10.0
"""How long a process waits at its end for a server that does not answer, in seconds."""

FILE_ATTEMPTS = 3
"""Attempts to store a file on a server that answers. After them, the file is set aside and other entries are sent."""

DELIVERED = "delivered_entries"
"""Key of the number of delivered entries in a journal's first line."""

SYNC_COMMAND = "python -m jobs.runs sync"


class Journal:
    """A file of entries that wait for one server. Its first line says how many of them are delivered.

    The line has a fixed length and is rewritten in place.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self._size, self.delivered = uri, 0, 0
        self.path: Path | None = None
        self._file: IO[bytes] | None = None

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries at the end. A full disk raises an ``OSError``."""
        if self._file is None:
            self.path = local_folder() / f"{file_name_of(self.uri)}-{time.time_ns()}-{uuid.uuid4().hex}.jsonl"
            self._file = self.path.open("x+b")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        header = b"" if self._size else self._header()
        data = header + b"".join(entry.line() for entry in entries)
        # If a full disk accepts only a part, the next attempt overwrites the part.
        if os.pwrite(self._file.fileno(), data, self._size) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(data)

    def drop(self, count: int) -> None:
        """Record that the next ``count`` entries are delivered."""
        self.delivered += count
        if self._file is not None and self._size:
            os.pwrite(self._file.fileno(), self._header(), 0)

    def clear(self) -> None:
        """Remove all entries."""
        self._size = self.delivered = 0
        if self._file is not None:
            with contextlib.suppress(OSError):  # delivering the newest entries twice is harmless
                os.ftruncate(self._file.fileno(), 0)

    def close(self) -> None:
        """Release the lock of the file, and remove the file if it has no entries."""
        if self._file is not None and self.path is not None:
            if not self._size:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file, self._size, self.delivered = None, 0, 0

    def read(self, path: Path, file: IO[bytes]) -> list[Entry]:
        """Open the locked file of an ended process. Return its entries that are not delivered."""
        self.path, self._file = path, file
        header: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            header = json.loads(file.readline())
        self.delivered = header.get(DELIVERED, 0)
        entries: list[Entry] = []
        for line in itertools.islice(file, self.delivered, None):
            with contextlib.suppress(TypeError, ValueError):  # a damaged line is skipped
                entries.append(Entry(**json.loads(line)))
        self._size = file.tell() if DELIVERED in header else 0  # a header of an older version is not rewritten
        return entries

    def _header(self) -> bytes:
        uri = json.dumps(without_keys(self.uri))
        return f'{{"{DELIVERED}": {self.delivered:12d}, "tracking_uri": {uri}}}\n'.encode()


def leftovers(uri: str) -> Iterator[tuple[Journal, list[Entry]]]:
    """Yield the files of ended processes, oldest first, with their entries. A file is locked while it is in use."""
    for path in sorted(local_folder().glob(f"{file_name_of(uri)}-*.jsonl")):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the process is still running
            if path.exists():  # otherwise, another process has delivered it meanwhile
                journal = Journal(uri)
                yield journal, journal.read(path, file)


class Delivery:
    """This process's waiting entries for one server, and the thread that sends them."""

    def __init__(self, uri: str) -> None:
        self.uri, self.sender, self.is_failing = uri, Sender(uri), False
        self._changed = threading.Condition()
        self._waiting: list[Entry] = []
        self._journal, self._stored = Journal(uri), 0  # the journal has the first ``_stored`` waiting entries
        self._failures, self._is_disk_reported = 0, False
        threading.Thread(target=self._work, daemon=True, name="tracking").start()

    def put(self, *entries: Entry) -> None:
        """Add entries without waiting for the server."""
        with self._changed:
            self._waiting.extend(entries)
            try:
                self._store()
            except OSError as error:
                if not self._is_disk_reported:
                    self.warn(f"has entries waiting that this disk cannot store ({one_line(error)})")
                self._is_disk_reported = True
            self._changed.notify_all()

    def flush(self, seconds: float, on_disk_is_enough: bool = False) -> bool:
        """Wait up to ``seconds`` for the delivery of all entries. Return whether all entries are delivered.

        With ``on_disk_is_enough``, do not wait for a failing server if all entries are in the file.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._waiting:
                left = deadline - time.monotonic()
                if left <= 0 or (on_disk_is_enough and self.is_failing and self._is_on_disk):
                    return False
                self._changed.wait(min(left, 1.0))
        return True

    def close(self) -> None:
        """Close the journal. If entries are still waiting, log the path of their file, and keep the file locked."""
        with self._changed:
            with contextlib.suppress(OSError):
                self._store()
            if not self._waiting:
                self._journal.close()
            elif self._stored:
                path = self._journal.path
                self.warn(f"has entries waiting in {path}. The next run delivers them, and so does {SYNC_COMMAND}")

    def deliver_leftovers(self) -> tuple[int, bool]:
        """Deliver the entries of ended processes; return their number, and whether other entries are still waiting."""
        delivered, is_waiting = 0, False
        for journal, entries in leftovers(self.uri):
            try:
                while entries:
                    batch = first_batch(entries)
                    self._send(batch)
                    del entries[: len(batch)]
                    journal.drop(len(batch))
                    delivered += len(batch)
                journal.clear()
                journal.close()
            except Exception:  # noqa: BLE001 - MLflow's stores raise errors of any type
                is_waiting = True
        return delivered, is_waiting

    @property
    def _is_on_disk(self) -> bool:
        return self._stored == len(self._waiting)

    def _store(self) -> None:
        """Write the waiting entries that are not yet in the journal. A full disk raises an ``OSError``."""
        if not self._is_on_disk:
            self._journal.append(self._waiting[self._stored :])
            self._stored = len(self._waiting)

    def warn(self, text: str) -> None:
        """Log a warning about the server."""
        log.warning(f"tracking: {without_keys(self.uri)} {text}")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                batch = first_batch(self._waiting)
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001 - MLflow's stores raise errors of any type
                self._failures += 1
                if not self._set_aside(batch[0], error):
                    self._pause(error)
                    continue
            with self._changed:
                was_failing, self.is_failing, self._failures = self.is_failing, False, 0
                del self._waiting[: len(batch)]
                stored, self._stored = self._stored, max(0, self._stored - len(batch))
                if not self._waiting:
                    self._journal.clear()
                    self._is_disk_reported = False
                else:
                    with contextlib.suppress(OSError):
                        self._journal.drop(stored - self._stored)
                self._changed.notify_all()
            if was_failing:
                self.warn("answers again")

    def _send(self, batch: list[Entry]) -> None:
        """Deliver a batch. If the server refuses the batch, send each entry separately and drop refused entries."""
        try:
            self.sender.send(batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(batch) == 1:
                self.warn(f"refuses {_describe(batch[0])}, which is dropped: {one_line(error)}")
                return
            for entry in batch:
                self._send([entry])

    def _set_aside(self, entry: Entry, error: Exception) -> bool:
        """If the server answers but cannot store this file, move the file to a journal that no process locks."""
        if entry.kind != "file" or self._failures < FILE_ATTEMPTS:
            return False
        aside = Journal(self.uri)
        try:
            client_of(self.uri).search_experiments(max_results=1)
            aside.append([entry])
        except Exception:  # noqa: BLE001 - MLflow's stores raise errors of any type
            return False
        finally:
            aside.close()
        self.warn(f"cannot store {_describe(entry)} ({one_line(error)}). {SYNC_COMMAND} tries again")
        return True

    def _pause(self, error: Exception) -> None:
        with self._changed:
            was_failing, self.is_failing = self.is_failing, True
            self._changed.notify_all()
        if not was_failing:
            self.warn(f"does not answer ({one_line(error)}). The work continues, and log entries are kept on this disk")
        time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 10)))


_deliveries: dict[tuple[int, str], Delivery] = {}
_lock = threading.Lock()


def delivery_to(uri: str) -> Delivery:
    """This process's ``Delivery`` for a server. A forked process gets a new ``Delivery``."""
    key = os.getpid(), uri
    with _lock:
        if key not in _deliveries:
            _deliveries[key] = Delivery(uri)
        return _deliveries[key]


@atexit.register
def finish(seconds: float = END_SECONDS) -> None:
    """When the process ends, wait for its deliveries to finish, and log which entries are still undelivered."""
    deadline = time.monotonic() + seconds
    for (pid, _), delivery in list(_deliveries.items()):
        if pid == os.getpid():
            delivery.flush(deadline - time.monotonic())
            delivery.close()


class SyncSpec(Spec):
    """Deliver log entries that ended jobs on this machine could not send to their tracking server."""

    stage = "sync"


def sync(spec: SyncSpec | None = None) -> int:
    """Deliver all log entries that are waiting on this machine, for any server. Return the number delivered.

    Raises:
        DistillKacError: some entries could not be delivered.
    """
    uri = tracking_uri(".")
    servers = (uri, *sorted(waiting_servers() - {without_keys(uri)}))
    results = {without_keys(server): delivery_to(server).deliver_leftovers() for server in servers}
    log.info(f"sync: delivered {sum([count for count, _ in results.values()]):,} entries")
    if failed := [server for server, (_, is_waiting) in results.items() if is_waiting]:
        raise DistillKacError(f"Log entries are still waiting: {', '.join(failed)} does not answer. Try again later.")
    return sum([count for count, _ in results.values()])


def waiting_servers() -> set[str]:
    """The addresses, without passwords, of all servers for which entries are waiting on this machine."""
    servers = set()
    for path in local_folder().glob("*.jsonl"):
        with contextlib.suppress(OSError, ValueError, KeyError), path.open("rb") as file:
            servers.add(str(json.loads(file.readline())["tracking_uri"]))
    return servers


def _describe(entry: Entry) -> str:
    name = entry.content.get("name") or ", ".join(map(str, entry.content))
    return f"{entry.kind} {one_line(name, most=80)} of run {entry.run_id}"
