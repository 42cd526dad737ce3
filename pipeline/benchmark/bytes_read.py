"""Bytes that training a student reads from the filesystem, compared with the size of the store."""

import tempfile
import threading
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from kac.losses import EndpointObjective
from kac.util import files
from pipeline import store
from pipeline.benchmark.measurement import Bar, Measurement
from pipeline.benchmark.setting import STUDENT_STEPS, Setting
from pipeline.store.layout import MANIFEST
from pipeline.store.manifest import list_shards

ONE_STEP_BAR = Bar("<=", 0.12)


def measure(setting: Setting) -> list[Measurement]:
    """Measure students with 1, a few and all steps. The results do not depend on the machine."""
    source = setting.store()
    fsspec.register_implementation(CountingFileSystem.protocol, CountingFileSystem, clobber=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in files.list_sizes(source.path):
            files.write_bytes(f"{folder}/store/{name}", files.read_bytes(files.join(source.path, name)))
        path = f"{CountingFileSystem.protocol}://{folder}/store"
        measurements, size = [], store_bytes(path)
        for steps in (1, STUDENT_STEPS, source.identity.knots):
            what = f"bytes read to train {steps} step{'s' if steps > 1 else ''} / bytes of the store"
            bar = ONE_STEP_BAR if steps == 1 else None
            measurements.append(Measurement(what, "bytes", (count_bytes(path, steps),), (size,), bar))
        return measurements


def store_bytes(path: str) -> int:
    """The total size of the shards and the manifest."""
    return sum(list_shards(path).values()) + len(files.read_bytes(files.join(path, MANIFEST)))


def count_bytes(path: str, steps: int) -> int:
    """Bytes read to open the store and load all rows for a student with ``steps`` steps."""
    before = CountingFileSystem.bytes_read
    next(store.open(path).interval_batches(1, EndpointObjective(steps)))
    return CountingFileSystem.bytes_read - before


class CountingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Local files under ``counted://``. Counts the bytes read, as S3 would receive them in range requests.

    The count belongs to the class, because fsspec makes one instance per thread.
    """

    protocol = "counted"
    bytes_read: ClassVar[int] = 0
    lock: ClassVar[threading.Lock] = threading.Lock()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "CountingFile":
        return CountingFile(path, mode, fs=self, **options)


class CountingFile(LocalFileOpener):  # type: ignore[misc]
    """An open file of a ``CountingFileSystem``."""

    def read(self, *size: int) -> bytes:
        """Read and count bytes from the current position."""
        data: bytes = super().read(*size)
        with CountingFileSystem.lock:
            CountingFileSystem.bytes_read += len(data)
        return data
