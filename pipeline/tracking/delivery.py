"""Deliver log entries to a tracking server: a queue per process and server, which one thread sends in order.

A server that fails never stops the work. From the first failure on, and whenever the queue is full, entries wait in a
file (``spill.py``), so that a killed process loses none. If entries remain in the file when the process ends, the next
run of any process with this server delivers them, and so does ``python -m jobs.runs sync``.
"""

import atexit
import os
import threading
import time
from collections import deque
from itertools import islice

from kac.util.errors import DistillKacError, one_line
from kac.util.log import log
from pipeline.config import Spec
from pipeline.tracking.entries import REQUEST_LIMITS, Entry, first_batch
from pipeline.tracking.sender import Sender
from pipeline.tracking.server import client_of, connect, is_refusal, tracking_uri, without_password
from pipeline.tracking.spill import Spill, leftovers, save_unlocked, waiting_servers

MAX_ENTRIES, MAX_BYTES = 10_000, 64 * 2**20
"""Limits of the queue in memory."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds between two attempts; the pause doubles with each failure."""

END_SECONDS = 10.0
"""How long the end of a process waits for a server that does not answer."""

FILE_ATTEMPTS = 3
"""Attempts to store a file while the server answers. Then the file is set aside, so that other entries are sent."""

SYNC_COMMAND = "python -m jobs.runs sync"


class Delivery:
    """The queue of this process for one server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.is_failing = False
        self.sender = Sender(uri)
        self._changed = threading.Condition()
        self._memory: deque[Entry] = deque()
        self._bytes = 0
        self._spill = Spill(uri)
        self._failures = 0
        self._is_disk_full = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="tracking")
        self._thread.start()

    def put(self, *entries: Entry) -> None:
        """Queue entries; never waits for the server."""
        with self._changed:
            size = sum(entry.size for entry in entries)
            is_full = len(self._memory) >= MAX_ENTRIES or self._bytes + size > MAX_BYTES
            if (self._spill or is_full or self.is_failing) and self._append_to_file(entries):
                pass
            elif not is_full:
                self._memory.extend(entries)
                self._bytes += size
            self._changed.notify_all()

    def flush(self, seconds: float, on_disk_is_enough: bool = False) -> bool:
        """Wait until all entries are delivered; returns whether they are.

        Args:
            seconds: the longest time to wait.
            on_disk_is_enough: if the server fails, stop waiting once all entries are in the file.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._memory or self._spill:
                left = deadline - time.monotonic()
                if left <= 0 or (on_disk_is_enough and self.is_failing and not self._memory):
                    return False
                self._changed.wait(min(left, 1.0))
        return True

    def keep(self) -> int:
        """Move all undelivered entries into the file; returns their number."""
        with self._changed:
            self._move_to_file()
            return len(self._spill) + len(self._memory)

    def wait_for_server(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for the server; returns whether it answers.

        Raises:
            Exception: the server answers and refuses this client.
        """
        deadline = time.monotonic() + seconds
        if self.is_failing and seconds <= 0:
            return False
        is_reported = False
        while True:
            try:
                connect(self.uri)
                return True
            except Exception as error:
                if is_refusal(error, at_start=True):
                    raise
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if not is_reported:
                    is_reported = True
                    self._warn(f"does not answer ({_format_error(error)}): trying for {seconds:.0f} s")
                time.sleep(min(1.0, left))

    def deliver_leftovers(self) -> tuple[int, int]:
        """Deliver the entries of ended processes; returns the numbers of delivered and of still waiting entries."""
        delivered, waiting = 0, 0
        for leftover in leftovers(self.uri):
            entries = leftover.entries()
            while entries:
                batch = first_batch(entries)
                try:
                    self._send(batch)
                except Exception:  # noqa: BLE001
                    break
                delivered += len(batch)
                entries = entries[len(batch) :]
            leftover.keep(entries)
            waiting += len(entries)
        return delivered, waiting

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._memory and not self._spill:
                    self._changed.wait()
                is_on_disk = not self._memory  # decided once per batch: ``put`` may fill the memory meanwhile
                waiting = self._spill.first() if is_on_disk else list(islice(self._memory, REQUEST_LIMITS["metrics"]))
            batch = first_batch(waiting)
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001
                self._handle_failure(batch, error, is_on_disk)
            else:
                self._remove_delivered(len(batch), is_on_disk)

    def _send(self, batch: list[Entry]) -> None:
        """Deliver a batch. If the server refuses it, send its entries one by one and drop the refused ones."""
        try:
            self.sender.send(batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(batch) == 1:
                self._warn(f"refuses {_describe(batch[0])}, which is dropped: {_format_error(error)}")
                return
            for entry in batch:
                self._send([entry])

    def _remove_delivered(self, count: int, is_on_disk: bool) -> None:
        with self._changed:
            was_failing, self.is_failing, self._failures = self.is_failing, False, 0
            if is_on_disk:
                self._spill.drop(count)
            else:
                for _ in range(count):
                    self._bytes -= self._memory.popleft().size
            self._changed.notify_all()
        if was_failing:
            self._warn("answers again")

    def _handle_failure(self, batch: list[Entry], error: Exception, is_on_disk: bool) -> None:
        self._failures += 1
        if batch[0].kind == "file" and self._failures >= FILE_ATTEMPTS and self._server_answers():
            save_unlocked(self.uri, batch[0])
            self._warn(
                f"cannot store {_describe(batch[0])} ({_format_error(error)}). "
                f"It waits on this disk: {SYNC_COMMAND} tries again"
            )
            self._remove_delivered(1, is_on_disk)
            return
        with self._changed:
            was_failing, self.is_failing = self.is_failing, True
            self._move_to_file()
            self._changed.notify_all()
        if not was_failing:
            self._warn(
                f"does not answer ({_format_error(error)}). The work continues; "
                "log entries wait on this disk until the server is back"
            )
        time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 10)))

    def _server_answers(self) -> bool:
        try:
            client_of(self.uri).search_experiments(max_results=1)
        except Exception:  # noqa: BLE001
            return False
        return True

    def _move_to_file(self) -> None:
        if not self._memory:
            return
        try:
            self._spill.prepend(list(self._memory))
        except OSError as error:
            self._warn_disk_full(error)
            return
        self._memory.clear()
        self._bytes = 0

    def _append_to_file(self, entries: tuple[Entry, ...]) -> bool:
        try:
            self._spill.append(entries)
        except OSError as error:
            self._warn_disk_full(error)
            return False
        return True

    def _warn_disk_full(self, error: OSError) -> None:
        if not self._is_disk_full:
            self._is_disk_full = True
            self._warn(f"has entries waiting that this disk cannot store ({_format_error(error)}): some may be lost")

    def _warn(self, text: str) -> None:
        log.warning(f"tracking: {without_password(self.uri)} {text}")


_deliveries: dict[tuple[int, str], Delivery] = {}
_lock = threading.Lock()


def delivery_to(uri: str) -> Delivery:
    """The queue of this process for a server. A forked process has its own."""
    key = os.getpid(), uri
    with _lock:
        if key not in _deliveries:
            _deliveries[key] = Delivery(uri)
        return _deliveries[key]


class SyncSpec(Spec):
    """Deliver log entries that ended jobs on this machine could not send to their tracking server."""

    stage = "sync"


def sync(spec: SyncSpec | None = None) -> int:
    """Deliver all log entries that wait on this machine, to every server; returns their number.

    Raises:
        DistillKacError: some entries could not be delivered.
    """
    uri = tracking_uri(".")
    servers = (uri, *sorted(waiting_servers() - {without_password(uri)}))
    counts = [delivery_to(server).deliver_leftovers() for server in servers]
    delivered, waiting = (sum(each) for each in zip(*counts, strict=True))
    log.info(f"sync: delivered {delivered:,} entries")
    if waiting:
        raise DistillKacError(
            f"{waiting:,} log entries still wait, because their tracking servers do not answer. Try again later."
        )
    return delivered


@atexit.register
def finish(seconds: float = END_SECONDS) -> None:
    """At the end of the process, wait for the deliveries and report the entries that remain in files."""
    deadline = time.monotonic() + seconds
    mine = [delivery for (pid, _), delivery in _deliveries.items() if pid == os.getpid()]
    for delivery in mine:
        if not delivery.flush(deadline - time.monotonic()) and (count := delivery.keep()):
            delivery._warn(
                f"has {count:,} entries waiting in {delivery._spill.path}. "
                f"The next run delivers them, and so does {SYNC_COMMAND}"
            )


def _describe(entry: Entry) -> str:
    names = entry.content.get("name") or ", ".join(map(str, entry.content))
    return f"{entry.kind} {one_line(names, most=80)} of run {entry.run_id}"


def _format_error(error: Exception) -> str:
    text = one_line(error, most=1000)
    return without_password(text if len(text) < 120 else f"{type(error).__name__}: ...{text[-100:]}")
