"""Verify: read a whole store on all cores of the cluster, and say what is wrong with it, file by file.

A shard that the manifest lists must have the sha256 of its receipt, so that no flipped bit goes unseen. One
difference is no damage: a short last shard that a rollout at work has replaced by a longer one. Without a manifest
there are no receipts: then the CRC of every page, the ids and the values are what is checked.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac import files
from kac.errors import DistillKacError
from pipeline.config import Spec, how
from pipeline.store.describe import READERS, StorePath
from pipeline.store.layout import (
    KINETIC_ENERGY,
    MANIFEST,
    SAMPLE_ID,
    Shard,
    StoreError,
    StoreIdentity,
    parse_shard_name,
)
from pipeline.store.manifest import Entry, Manifest, read_manifest
from pipeline.store.shards import (
    DamagedShard,
    ForeignShard,
    Receipt,
    check,
    finite_rows,
    identity_of_shard,
    name_ids,
    read_metadata,
)

MAX_BLOCKS = 1000
NOT_OURS = "no file of this store: left alone"

Kind = Literal[
    "missing",  # planned, and not there
    "damaged",  # not the bytes that were published
    "not finite",  # rows with NaN or infinity
    "foreign",  # of another store, or of another place in this one
    "duplicated",  # a copy of a shard under another name
    "unplanned",  # sample ids that the manifest does not plan
    "newer",  # written by a newer version
    "unreadable",  # there, but the filesystem does not hand it out
    "unfinished",  # no manifest
    "leftover",  # a temporary file
    "extra",  # no file of this project
]
HARMLESS: tuple[Kind, ...] = ("leftover", "extra")
"""Reported and left alone: readers of the store do not look at them."""


class VerifySpec(Spec):
    """Read every byte of a store on all cores and name what is wrong; exit 1 unless it is finished and whole."""

    store: StorePath = how(..., "endpoint store: a path or s3:// URI")
    repair: bool = how(
        False, "remove damaged, foreign and duplicated shards, so that a rerun of the rollout redoes just these"
    )


@dataclass(frozen=True)
class Problem:
    """One thing about one file."""

    kind: Kind
    name: str  # path below the store
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """What was found in a store."""

    store: str
    shards: int  # whole ones
    rows: int  # in whole shards
    bytes: int  # read
    problems: tuple[Problem, ...]  # by file name
    removed: tuple[str, ...]  # by --repair

    @property
    def is_whole(self) -> bool:
        """Whether the store is finished and nothing is wrong with it."""
        return all(problem.kind in HARMLESS for problem in self.problems)


class Finding(NamedTuple):
    """What a worker found in one file."""

    name: str
    kind: str  # a ``Kind``; empty: whole
    detail: str
    belongs_to: str  # the shard of this store that the footer claims to be; empty: none
    sha256: str
    rows: int
    bytes: int


def run(spec: VerifySpec) -> None:
    """Print a line for each problem.

    Raises:
        StoreError: the store is not finished and whole.
    """
    report = verify(spec)
    for problem in report.problems:
        print(f"verify: {problem}{': removed' if problem.name in report.removed else ''}", flush=True)
    print(
        f"verify: {report.store}: {report.shards:,} whole shards, {report.rows:,} rows, "
        f"{report.bytes / 2**20:.1f} MiB read",
        flush=True,
    )
    if not report.is_whole:
        raise StoreError(verdict(report))


def verdict(report: Report) -> str:
    """One line on a store that is not whole: what is wrong, and what to do."""
    counts = Counter(problem.kind for problem in report.problems if problem.kind not in HARMLESS)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    advice = "run the rollout again to redo what is missing"
    if not report.removed and counts.keys() & {"damaged", "not finite", "foreign", "duplicated"}:
        advice = f"python -m jobs.store verify {report.store} --repair, then {advice}"
    return f"{report.store}: expected a finished and whole store, found {found}: {advice}"


def verify(spec: VerifySpec) -> Report:
    """Check every file of the store; with ``spec.repair`` remove the shards that must be redone.

    Raises:
        StoreError: no store at all, or one of a newer version or with a damaged manifest.
    """
    from pipeline import cluster

    store = cluster.absolute(spec.store)
    manifest = read_manifest(store)
    entries = list_all_files(store)
    identity = manifest.spec if manifest else identity_by_majority(store, [entry.name for entry in entries])
    names = [entry.name for entry in entries if _is_parquet(entry.name)]
    findings = examine_all(store, identity, manifest, names)
    problems = [
        *_problems_of_findings(store, manifest, findings),
        *_missing(manifest, entries),
        *_harmless([entry.name for entry in entries if not _is_parquet(entry.name)]),
    ]
    if manifest is None:
        problems.append(Problem("unfinished", MANIFEST, "expected the manifest of a finished store, found none"))
    removed = _repair(store, manifest is not None, findings, problems) if spec.repair else ()
    whole = [finding for finding in findings if not finding.kind]
    return Report(
        store=store,
        shards=len(whole),
        rows=sum(finding.rows for finding in whole),
        bytes=sum(finding.bytes for finding in findings),
        problems=tuple(sorted(problems, key=lambda problem: (problem.name, problem.kind))),
        removed=removed,
    )


def list_all_files(store: str) -> list[Entry]:
    """Every file below the store but its manifest, by name."""
    location = files.locate(store)
    try:
        found = location.fs.find(location.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    base = len(location.path) + 1
    entries = (Entry(path[base:], int(info["size"])) for path, info in found.items())
    return sorted((entry for entry in entries if entry.name != MANIFEST), key=lambda entry: entry.name)


def identity_by_majority(store: str, names: Sequence[str]) -> StoreIdentity:
    """The identity that most shards of an unfinished store carry.

    Raises:
        StoreError: not one shard says what it is.
    """
    shards = [name for name in names if parse_shard_name(name)]

    def identity(name: str) -> StoreIdentity | DistillKacError:
        try:
            return identity_of_shard(store, name)
        except DistillKacError as error:
            return error

    with ThreadPoolExecutor(max_workers=READERS) as pool:
        answers = list(pool.map(identity, shards))
    identities = Counter(answer for answer in answers if isinstance(answer, StoreIdentity))
    if identities:
        return identities.most_common(1)[0][0]
    for answer in answers:
        if isinstance(answer, StoreError) and not isinstance(answer, DamagedShard):
            raise answer
    found = f"{len(shards)} shards, none of them readable" if shards else "none"
    raise StoreError(f"{store}: expected an endpoint store, found {found}: make one with python -m jobs.rollout")


def examine_all(store: str, identity: StoreIdentity, manifest: Manifest | None, names: Sequence[str]) -> list[Finding]:
    """Read and check the files on all cores of the cluster (Ray Data).

    Raises:
        StoreError: the work failed in Ray.
    """
    import ray
    from tqdm import tqdm

    from pipeline import cluster

    if not names:
        return []
    cluster.connect()
    receipts = {receipt.name: receipt for receipt in manifest.shards} if manifest else {}

    def examine_one(batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        name = names[int(batch["item"][0])]
        finding = examine(store, identity, name, receipts.get(name))
        return {field: [value] for field, value in finding._asdict().items()}

    items = ray.data.from_items(list(range(len(names))), override_num_blocks=min(len(names), MAX_BLOCKS))
    found = items.map_batches(examine_one, batch_size=1, batch_format="numpy")
    found.context.enable_progress_bars = False
    bar = tqdm(found.iter_rows(), desc="verify", total=len(names), unit="shard", disable=None)
    try:
        return sorted(Finding(**row) for row in bar)
    except ray.exceptions.RayError as error:
        raise StoreError(f"{store}: the check failed in Ray: {' '.join(str(error).split())[-300:]}") from error


def examine(store: str, identity: StoreIdentity, name: str, receipt: Receipt | None) -> Finding:
    """Read one Parquet file of the store to its last byte and hold it against what it must be.

    Args:
        receipt: what the manifest knows of it; None if it is not listed.
    """
    try:
        data = files.read_bytes(files.join(store, name))
    except FileNotFoundError:
        return Finding(name, "missing", "expected a file, found none: it vanished meanwhile", "", "", 0, 0)
    except OSError as error:
        return Finding(name, "unreadable", f"expected a file that can be read, found: {_reason(error)}", "", "", 0, 0)
    belongs_to, sha256 = _claimed_place(identity, data), hashlib.sha256(data).hexdigest()
    shard = shard_of_name(name, identity.shard_size)
    if shard is not None:
        kind, detail, rows = _judge(store, identity, shard, receipt, data, sha256)
    elif belongs_to:
        kind, detail, rows = "duplicated", f"expected no shard under this name, found one that is {belongs_to}", 0
    else:
        kind, detail, rows = "extra", NOT_OURS, 0
    if kind == "foreign" and belongs_to:
        kind = "damaged" if belongs_to == name else "duplicated"
    return Finding(name, kind, detail.removeprefix(f"{store}/{name}: "), belongs_to, sha256, rows, len(data))


class Verdict(NamedTuple):
    """What is to be said of a shard."""

    kind: str
    detail: str
    rows: int


def _judge(
    store: str, identity: StoreIdentity, shard: Shard, receipt: Receipt | None, data: bytes, sha256: str
) -> Verdict:
    try:
        rows = check(store, shard, identity, data).num_rows
    except ForeignShard as error:
        return Verdict("foreign", str(error), 0)
    except DamagedShard as error:
        bad = not_finite(identity, data)
        return Verdict("not finite", bad, 0) if bad else Verdict("damaged", str(error), 0)
    except StoreError as error:
        # What a manifest of this version lists was written by this version: another number in it is damage.
        return Verdict("damaged" if receipt else "newer", str(error), 0)
    damage = _differs(receipt, sha256, rows, identity.shard_size)
    return Verdict("damaged", damage, 0) if damage else Verdict("", "", rows)


def _differs(receipt: Receipt | None, sha256: str, rows: int, shard_size: int) -> str:
    """Why a shard that passes its own checks is not the one that was published; empty if it is."""
    if rows > shard_size:
        return f"expected at most {shard_size} rows, found {rows}"
    # A rollout that adds trajectories replaces a short shard by a longer one before the manifest counts its new rows.
    if receipt is None or sha256 == receipt.sha256 or rows > receipt.rows:
        return ""
    if rows < receipt.rows:
        return f"expected {receipt.rows} rows, found {rows}"
    return f"expected sha256 {receipt.sha256[:12]}... as {MANIFEST} says, found {sha256[:12]}..."


def not_finite(identity: StoreIdentity, data: bytes) -> str:
    """Which rows of an otherwise readable shard have NaN or infinity, and where; empty: none."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        columns = {name: ~finite_rows(table[name]) for name in (KINETIC_ENERGY, *identity.knot_columns)}
        ids = table[SAMPLE_ID].to_numpy()
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return ""
    where = [name for name, bad in columns.items() if bad.any()]
    if not where:
        return ""
    rows = ids[np.any(list(columns.values()), axis=0)]
    shown = ", ".join(where[:3]) + (f" and {len(where) - 3} more columns" if len(where) > 3 else "")
    return f"expected finite values, found NaN or infinity in samples {name_ids(rows)} ({shown})"


def shard_of_name(name: str, shard_size: int) -> Shard | None:
    """The full shard that a file's name stands for; None if no plan gives that name."""
    parsed = parse_shard_name(name)
    if parsed is None:
        return None
    guidance, index = parsed
    shard = Shard(guidance, index, index * shard_size, shard_size)
    return shard if shard.name == name else None


def _claimed_place(identity: StoreIdentity, data: bytes) -> str:
    """The name of the shard of this store that a footer claims; empty if it claims none."""
    try:
        own = read_metadata(pq.read_schema(pa.BufferReader(data)))
        claimed = StoreIdentity(**json.loads(own["spec"]))
        shard = Shard(float(own["guidance"]), int(own["start"]) // claimed.shard_size, int(own["start"]), 0)
    except (pa.ArrowException, OSError, DistillKacError, KeyError, TypeError, ValueError):
        return ""
    return shard.name if claimed == identity else ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet")


def _problems_of_findings(store: str, manifest: Manifest | None, findings: Sequence[Finding]) -> list[Problem]:
    there = {finding.name for finding in findings}
    planned = {shard.name: shard for shard in manifest.plan()} if manifest else {}
    problems = []
    for finding in findings:
        kind, detail = finding.kind, finding.detail
        if kind == "duplicated" and finding.belongs_to not in there:
            kind, detail = "foreign", f"expected another shard, found {finding.belongs_to}, which is not in its place"
        if not kind and manifest and finding.name not in planned:
            kind, again = "unplanned", "run the rollout that made them again, or move it away"
            detail = f"{finding.rows} rows that {MANIFEST} does not plan: {again}"
        if not kind and manifest and finding.rows < planned[finding.name].rows:
            kind, detail = "damaged", f"expected {planned[finding.name].rows} rows, found {finding.rows}"
        if kind:
            problems.append(Problem(kind, finding.name, detail))  # type: ignore[arg-type]
    return problems


def _missing(manifest: Manifest | None, entries: Sequence[Entry]) -> list[Problem]:
    there = {entry.name for entry in entries}
    return [
        Problem("missing", shard.name, f"expected samples {shard.start} .. {shard.ids.stop - 1}, found no file")
        for shard in (manifest.plan() if manifest else [])
        if shard.name not in there
    ]


def _harmless(names: Sequence[str]) -> list[Problem]:
    return [
        Problem("leftover", name, "a temporary file of a writer that died or is at work: left alone")
        if files.is_temporary(name.rsplit("/", 1)[-1])
        else Problem("extra", name, NOT_OURS)
        for name in names
    ]


def _repair(store: str, is_finished: bool, findings: Sequence[Finding], problems: Sequence[Problem]) -> tuple[str, ...]:
    """Remove the shards that must be redone, and copies of whole ones; returns their names."""
    kinds: dict[str, str] = {problem.name: problem.kind for problem in problems}
    whole = {(finding.name, finding.sha256) for finding in findings if not finding.kind}
    removed = []
    for finding in findings:
        kind = kinds.get(finding.name)
        if shard_of_name(finding.name, 1):
            # Nothing says which of the specs of an unfinished store is the right one.
            is_bad = kind in ("damaged", "not finite", "duplicated") or (kind == "foreign" and is_finished)
        else:
            # A name of the user's choice: only what is certainly there a second time.
            is_bad = kind == "duplicated" and (finding.belongs_to, finding.sha256) in whole
        if is_bad and _remove(files.join(store, finding.name), finding.sha256):
            removed.append(finding.name)
    return tuple(removed)


def _remove(path: str, sha256: str) -> bool:
    """Remove a file unless it has changed since it was read: a rollout at work may have mended it."""
    try:
        if hashlib.sha256(files.read_bytes(path)).hexdigest() != sha256:
            return False
        location = files.locate(path)
        location.fs.rm_file(location.path)
    except FileNotFoundError:
        return False
    return True
