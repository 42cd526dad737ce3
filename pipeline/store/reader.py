"""The one reader of endpoint stores: projection, sharding, seeded shuffling, resume; from memory or streaming.

An epoch of one rank is a fixed order of its rows, a function of (seed, epoch, rank, world size) alone. Columns that fit
the memory budget are loaded once and shuffled as a whole. Larger ones stream: the shards, in shuffled order, are
read ahead by Ray Data tasks and shuffled within windows that fit the budget.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac import identity
from pipeline.store.layout import Shard, StoreError, StoreIdentity, knot_column
from pipeline.store.loading import GROUP_BYTES, THREADS, Columns, Part, read_group, shard_at, to_columns
from pipeline.store.manifest import Manifest, list_shards, read_manifest
from pipeline.store.shards import identity_of_shard

MEMORY_BYTES = 4 << 30
PIPELINE_SHARDS = 1000
"""Shards that one pipeline of an endless streaming reader is planned for, at least an epoch."""

SHUFFLE_STREAM, INTERVAL_STREAM = 3, 4


class Batch(NamedTuple):
    """Rows of a store."""

    sample_id: Tensor  # [batch], int64
    label: Tensor  # [batch], int64
    knots: Tensor  # [batch, len(knots), *sample], float32
    interval: Tensor | None  # [batch], int64: which interval a forward row spans


class IntervalBatch(NamedTuple):
    """One interval of the teacher's way for each row: what endpoint distillation learns from."""

    x_start: Tensor  # [batch, *sample], float32
    x_end: Tensor  # [batch, *sample]
    t_start: Tensor  # [batch]
    t_end: Tensor  # [batch]
    label: Tensor  # [batch], int64


@dataclass(frozen=True)
class View:
    """What is read of a store: a guidance scale, some knots, the share of one rank."""

    guidance: float
    columns: tuple[str, ...]
    shards: tuple[Shard, ...]
    rank: int
    world_size: int
    seed: int | None
    memory_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise StoreError(f"rank: expected 0 .. {self.world_size - 1}, found {self.rank}")


class Store:
    """An open store. Opening reads the manifest alone."""

    def __init__(self, path: str, spec: StoreIdentity, shards: Sequence[Shard], manifest: Manifest | None) -> None:
        self.path = path
        self.spec = spec
        self.shards = tuple(shards)
        self.manifest = manifest
        self._loaded: dict[View, Columns] = {}

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance scales in the store."""
        return tuple(sorted({shard.guidance for shard in self.shards}))

    def rows(self, guidance: float) -> int:
        """The number of trajectories of a guidance scale."""
        return sum(shard.rows for shard in self._shards_of(guidance))

    def batches(
        self,
        batch_size: int,
        guidance: float | None = None,
        knots: Sequence[int] | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        epoch: int = 0,
        start_batch: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> Iterator[Batch]:
        """One epoch of this rank's rows, each exactly once; the last batch may be short.

        Args:
            guidance: which scale; None if the store has only one.
            knots: indices of the knots to read, 0 (noise) .. ``spec.knots`` (image); None: all. Forward stores have
                two columns, the interval's start and end, and take None alone.
            seed: None reads in the order of sample ids; a number shuffles, differently in each epoch.
            start_batch: where to go on after a stop; the batches are those of an epoch that was not stopped.
            memory_bytes: columns up to this size are loaded once and kept; larger ones stream. Each process that reads
                has its own: every worker of a DataLoader, every rank.

        Raises:
            StoreError: an unknown guidance scale or knot, a batch size below 1, a seed, epoch or start out of range, or
                a shard that is missing or damaged.
        """
        _check_position(batch_size, start_batch, epoch, seed)
        view = self._view(guidance, self._knot_columns(knots), rank, world_size, seed, memory_bytes)
        order = self._order(view, range(epoch, epoch + 1), start_batch * batch_size)
        for pieces in _cut(order, batch_size):
            taken = [_take(columns, rows) for columns, rows in pieces]
            yield taken[0] if len(taken) == 1 else _join(taken)

    def interval_batches(
        self,
        batch_size: int,
        steps: int,
        guidance: float | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_batch: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> Iterator[IntervalBatch]:
        """Endless full batches for a student of ``steps`` macro steps: epoch after epoch, each row once in each, with
        one of its ``steps`` intervals at random. Reads only the ``steps`` + 1 knots that are needed.

        Args:
            start_batch: where to go on after a stop; the batches are those of a run that was not stopped.

        Raises:
            StoreError: ``steps`` does not divide the knots, or as ``batches``.
        """
        _check_position(batch_size, start_batch, 0, seed)
        view = self._view(guidance, self._interval_columns(steps), rank, world_size, seed, memory_bytes)
        epoch, skip = divmod(start_batch * batch_size, self._rows_of(view))
        stream = INTERVAL_STREAM + rank
        for n, pieces in enumerate(_cut(self._endless(view, epoch, skip), batch_size), start=start_batch):
            positions = range(n * batch_size, (n + 1) * batch_size)
            k = (identity.uniforms(seed, stream, positions, 1)[:, 0] * steps).long()
            yield _intervals(pieces, k, steps)

    def dataset(self, batch_size: int, **options: object) -> "EndpointDataset":
        """The store as a PyTorch dataset of batches: ``DataLoader(store.dataset(256, ...), batch_size=None)``.

        Takes the options of ``batches``.
        """
        return EndpointDataset(self, batch_size, options)

    def is_streamed(self, steps: int, guidance: float | None = None, memory_bytes: int = MEMORY_BYTES) -> bool:
        """Whether ``interval_batches`` streams: its columns do not fit the memory budget."""
        return self._bytes_of(self._view(guidance, self._interval_columns(steps), 0, 1, 0, memory_bytes)) > memory_bytes

    def check_steps(self, steps: int) -> None:
        """Refuse a number of macro steps that the stored knots do not allow."""
        knots = self.spec.knots
        if self.spec.source == "forward" and steps != knots:
            raise StoreError(f"--steps: expected {knots}, the intervals of this forward store, found {steps}")
        if steps < 1 or knots % steps:
            divisors = [m for m in range(1, knots + 1) if knots % m == 0]
            raise StoreError(f"--steps: expected a divisor of the store's {knots} knots {divisors}, found {steps}")

    def check_guidance(self, guidance: float) -> None:
        """Refuse a guidance scale that is not in the store."""
        if guidance not in self.guidance:
            raise StoreError(
                f"--guidance: expected one of the store's scales {list(self.guidance)}, found {guidance}: "
                f"add it with: python -m jobs.rollout --store {self.path} --guidance {guidance:g} ..."
            )

    def _shards_of(self, guidance: float) -> tuple[Shard, ...]:
        self.check_guidance(guidance)
        return tuple(shard for shard in self.shards if shard.guidance == guidance)

    def _knot_columns(self, knots: Sequence[int] | None) -> tuple[str, ...]:
        if knots is None:
            return tuple(self.spec.knot_columns)
        if self.spec.source == "forward":
            raise StoreError("knots: expected None for a forward store: its rows have one interval each")
        outside = [k for k in knots if not 0 <= k <= self.spec.knots]
        if outside or not knots or len(set(knots)) < len(knots):
            raise StoreError(f"knots: expected different indices 0 .. {self.spec.knots}, found {list(knots)}")
        return tuple(knot_column(k, self.spec.knots) for k in knots)

    def _interval_columns(self, steps: int) -> tuple[str, ...]:
        self.check_steps(steps)
        if self.spec.source == "forward":
            return tuple(self.spec.knot_columns)
        return self._knot_columns(range(0, self.spec.knots + 1, self.spec.knots // steps))

    def _view(
        self,
        guidance: float | None,
        columns: tuple[str, ...],
        rank: int,
        world_size: int,
        seed: int | None,
        memory_bytes: int,
    ) -> View:
        if guidance is None:
            if len(self.guidance) != 1:
                raise StoreError(f"guidance: expected one of {list(self.guidance)}, found None")
            guidance = self.guidance[0]
        shards = self._shards_of(float(guidance))
        return View(float(guidance), columns, shards, rank, world_size, seed, memory_bytes)

    def _bytes_of(self, view: View) -> int:
        row = math.prod(self.spec.sample_shape) * 4 * len(view.columns) + 24
        return row * sum(shard.rows for shard in view.shards)

    def _is_in_memory(self, view: View) -> bool:
        return self._bytes_of(view) <= view.memory_bytes

    def _rows_of(self, view: View) -> int:
        """A rank's rows of an epoch; where one rank would have none, all refuse: the others would wait for ever."""
        rows = sum(shard.rows for shard in view.shards)
        is_in_memory = self._is_in_memory(view)
        shares, what = (rows, "rows") if is_in_memory else (len(view.shards), "shards to stream")
        if shares < view.world_size:
            raise StoreError(
                f"{self.path}: expected at least {view.world_size} {what} for as many workers, found {shares}"
            )
        if is_in_memory:
            return len(range(view.rank, rows, view.world_size))
        return sum(shard.rows for shard in view.shards[view.rank :: view.world_size])

    def _order(self, view: View, epochs: range, skip: int) -> Iterator["Piece"]:
        """The rows of some epochs in their order, but for the first ``skip``."""
        if not self._is_in_memory(view):
            yield from self._stream(view, epochs, skip)
            return
        columns = self._load(view)
        for epoch in epochs:
            rows = _permutation(columns.rows, view.seed, epoch, 0)[view.rank :: view.world_size]
            yield columns, rows[skip:]
            skip = max(0, skip - len(rows))

    def _endless(self, view: View, epoch: int, skip: int) -> Iterator["Piece"]:
        """Epoch after epoch. A Ray Data pipeline takes a second to start: small stores get several epochs from one."""
        shards = len(view.shards[view.rank :: view.world_size])
        together = max(1, PIPELINE_SHARDS // max(1, shards))
        for first in itertools.count(epoch, together):
            yield from self._order(view, range(first, first + together), skip if first == epoch else 0)

    def _load(self, view: View) -> Columns:
        if view not in self._loaded:
            self._loaded = {view: self._read(view)}
        return self._loaded[view]

    def _read(self, view: View) -> Columns:
        # A few shards at a time: the tables of all of them beside the tensors would double the memory.
        groups = (view.shards[i : i + THREADS] for i in range(0, len(view.shards), THREADS))
        parts = (read_group(self.path, self.spec, group, view.columns) for group in groups)
        return to_columns(parts, sum(shard.rows for shard in view.shards), self.spec, len(view.columns))

    def _stream(self, view: View, epochs: range, skip: int) -> Iterator["Piece"]:
        row_bytes = self._bytes_of(view) // max(1, sum(shard.rows for shard in view.shards))
        windows: list[Window] = []
        for window in (window for epoch in epochs for window in _windows(view, epoch, row_bytes)):
            if not windows and skip >= window.rows:
                skip -= window.rows
            else:
                windows.append(window)
        groups = [_groups(window.shards, GROUP_BYTES // row_bytes) for window in windows]
        parts = self._read_ahead(view, list(itertools.chain.from_iterable(groups)))
        for window, own in zip(windows, groups, strict=True):
            columns = to_columns(itertools.islice(parts, len(own)), window.rows, self.spec, len(view.columns))
            yield columns, _permutation(columns.rows, view.seed, window.epoch, window.number + 1)[skip:]
            skip = 0

    def _read_ahead(self, view: View, groups: Sequence[Sequence[Shard]]) -> Iterator[Part]:
        if torch.utils.data.get_worker_info() is not None:
            # A DataLoader's worker process reads ahead by itself; a fork of its parent, it has no connection to Ray.
            return (read_group(self.path, self.spec, group, view.columns) for group in groups)
        from pipeline.store.streaming import read_ahead

        return read_ahead(self.path, self.spec, groups, view.columns, view.memory_bytes // 2)


@dataclass(frozen=True)
class Window:
    """Shards that are loaded and shuffled together."""

    epoch: int
    number: int  # within the epoch
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(shard.rows for shard in self.shards)


def _windows(view: View, epoch: int, row_bytes: int) -> list[Window]:
    """An epoch of a rank, in windows of half the memory budget: the next is read while one is used."""
    # A rank keeps its shards: were they dealt anew each epoch, its rows an epoch would change with the short last one,
    # and a resume could not tell which epoch it is in.
    own = view.shards[view.rank :: view.world_size]
    order = [own[i] for i in _permutation(len(own), view.seed, epoch, 0).tolist()]
    groups = _groups(order, view.memory_bytes // 2 // row_bytes)
    return [Window(epoch, number, tuple(group)) for number, group in enumerate(groups)]


def _groups(shards: Sequence[Shard], most_rows: int) -> list[list[Shard]]:
    """Neighbours put together up to ``most_rows`` rows, one shard at least."""
    groups: list[list[Shard]] = []
    rows = 0
    for shard in shards:
        if not groups or rows + shard.rows > most_rows:
            groups.append([])
            rows = 0
        groups[-1].append(shard)
        rows += shard.rows
    return groups


Piece = tuple[Columns, Tensor]
"""Loaded columns, and which of their rows in which order."""


class EndpointDataset(torch.utils.data.IterableDataset[Batch]):
    """A store's batches for a PyTorch ``DataLoader`` (give it ``batch_size=None``).

    The loader's worker processes share the rows of this rank between them. ``set_epoch`` changes the shuffle.
    """

    def __init__(self, store: Store, batch_size: int, options: dict[str, object]) -> None:
        self.store, self.batch_size, self.options, self.epoch = store, batch_size, dict(options), 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        options = {"epoch": self.epoch, "rank": 0, "world_size": 1, **self.options}
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            options["rank"] = int(options["rank"]) * worker.num_workers + worker.id  # type: ignore[call-overload]
            options["world_size"] = int(options["world_size"]) * worker.num_workers  # type: ignore[call-overload]
        return self.store.batches(self.batch_size, **options)  # type: ignore[arg-type]


def open_store(path: str, allow_unfinished: bool = False) -> Store:
    """Open a store for reading.

    Args:
        allow_unfinished: read the shards that are there although the rollout has not ended.

    Raises:
        StoreError: no store, an unfinished one, a newer or damaged manifest, or planned shards that are missing.
    """
    manifest = read_manifest(path)
    found = list_shards(path)
    if manifest is not None:
        plan = manifest.plan()
        missing = [shard.name for shard in plan if shard.name not in found]
        if missing:
            raise StoreError(
                f"{path}: expected {len(plan)} shards, found {len(missing)} of them missing: {missing[0]}"
                f"{' ...' if len(missing) > 1 else ''}: run the rollout again to redo them"
            )
        return Store(path, manifest.spec, plan, manifest)
    if not found:
        raise StoreError(f"{path}: expected an endpoint store, found none: make one with python -m jobs.rollout")
    if not allow_unfinished:
        raise StoreError(
            f"{path}: expected a finished store, found {len(found)} shards and no manifest: "
            "run the rollout again to finish it"
        )
    spec = identity_of_shard(path, next(iter(found)))
    return Store(path, spec, [shard_at(path, spec, name) for name in found], None)


def _permutation(count: int, seed: int | None, epoch: int, part: int) -> Tensor:
    if seed is None:
        return torch.arange(count)
    bits = np.random.Philox(key=[seed, SHUFFLE_STREAM], counter=[0, 0, epoch, part])
    return torch.from_numpy(np.random.Generator(bits).permutation(count))


def _check_position(batch_size: int, start_batch: int, epoch: int, seed: int | None) -> None:
    """Refuse a place in the order of rows that does not exist: a negative start would read other rows in silence.

    numpy passes the numbers of a key from 2^63 on through float64, where two seeds may become one.
    """
    if batch_size < 1:
        raise StoreError(f"batch_size: expected 1 or more, found {batch_size}")
    for name, value in ("start_batch", start_batch), ("epoch", epoch), ("seed", seed or 0):
        if not 0 <= value < 2**63:
            raise StoreError(f"{name}: expected 0 .. 2^63 - 1, found {value}")


def _cut(pieces: Iterator[Piece], batch_size: int) -> Iterator[list[Piece]]:
    """Regroup pieces into batches of ``batch_size`` rows; the last may be short."""
    pending: list[Piece] = []
    have = 0
    for columns, rows in pieces:
        at = 0
        while at < len(rows):
            part = rows[at : at + batch_size - have]
            at += len(part)
            pending.append((columns, part))
            have += len(part)
            if have == batch_size:
                yield pending
                pending, have = [], 0
    if pending:
        yield pending


def _take(columns: Columns, rows: Tensor) -> Batch:
    interval = None if columns.interval is None else columns.interval[rows]
    return Batch(columns.sample_id[rows], columns.label[rows], columns.knots[rows], interval)


def _join(parts: list[Batch]) -> Batch:
    ids, labels, knots, intervals = zip(*parts, strict=True)
    interval = None if intervals[0] is None else torch.cat(intervals)
    return Batch(torch.cat(ids), torch.cat(labels), torch.cat(knots), interval)


def _intervals(pieces: list[Piece], k: Tensor, steps: int) -> IntervalBatch:
    starts, ends, intervals, label = [], [], [], []
    done = 0
    for columns, rows in pieces:
        drawn = k[done : done + len(rows)]
        done += len(rows)
        column = drawn if columns.interval is None else torch.zeros_like(drawn)
        intervals.append(drawn if columns.interval is None else columns.interval[rows])
        starts.append(columns.knots[rows, column])
        ends.append(columns.knots[rows, column + 1])
        label.append(columns.label[rows])
    interval = torch.cat(intervals)
    t_start, t_end = 1 - interval.float() / steps, 1 - (interval.float() + 1) / steps
    return IntervalBatch(torch.cat(starts), torch.cat(ends), t_start, t_end, torch.cat(label))
