"""The one reader of endpoint stores: projection, sharding, seeded shuffling, resume; from memory or streaming.

An epoch of one rank is a fixed order of its rows, a function of (seed, epoch, rank, world size) alone. Columns that fit
the memory budget are loaded once and shuffled as a whole. Larger ones stream: the shards, in shuffled order, are
read ahead by Ray Data tasks and shuffled within windows that fit the budget.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kac import noise
from kac.losses import Interval, Objective
from kac.solvers import knot_times
from pipeline.store import sharing
from pipeline.store.batches import Batch, Piece, drawn_intervals, own_intervals, whole_rows
from pipeline.store.columns import Columns, Selection, columns_of_knots, read_rows, shard_at, to_columns
from pipeline.store.layout import Shard, StoreError, StoreIdentity
from pipeline.store.manifest import Manifest, list_shards, read_manifest
from pipeline.store.order import Order, check_position, cut, grouped, rows_of, windows
from pipeline.store.prefetch import GROUP_BYTES, read_ahead
from pipeline.store.shards import column_array, identity_of_shard
from pipeline.store.threads import in_threads

MEMORY_BYTES = 4 << 30
PIPELINE_SHARDS = 1000
"""How many shards one Ray Data pipeline of an endless streaming reader covers; one epoch at least."""

INTERVAL_STREAM = 4


def open_store(path: str, allow_unfinished: bool = False) -> "Store":
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
        return Store(path, manifest.identity, plan, manifest)
    if not found:
        raise StoreError(f"{path}: expected an endpoint store, found none: make one with python -m jobs.rollout")
    if not allow_unfinished:
        raise StoreError(
            f"{path}: expected a finished store, found {len(found)} shards and no manifest: "
            "run the rollout again to finish it"
        )
    identity = identity_of_shard(path, next(iter(found)))
    return Store(path, identity, in_threads(lambda name: shard_at(path, identity, name), found), None)


class Store:
    """An open store. Opening reads the manifest alone."""

    def __init__(self, path: str, identity: StoreIdentity, shards: Sequence[Shard], manifest: Manifest | None) -> None:
        self.path = path
        self.identity = identity
        self.shards = tuple(shards)
        self.manifest = manifest
        self._loaded: dict[Selection, Columns] = {}

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance scales in the store."""
        return tuple(sorted({shard.guidance for shard in self.shards}))

    def rows(self, guidance: float | Sequence[float]) -> int:
        """The number of trajectories of a guidance scale, or of several."""
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
        """One epoch of this rank's rows, each exactly once; the last batch may be short.

        Args:
            guidance: which scale, or which, their rows mixed; None if the store has only one.
            knots: indices of the knots to read, 0 (noise) .. ``identity.knots`` (image); None: all. Forward stores have
                two columns, the interval's start and end, and take None alone.
            seed: None reads in the order of sample ids; a number shuffles, differently in each epoch.
            start_batch: where to go on after a stop; the batches are those of an epoch that was not stopped.
            memory_bytes: columns up to this size are loaded once and kept; larger ones stream. Each process that reads
                has its own: every worker of a DataLoader, every rank.

        Raises:
            StoreError: an unknown guidance scale or knot, a batch size below 1, a seed, epoch or start out of range, or
                a shard that is missing or damaged.
        """
        check_position("epoch", epoch)
        check_position("start_batch", start_batch)
        selection = self._select(guidance, columns_of_knots(self.identity, knots))
        reading = _Reading(self, selection, Order(rank, world_size, seed), memory_bytes)
        pieces = reading.pieces(range(epoch, epoch + 1), start_batch * batch_size)
        yield from map(whole_rows, cut(pieces, batch_size))

    def first(self, count: int, guidance: float, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Any columns of the first ``count`` rows (or of all) of a guidance scale, by sample id: [rows, ...] each.

        Reads the shards that hold them, and only these; nothing is kept.

        Raises:
            StoreError: an unknown guidance scale, or a shard that is missing or damaged.
        """
        return self._some(range(min(count, self.rows(guidance))), guidance, names)

    def last(self, count: int, guidance: float, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The same of the last ``count`` rows."""
        rows = self.rows(guidance)
        return self._some(range(max(0, rows - count), rows), guidance, names)

    def without_last(self, count: int) -> "Store":
        """The store less the last ``count`` rows of each guidance scale, which are held out.

        Raises:
            StoreError: a scale has no more than these.
        """
        shards: list[Shard] = []
        for w in self.guidance:
            kept = self.rows(w) - count
            if kept < 1:
                found = f"found {self.rows(w):,} of guidance {w}"
                raise StoreError(f"{self.path}: expected more rows than the {count:,} to be held out, {found}")
            for shard in sorted(self._shards_of(w)):
                if kept > 0:
                    shards.append(replace(shard, rows=min(shard.rows, kept)))
                kept -= shard.rows
        return Store(self.path, self.identity, shards, self.manifest)

    def _some(self, places: range, guidance: float, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The rows at these places of a scale's rows by sample id."""
        parts: list[Any] = []
        start = 0
        for shard in sorted(self._shards_of(guidance)):
            here = range(max(places.start - start, 0), min(places.stop - start, shard.rows))
            if here:
                parts.append(read_rows(self.path, self.identity, shard, names).slice(here.start, len(here)))
            start += shard.rows
        columns = {name: [torch.from_numpy(column_array(part[name]).copy()) for part in parts] for name in names}
        return {name: torch.cat(values) for name, values in columns.items()}

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
        """Endless full batches for an objective: epoch after epoch, each row once in each, with one interval that the
        objective draws, or that a row of a forward store spans. Reads only the knots that the objective needs.

        Args:
            guidance: as for ``batches``.
            start_batch: where to go on after a stop; the batches are those of a run that was not stopped.

        Raises:
            DistillKacError: the store does not have the knots that the objective needs, or as ``batches``.
        """
        check_position("start_batch", start_batch)
        identity = self.identity
        is_forward, knots = identity.source == "forward", self.check_objective(objective)
        selection = self.selection(objective, guidance)
        reading = _Reading(self, selection, Order(rank, world_size, seed), memory_bytes)
        times = knot_times(identity.knots, identity.knot_grid).float()[knots]
        epoch, skip = divmod(start_batch * batch_size, reading.rows_an_epoch())
        for n, pieces in enumerate(cut(reading.endless(epoch, skip), batch_size), start=start_batch):
            if is_forward:
                yield own_intervals(pieces, times)
            else:
                # Of the rows of all ranks: several workers draw what one with their rows would.
                positions = range(n * batch_size * world_size, (n + 1) * batch_size * world_size)
                uniforms = noise.uniforms(seed, INTERVAL_STREAM, positions, 2)[rank::world_size]
                yield drawn_intervals(pieces, times, *objective.draw(uniforms, identity.knots))

    def dataset(self, batch_size: int, **options: Any) -> "EndpointDataset":
        """The store as a PyTorch dataset of batches: ``DataLoader(store.dataset(256, ...), batch_size=None)``.

        Takes the options of ``batches``.
        """
        return EndpointDataset(self.batches, {"batch_size": batch_size, **options})

    def check_objective(self, objective: Objective) -> list[int]:
        """The indices of the knots between which the objective's intervals lie.

        Raises:
            DistillKacError: they are not all stored.
        """
        knots, stored = list(objective.knots(self.identity.knots)), self.identity.knots
        if self.identity.source == "forward" and "end_time" in objective.conditions:
            raise StoreError(
                f"{self.path}: expected whole trajectories for a flow map, found a forward store, whose rows have one "
                "interval each: roll out with `source` trajectory"
            )
        if self.identity.source == "forward" and len(knots) != stored + 1:
            raise StoreError(f"`steps`: expected {stored}, the intervals of this forward store, found {len(knots) - 1}")
        return knots

    def selection(self, objective: Objective, guidance: float | Sequence[float] | None) -> Selection:
        """What ``interval_batches`` reads for an objective; raises as that does."""
        knots = self.check_objective(objective)
        return self._select(
            guidance, columns_of_knots(self.identity, None if self.identity.source == "forward" else knots)
        )

    def check_guidance(self, guidance: float) -> None:
        """Refuse a guidance scale that is not in the store."""
        if guidance not in self.guidance and self.identity.labels == "null":
            raise StoreError(
                f"`guidance` {guidance:g}: the teacher of {self.path} is unconditional, so it cannot be guided. Choose "
                "`guidance` 0."
            )
        if guidance not in self.guidance:
            raise StoreError(
                f"`guidance`: expected one of the store's scales {list(self.guidance)}, found {guidance}: "
                f"add it with: python -m jobs.rollout --store {self.path} --guidance {guidance:g} ..."
            )

    def load(self, selection: Selection) -> Columns:
        """The selected columns as tensors. They are kept until others are loaded."""
        if selection not in self._loaded:
            self._loaded.clear()
            self._loaded[selection] = sharing.find(selection) or sharing.load(selection)
        return self._loaded[selection]

    def _shards_of(self, guidance: float | Sequence[float]) -> tuple[Shard, ...]:
        scales = guidance if isinstance(guidance, Sequence) else (guidance,)
        for w in scales:
            self.check_guidance(w)
        return tuple(shard for shard in self.shards if shard.guidance in scales)

    def _select(self, guidance: float | Sequence[float] | None, knots: tuple[str, ...]) -> Selection:
        if guidance is None:
            if len(self.guidance) != 1:
                raise StoreError(f"guidance: expected one of {list(self.guidance)}, found None")
            guidance = self.guidance
        return Selection(self.path, self.identity, self._shards_of(guidance), knots)


class EndpointDataset(torch.utils.data.IterableDataset[Batch]):
    """A store's batches for a PyTorch ``DataLoader``, whose worker processes share the rows of this rank."""

    def __init__(self, batches: Callable[..., Iterator[Batch]], options: dict[str, Any]) -> None:
        self.batches, self.options, self.epoch = batches, options, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        options = {"epoch": self.epoch, "rank": 0, "world_size": 1, **self.options}
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            options["rank"] = options["rank"] * worker.num_workers + worker.id
            options["world_size"] *= worker.num_workers
        return self.batches(**options)


@dataclass(frozen=True)
class _Reading:
    """A selection in an order, from memory or streaming."""

    store: Store
    selection: Selection
    order: Order
    memory_bytes: int

    @property
    def is_in_memory(self) -> bool:
        """Whether the selection fits the budget."""
        return rows_of(self.selection.shards) * self.selection.row_bytes <= self.memory_bytes

    def rows_an_epoch(self) -> int:
        """This rank's rows. If any rank would have none, every rank refuses: the others would wait for ever."""
        shards = self.selection.shards
        found, what = (rows_of(shards), "rows") if self.is_in_memory else (len(shards), "shards to stream")
        if found < self.order.world_size:
            at_least = f"at least {self.order.world_size} {what} for as many workers"
            raise StoreError(f"{self.store.path}: expected {at_least}, found {found}")
        return len(self.order.share(range(found))) if self.is_in_memory else rows_of(self.order.share(shards))

    def endless(self, epoch: int, skip: int) -> Iterator[Piece]:
        """Epoch after epoch. A Ray Data pipeline takes a second to start: small stores get several epochs from one."""
        together = max(1, PIPELINE_SHARDS // max(1, len(self.order.share(self.selection.shards))))
        for first in itertools.count(epoch, together):
            yield from self.pieces(range(first, first + together), skip if first == epoch else 0)

    def pieces(self, epochs: range, skip: int) -> Iterator[Piece]:
        """The rows of some epochs in their order, but for the first ``skip``."""
        if not self.is_in_memory:
            yield from self._stream(epochs, skip)
            return
        columns = self.store.load(self.selection)
        for epoch in epochs:
            rows = self.order.permutation(len(columns.label), epoch)[self.order.rank :: self.order.world_size]
            yield columns, rows[skip:]
            skip = max(0, skip - len(rows))

    def _stream(self, epochs: range, skip: int) -> Iterator[Piece]:
        selection, half = self.selection, self.memory_bytes // 2
        todo = deque(
            (epoch, part, shards)
            for epoch in epochs  # the order of its shards is part 0 of its shuffle
            for part, shards in enumerate(windows(selection.shards, self.order, epoch, half // selection.row_bytes), 1)
        )
        while todo and skip >= rows_of(todo[0][2]):
            skip -= rows_of(todo.popleft()[2])
        groups = [grouped(shards, GROUP_BYTES // selection.row_bytes) for _, _, shards in todo]
        tables = read_ahead(selection, list(itertools.chain.from_iterable(groups)), half)
        for (epoch, part, shards), own in zip(todo, groups, strict=True):
            columns = to_columns(selection, shards, itertools.islice(tables, len(own)))
            yield columns, self.order.permutation(len(columns.label), epoch, part)[skip:]
            skip = 0
