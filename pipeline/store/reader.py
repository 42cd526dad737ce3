"""The reader of endpoint stores: column selection, sharding over ranks, seeded shuffling and resume.

The order of a rank's rows in an epoch depends only on (seed, epoch, rank, world size). Columns that fit the memory
budget are loaded once, and all their rows are shuffled together. Larger columns are streamed: a thread reads the shards
in shuffled order, one window ahead, and the reader shuffles the rows within windows that fit the budget.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from kac import noise
from kac.losses import Interval, Objective
from kac.solvers import knot_times
from kac.util.errors import ArgumentError
from pipeline.store.columns import (
    Batch,
    Columns,
    Piece,
    Selection,
    gather_intervals,
    gather_rows,
    load,
    read_columns,
)
from pipeline.store.layout import Shard, StoreError, StoreIdentity, knot_column, parse_shard_name
from pipeline.store.manifest import Manifest, list_shards, read_manifest
from pipeline.store.order import Order, check_position, rebatch, rows_of, windows
from pipeline.store.shards import column_array, identity_of_shard, map_in_threads, open_shard, read_rows

MEMORY_BYTES = 4 << 30
INTERVAL_STREAM = 4


def open_store(path: str, allow_unfinished: bool = False) -> "Store":
    """Open a store for reading.

    Args:
        allow_unfinished: also open an unfinished store, with the shards that exist so far.

    Raises:
        StoreError: the store does not exist, is unfinished or lacks a shard, or its manifest is damaged or too new.
    """
    manifest, found = read_manifest(path), list_shards(path)
    if manifest is not None:
        plan = manifest.plan()
        missing = [shard.name for shard in plan if shard.name not in found]
        if missing:
            problem = f"{path} lacks {len(missing)} of its {len(plan)} shards, such as {missing[0]}"
            raise StoreError(f"{problem}. Run the rollout again to recompute the missing shards.")
        return Store(path, manifest.identity, plan, manifest)
    if not found:
        raise StoreError(f"{path} is not an endpoint store. Create one with `python -m jobs.rollout`.")
    if not allow_unfinished:
        problem = f"{path} is unfinished: it has {len(found)} shards and no manifest"
        raise StoreError(f"{problem}. Run the rollout again to finish it.")
    identity = identity_of_shard(path, next(iter(found)))

    def shard_at(name: str) -> Shard:
        shard = parse_shard_name(name, identity.shard_size)
        assert shard is not None  # `found` contains only names of shards
        with open_shard(path, identity, shard) as file:
            return replace(shard, rows=file.metadata.num_rows)

    return Store(path, identity, map_in_threads(shard_at, found), None)


class Store:
    """An open store. Opening a finished store reads only its manifest and the names of its files."""

    def __init__(self, path: str, identity: StoreIdentity, shards: Sequence[Shard], manifest: Manifest | None) -> None:
        self.path = path
        self.identity = identity
        self.shards = tuple(shards)
        self.manifest = manifest
        self._loaded: Columns | None = None

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance scales in the store."""
        return tuple(sorted({shard.guidance for shard in self.shards}))

    def rows(self, guidance: float | Sequence[float]) -> int:
        """Return the number of rows of one or several guidance scales."""
        return rows_of(self._shards_of(guidance))

    def batches(
        self,
        batch_size: int,
        guidance: float | Sequence[float] | None = None,
        knots: Sequence[int] | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        epoch: int = 0,
        start_batch: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> Iterator[Batch]:
        """Yield each row of this rank once, in batches. The last batch may be short.

        Args:
            guidance: one or several guidance scales, whose rows are mixed. May be None if the store has only one scale.
            knots: indices of the knots to read, from 0 (noise) to ``identity.knots`` (image). None reads all knots.
                Must be None for a forward store, whose two columns are the start and the end of an interval.
            seed: shuffle seed; every epoch is shuffled differently. None reads in the order of sample ids.
            start_batch: first batch to yield when an epoch resumes. All batches equal those of an uninterrupted epoch.
            memory_bytes: columns up to this size are loaded once and kept; larger columns are streamed, in windows of
                half this size. The budget is per process: every rank and every DataLoader worker has its own budget.

        Raises:
            ArgumentError: the store does not have the guidance scale or a knot, or a number is out of range.
            StoreError: a shard is missing or damaged.
        """
        check_position("epoch", epoch)
        check_position("start_batch", start_batch)
        reading = _Reading(self, self._select(guidance, knots), Order(rank, world_size, seed), memory_bytes)
        pieces = reading.pieces(range(epoch, epoch + 1), start_batch * batch_size)
        yield from map(gather_rows, rebatch(pieces, batch_size))

    def interval_batches(
        self,
        batch_size: int,
        objective: Objective,
        guidance: float | Sequence[float] | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_batch: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> Iterator[Interval]:
        """Endlessly yield full batches of intervals for an objective. Each epoch uses each row once.

        The objective draws one interval per row, except in a forward store, where each row is an interval. Only the
        knots that the objective needs are read.

        Args:
            guidance: as for ``batches``.
            start_batch: first batch to yield when a run resumes. All batches equal those of an uninterrupted run.

        Raises:
            DistillKacError: an error of ``check_objective`` or ``batches``.
        """
        check_position("start_batch", start_batch)
        identity, knots, selection = self.identity, self.check_objective(objective), self.selection(objective, guidance)
        reading = _Reading(self, selection, Order(rank, world_size, seed), memory_bytes)
        times = knot_times(identity.knots, identity.knot_grid).float()[knots]
        epoch, skip = divmod(start_batch * batch_size, reading.rows_per_epoch())
        for n, pieces in enumerate(
            rebatch(reading.pieces(itertools.count(epoch), skip), batch_size), start=start_batch
        ):
            drawn = None
            if not identity.is_forward:
                # The draws are numbered over all ranks, so the intervals do not depend on the number of workers.
                positions = range(n * batch_size * world_size, (n + 1) * batch_size * world_size)
                uniforms = noise.uniforms(seed, INTERVAL_STREAM, positions, 2)[rank::world_size]
                drawn = objective.draw(uniforms, identity.knots)
            yield gather_intervals(pieces, times, drawn)

    def dataset(self, batch_size: int, **options: Any) -> "EndpointDataset":
        """Return a dataset for ``DataLoader(dataset, batch_size=None)``. ``options`` are arguments of ``batches``."""
        return EndpointDataset(self.batches, {"batch_size": batch_size, **options})

    def first(self, count: int, guidance: float, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read columns of a guidance scale's first ``count`` rows, in the order of sample ids: [rows, ...] each.

        Returns fewer rows if the store has fewer rows of this scale. Raises the errors of ``batches``.
        """
        return self._read(range(count), guidance, names)

    def last(self, count: int, guidance: float, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read columns of a guidance scale's last ``count`` rows, like ``first``."""
        rows = self.rows(guidance)
        return self._read(range(max(0, rows - count), rows), guidance, names)

    def without_last(self, count: int) -> "Store":
        """Return the store without each guidance scale's last ``count`` rows, which are held out.

        Raises ``StoreError`` if no rows of a guidance scale would be left.
        """
        shards: list[Shard] = []
        for w in self.guidance:
            rows = self.rows(w)
            if rows <= count:
                raise StoreError(f"{self.path} has {rows:,} rows of guidance {w:g}. Hold out fewer rows.")
            shards += [replace(shard, rows=len(own)) for shard, own in self._rows_at(range(rows - count), w)]
        return Store(self.path, self.identity, shards, self.manifest)

    def check_objective(self, objective: Objective) -> list[int]:
        """Return the indices of the knots that the objective needs. Raises ``DistillKacError`` if a knot is missing."""
        knots, stored = list(objective.knots(self.identity.knots)), self.identity.knots
        if self.identity.is_forward and "end_time" in objective.conditions:
            problem = f"{self.path} is a forward store, but an any-step student learns from trajectories"
            raise StoreError(f"{problem}. Roll out a store with `source` trajectory.")
        if self.identity.is_forward and len(knots) != stored + 1:
            problem = f"`steps` is {len(knots) - 1}, but this forward store has {stored} intervals"
            raise ArgumentError(f"{problem}. Choose {stored} steps.")
        return knots

    def check_guidance(self, guidance: float) -> None:
        """Raise ``ArgumentError`` if the guidance scale is not in the store."""
        if guidance in self.guidance:
            return
        if self.identity.labels == "null":
            problem = f"`guidance` is {guidance:g}, but the teacher of {self.path} is unconditional"
            raise ArgumentError(f"{problem} and cannot be guided. Choose 0.")
        problem = f"`guidance` {guidance:g} is not in {self.path}, which has {self._list_guidance()}"
        advice = f"Add it with `python -m jobs.rollout --store {self.path} --guidance {guidance:g} ...`."
        raise ArgumentError(f"{problem}. {advice}")

    def selection(self, objective: Objective, guidance: float | Sequence[float] | None) -> Selection:
        """Return the selection that ``interval_batches`` reads for an objective. Raises the errors of that method."""
        knots = self.check_objective(objective)
        return self._select(guidance, None if self.identity.is_forward else knots)

    def load(self, selection: Selection) -> Columns:
        """Return the selected columns. They stay in memory until other columns are loaded."""
        if self._loaded is None or self._loaded.selection != selection:
            self._loaded = None  # frees the memory first
            self._loaded = load(selection)
        return self._loaded

    def _select(self, guidance: float | Sequence[float] | None, knots: Sequence[int] | None) -> Selection:
        identity = self.identity
        if guidance is None:
            if len(self.guidance) != 1:
                raise ArgumentError(f"`guidance` is required, because {self.path} has {self._list_guidance()}.")
            guidance = self.guidance
        columns = identity.knot_columns
        if knots is not None:
            if identity.is_forward:
                raise ArgumentError("`knots` must be None for a forward store, because each row has only one interval.")
            if not knots or len(set(knots)) < len(knots) or not set(knots) <= set(range(identity.knots + 1)):
                raise ArgumentError(f"`knots` is {list(knots)}. Give distinct indices from 0 to {identity.knots}.")
            columns = [knot_column(k, identity.knots) for k in knots]
        return Selection(self.path, identity, self._shards_of(guidance), tuple(columns))

    def _shards_of(self, guidance: float | Sequence[float]) -> tuple[Shard, ...]:
        scales = guidance if isinstance(guidance, Sequence) else (guidance,)
        for w in scales:
            self.check_guidance(w)
        return tuple(shard for shard in self.shards if shard.guidance in scales)

    def _list_guidance(self) -> str:
        return f"guidance {', '.join(f'{w:g}' for w in self.guidance)}"

    def _read(self, positions: range, guidance: float, names: Sequence[str]) -> dict[str, torch.Tensor]:
        tables = [
            read_rows(self.path, self.identity, shard, names).slice(rows.start, len(rows))
            for shard, rows in self._rows_at(positions, guidance)
        ]
        table = pa.concat_tables(tables)
        return {name: torch.from_numpy(column_array(table[name]).copy()) for name in names}

    def _rows_at(self, positions: range, guidance: float) -> Iterator[tuple[Shard, range]]:
        """In the order of sample ids, yield each shard that has rows at ``positions``, and their range in it."""
        start = 0
        for shard in sorted(self._shards_of(guidance)):
            rows = range(max(positions.start - start, 0), min(positions.stop - start, shard.rows))
            if rows:
                yield shard, rows
            start += shard.rows


class EndpointDataset(torch.utils.data.IterableDataset[Batch]):
    """Batches of a store for a PyTorch ``DataLoader``. The loader's worker processes split this rank's rows.

    With ``start_batch``, a loader with the same number of workers continues where it stopped.
    """

    def __init__(self, batches: Callable[..., Iterator[Batch]], options: dict[str, Any]) -> None:
        self.batches, self.options = batches, options
        # In shared memory, because persistent workers keep their copy of the dataset.
        self._epoch: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the shuffle of the next iteration."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Batch]:
        options = {"epoch": int(self._epoch), "rank": 0, "world_size": 1, **self.options}
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            # The loader takes the workers' batches in turn, so the first worker continues with the batch at `start`.
            start, count = options.get("start_batch", 0), worker.num_workers
            part = (worker.id + start) % count
            options["start_batch"] = start // count + (part < start % count)
            options["rank"] = options["rank"] * count + part
            options["world_size"] *= count
        return self.batches(**options)


@dataclass(frozen=True)
class _Reading:
    """Reads a selection in a given order, from memory or as a stream."""

    store: Store
    selection: Selection
    order: Order
    memory_bytes: int

    @property
    def is_in_memory(self) -> bool:
        """Whether the selection fits the memory budget."""
        return self.selection.bytes <= self.memory_bytes

    def rows_per_epoch(self) -> int:
        """Return the number of rows that this rank reads per epoch."""
        # If one rank has no rows, every rank must raise an error. Otherwise, the other ranks would wait indefinitely.
        shards = self.selection.shards
        count, unit = (rows_of(shards), "rows") if self.is_in_memory else (len(shards), "shards to stream")
        if count < self.order.world_size:
            problem = f"{self.store.path} has only {count} {unit} for {self.order.world_size} workers"
            raise StoreError(f"{problem}. Use fewer workers.")
        return len(self.order.share(range(count))) if self.is_in_memory else rows_of(self.order.share(shards))

    def pieces(self, epochs: Iterable[int], skip: int) -> Iterator[Piece]:
        """Yield the rows of ``epochs`` in order, except the first ``skip`` rows."""
        if not self.is_in_memory:
            yield from self._stream(epochs, skip)
            return
        columns = self.store.load(self.selection)
        for epoch in epochs:
            rows = self.order.permutation(len(columns.label), epoch)[self.order.rank :: self.order.world_size]
            yield columns, rows[skip:]
            skip = max(0, skip - len(rows))

    def _stream(self, epochs: Iterable[int], skip: int) -> Iterator[Piece]:
        """Yield the rows window by window. A thread reads the next window while the current window is in use."""
        selection, pool = self.selection, ThreadPoolExecutor(1)
        most_rows = self.memory_bytes // 2 // selection.row_bytes
        ahead: deque[tuple[Future[Columns], int, int, int]] = deque()

        def take() -> Piece:
            reading, epoch, part, skipped = ahead.popleft()
            columns = reading.result()
            return columns, self.order.permutation(len(columns.label), epoch, part)[skipped:]

        for epoch in epochs:  # part 0 of the shuffle orders the shards
            for part, shards in enumerate(windows(selection.shards, self.order, epoch, most_rows), 1):
                if skip >= rows_of(shards):
                    skip -= rows_of(shards)
                    continue
                ahead.append((pool.submit(read_columns, selection, shards), epoch, part, skip))
                skip = 0
                if len(ahead) > 1:
                    yield take()
        while ahead:
            yield take()
