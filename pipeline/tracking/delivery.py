"""Deliver log entries to a tracking server: a file per process and server, from which one thread sends in order.

A server that fails never stops the work: entries wait in the file (``journal.py``), so that a killed process loses
none. If entries remain in the file when the process ends, the next run of any process with this server delivers them,
and so does ``python -m jobs.runs sync``.
"""

import atexit
import os
import threading
import time

from kac.util.errors import DistillKacError, one_line
from kac.util.log import log
from pipeline.config import Spec
from pipeline.tracking.entries import Entry, first_batch
from pipeline.tracking.journal import Journal, leftovers, waiting_servers
from pipeline.tracking.sender import Sender
from pipeline.tracking.server import client_of, connect, is_refusal, tracking_uri, without_password

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds between two attempts; the pause doubles with each failure."""

END_SECONDS = 10.0
"""How long the end of a process waits for a server that does not answer."""

FILE_ATTEMPTS = 3
"""Attempts to store a file while the server answers. Then the file is set aside, so that other entries are sent."""

SYNC_COMMAND = "python -m jobs.runs sync"


class Delivery:
    """The journal of this process for one server, and the thread that sends its entries."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.is_failing = False
        self.sender = Sender(uri)
        self._changed = threading.Condition()
        self._journal = Journal(uri)
        self._failures = 0
        self._is_disk_refusing = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="tracking")
        self._thread.start()

    def put(self, *entries: Entry) -> None:
        """Add entries; never waits for the server."""
        with self._changed:
            error = self._journal.append(*entries)
            self._changed.notify_all()
        if error is not None and not self._is_disk_refusing:
            self._is_disk_refusing = True
            self._warn(f"has entries waiting that this disk cannot store ({_format_error(error)}): some may be lost")

    def flush(self, seconds: float, on_disk_is_enough: bool = False) -> bool:
        """Wait until all entries are delivered; returns whether they are.

        Args:
            seconds: the longest time to wait.
            on_disk_is_enough: if the server fails, stop waiting unless this disk refuses entries.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._journal:
                left = deadline - time.monotonic()
                if left <= 0 or (on_disk_is_enough and self.is_failing and self._journal.is_on_disk):
                    return False
                self._changed.wait(min(left, 1.0))
        return True

    def close(self) -> int:
        """Close the file if no entries wait; otherwise returns their number."""
        with self._changed:
            self._journal.append()
            count = self._journal.count()
            if not count:
                self._journal.close()
            return count

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
        for journal in leftovers(self.uri):
            try:
                while journal:
                    batch = first_batch(journal.first())
                    self._send(batch)
                    journal.drop(len(batch))
                    delivered += len(batch)
            except Exception:  # noqa: BLE001
                waiting += journal.count()
        return delivered, waiting

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._journal:
                    self._changed.wait()
                batch = first_batch(self._journal.first())
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001
                self._handle_failure(batch, error)
            else:
                self._remove_delivered(len(batch))

    def _send(self, batch: list[Entry]) -> None:
        """Deliver a batch. If the server refuses it, send its entries one by one and drop the refused ones."""
        try:
            if batch:  # empty after damaged lines
                self.sender.send(batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(batch) == 1:
                self._warn(f"refuses {_describe(batch[0])}, which is dropped: {_format_error(error)}")
                return
            for entry in batch:
                self._send([entry])

    def _remove_delivered(self, count: int) -> None:
        with self._changed:
            was_failing, self.is_failing, self._failures = self.is_failing, False, 0
            self._journal.drop(count)
            self._changed.notify_all()
        if was_failing:
            self._warn("answers again")

    def _handle_failure(self, batch: list[Entry], error: Exception) -> None:
        self._failures += 1
        is_refused = batch[0].kind == "file" and self._failures >= FILE_ATTEMPTS and self._server_answers()
        if is_refused and self._set_aside(batch[0]):
            self._warn(
                f"cannot store {_describe(batch[0])} ({_format_error(error)}). "
                f"It waits on this disk: {SYNC_COMMAND} tries again"
            )
            self._remove_delivered(1)
            return
        with self._changed:
            was_failing, self.is_failing = self.is_failing, True
            self._changed.notify_all()
        if not was_failing:
            self._warn(
                f"does not answer ({_format_error(error)}). The work continues; "
                "log entries wait on this disk until the server is back"
            )
        time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 10)))

    def _set_aside(self, entry: Entry) -> bool:
        """Move an entry to a file that no process locks, for a later delivery."""
        aside = Journal(self.uri)
        error = aside.append(entry)
        aside.close()
        return error is None

    def _server_answers(self) -> bool:
        try:
            client_of(self.uri).search_experiments(max_results=1)
        except Exception:  # noqa: BLE001
            return False
        return True

    def _warn(self, text: str) -> None:
        log.warning(f"tracking: {without_password(self.uri)} {text}")


_deliveries: dict[tuple[int, str], Delivery] = {}
_lock = threading.Lock()


def delivery_to(uri: str) -> Delivery:
    """The delivery of this process to a server. A forked process has its own."""
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
    delivered, waiting = sum([count for count, _ in counts]), sum([count for _, count in counts])
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
        delivery.flush(deadline - time.monotonic())
        if count := delivery.close():
            delivery._warn(
                f"has {count:,} entries waiting in {delivery._journal.path}. "
                f"The next run delivers them, and so does {SYNC_COMMAND}"
            )


def _describe(entry: Entry) -> str:
    names = entry.content.get("name") or ", ".join(map(str, entry.content))
    return f"{entry.kind} {one_line(names, most=80)} of run {entry.run_id}"


def _format_error(error: Exception) -> str:
    text = one_line(error, most=1000)
    return without_password(text if len(text) < 120 else f"{type(error).__name__}: ...{text[-100:]}")
