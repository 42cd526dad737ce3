"""Delivery: what is logged waits in a queue of this process and one thread sends it, in order.

A server that fails costs retries and never the work: from the first failure on, and when the queue is full, entries
wait in a file (``spill.py``), so that a killed process loses none of them. What is left there at the end is delivered
by the next run of any process with this server, or by ``--sync-tracking``.
"""

import atexit
import os
import threading
import time
from collections import deque
from itertools import islice

from kac.util.errors import one_line
from kac.util.log import log
from pipeline.tracking.entries import MOST, Entry, first_batch
from pipeline.tracking.sender import Sender
from pipeline.tracking.server import client_of, connect, is_refusal, without_password
from pipeline.tracking.spill import Spill, leftovers, servers_that_wait, set_aside

MOST_ENTRIES, MOST_BYTES = 10_000, 64 * 2**20
"""Of the queue in memory."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds between two attempts: at first, and after many."""

END_SECONDS = 10.0
"""How long the end of a process waits for a server that does not answer."""

FILE_ATTEMPTS = 3
"""A file that cannot be stored while the server answers is set aside after so many, or it would hold up the rest."""


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
            is_full = len(self._memory) >= MOST_ENTRIES or self._bytes + size > MOST_BYTES
            if (self._spill or is_full or self.is_failing) and self._spilled(entries):
                pass
            elif not is_full:
                self._memory.extend(entries)
                self._bytes += size
            self._changed.notify_all()

    def flush(self, seconds: float, on_disk_is_enough: bool = False) -> bool:
        """Wait until all is delivered; returns whether it is.

        Args:
            on_disk_is_enough: do not wait for a server that fails.
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
        """Put all that is not delivered into the file; returns how much that is."""
        with self._changed:
            self._to_disk()
            return len(self._spill) + len(self._memory)

    def wait_for_server(self, seconds: float) -> bool:
        """Whether the server answers, now or before ``seconds`` have passed.

        Raises:
            Exception: it answers that it will not have us.
        """
        deadline = time.monotonic() + seconds
        if self.is_failing and seconds <= 0:
            return False
        is_told = False
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
                if not is_told:
                    is_told = True
                    _say(f"{without_password(self.uri)} does not answer ({_why(error)}): trying for {seconds:.0f} s")
                time.sleep(min(1.0, left))

    def deliver_leftovers(self) -> tuple[int, int]:
        """Deliver what ended processes have left; returns how many entries are delivered, and how many still wait."""
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
                is_on_disk = not self._memory  # and stays so for this batch, whatever is put into the queue meanwhile
                waiting = self._spill.first() if is_on_disk else list(islice(self._memory, MOST["metrics"]))
            batch = first_batch(waiting)
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001
                self._fail(batch, error, is_on_disk)
            else:
                self._delivered(len(batch), is_on_disk)

    def _send(self, batch: list[Entry]) -> None:
        """Deliver a batch; of one that is refused, whatever is not."""
        try:
            self.sender.send(batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(batch) == 1:
                _say(f"refused by {without_password(self.uri)} and dropped: {_told(batch[0])}: {_why(error)}")
                return
            for entry in batch:
                self._send([entry])

    def _delivered(self, count: int, is_on_disk: bool) -> None:
        with self._changed:
            was_failing, self.is_failing, self._failures = self.is_failing, False, 0
            if is_on_disk:
                self._spill.drop(count)
            else:
                for _ in range(count):
                    self._bytes -= self._memory.popleft().size
            self._changed.notify_all()
        if was_failing:
            _say(f"{without_password(self.uri)} answers again")

    def _fail(self, batch: list[Entry], error: Exception, is_on_disk: bool) -> None:
        self._failures += 1
        if batch[0].kind == "file" and self._failures >= FILE_ATTEMPTS and self._answers():
            set_aside(self.uri, batch[0])
            _say(f"{_told(batch[0])} cannot be stored ({_why(error)}) and is set aside for --sync-tracking")
            self._delivered(1, is_on_disk)
            return
        with self._changed:
            was_failing, self.is_failing = self.is_failing, True
            self._to_disk()
            self._changed.notify_all()
        if not was_failing:
            _say(
                f"{without_password(self.uri)} does not answer ({_why(error)}): the work goes on, "
                "and what it logs waits on this disk until the server is back"
            )
        time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 10)))

    def _answers(self) -> bool:
        try:
            client_of(self.uri).search_experiments(max_results=1)
        except Exception:  # noqa: BLE001
            return False
        return True

    def _to_disk(self) -> None:
        if not self._memory:
            return
        try:
            self._spill.prepend(list(self._memory))
        except OSError as error:
            self._tell_disk(error)
            return
        self._memory.clear()
        self._bytes = 0

    def _spilled(self, entries: tuple[Entry, ...]) -> bool:
        try:
            self._spill.append(entries)
        except OSError as error:
            self._tell_disk(error)
            return False
        return True

    def _tell_disk(self, error: OSError) -> None:
        if not self._is_disk_full:
            self._is_disk_full = True
            _say(f"what waits for {without_password(self.uri)} cannot be written ({_why(error)}): some may be lost")


_deliveries: dict[tuple[int, str], Delivery] = {}
_lock = threading.Lock()


def delivery_to(uri: str) -> Delivery:
    """The queue of this process for a server; a forked process has its own."""
    key = os.getpid(), uri
    with _lock:
        if key not in _deliveries:
            _deliveries[key] = Delivery(uri)
        return _deliveries[key]


def sync(uri: str) -> tuple[int, int]:
    """Deliver what ended processes have left, for ``uri`` and all other servers; (delivered, still waiting)."""
    shown = without_password(uri)
    counts = [delivery_to(uri).deliver_leftovers()]
    counts += [delivery_to(other).deliver_leftovers() for other in sorted(servers_that_wait() - {shown})]
    delivered, waiting = (sum(each) for each in zip(*counts, strict=True))
    return delivered, waiting


@atexit.register
def finish(seconds: float = END_SECONDS) -> None:
    """The end of the process: wait for a while, and say what is left in files."""
    deadline = time.monotonic() + seconds
    mine = [delivery for (pid, _), delivery in _deliveries.items() if pid == os.getpid()]
    for delivery in mine:
        if not delivery.flush(deadline - time.monotonic()) and (count := delivery.keep()):
            _say(
                f"{count:,} entries for {without_password(delivery.uri)} wait in {delivery._spill.path}: "
                "the next run delivers them, or --sync-tracking"
            )


def _told(entry: Entry) -> str:
    names = entry.content.get("name") or ", ".join(map(str, entry.content))
    return f"{entry.kind} {one_line(names, most=80)} of run {entry.run_id}"


def _why(error: Exception) -> str:
    text = one_line(error, most=1000)
    return without_password(text if len(text) < 120 else f"{type(error).__name__}: ...{text[-100:]}")


def _say(text: str) -> None:
    log.warning(f"tracking: {text}")
