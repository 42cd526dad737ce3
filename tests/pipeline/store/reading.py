"""Helpers for the tests of stores."""

import runpy
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from kac.losses import Interval
from pipeline import store as endpoint_store
from pipeline.store.columns import Batch
from pipeline.store.shards import adopt, column_array

ROWS, KNOTS, SCALES = 300, 4, (0.0, 1.5)
STREAM = {"memory_bytes": 1}
"""Streaming with a memory budget below one shard: every shard is its own window."""

WINDOWS = {"memory_bytes": 2 * 65 * (2 * 4 * (KNOTS + 1) + 24)}
"""Streaming with a memory budget whose half holds two shards with all knots, or more shards with fewer knots."""

Modes = pytest.mark.parametrize("mode", [{}, STREAM, WINDOWS], ids=["memory", "stream", "stream-windows"])


def ids(batches: Iterable[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.sample_id]


def same(one: Batch | Interval, other: Batch | Interval) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def read_all(path: Path, guidance: float) -> dict[str, np.ndarray]:
    """Read all rows of a guidance scale from the files, without the reader."""
    store = endpoint_store.open(str(path))
    tables = [adopt(str(path), shard, store.identity)[1] for shard in store.shards if shard.guidance == guidance]
    return {name: np.concatenate([column_array(table[name]) for table in tables]) for name in tables[0].column_names}


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `python -m jobs.store` in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["store", *arguments])
    try:
        runpy.run_module("jobs.store", run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


class CountingFile:
    """A file that counts the bytes read from it."""

    def __init__(self, file, counts: Counter[str], name: str) -> None:
        self.file, self.counts, self.name = file, counts, name

    def read(self, *arguments):
        data = self.file.read(*arguments)
        self.counts[self.name] += len(data)
        return data

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


class CountingFileSystem:
    def __init__(self, fs, counts: Counter[str]) -> None:
        self.fs, self.counts = fs, counts

    def open(self, path: str, mode: str = "rb"):
        return CountingFile(self.fs.open(path, mode), self.counts, path)

    def cat_file(self, path: str) -> bytes:
        data = self.fs.cat_file(path)
        self.counts[path] += len(data)
        return data

    def __getattr__(self, name: str):
        return getattr(self.fs, name)
