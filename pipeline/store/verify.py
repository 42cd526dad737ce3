"""Verify a store: read every byte, report the problems of each file, and remove shards that must be recomputed.

The sha256 of each shard listed in the manifest must match the one in its receipt, so every flipped bit is detected. The
exception is a short last shard that a growing store has replaced with a longer shard. If there is no manifest, the
check covers the CRC of every page, the digest, the sample ids and the values.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac.util import files
from kac.util.errors import StorageError, one_line
from kac.util.fingerprint import unhashed
from kac.util.log import log
from kac.util.path_options import input_path
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config import Spec
from pipeline.store import shards
from pipeline.store.describe import StorePath
from pipeline.store.layout import CARD, MANIFEST, NewerVersion, StoreError, StoreIdentity, parse_shard_name
from pipeline.store.manifest import Manifest, is_receipt_file, read_manifest
from pipeline.store.shards import DamagedShard, ForeignShard, NotFiniteShard, Receipt
from pipeline.tracking.server import RUN_FILE

PAUSE_SECONDS = 0.1
OWN_FILES = (MANIFEST, CARD, RUN_FILE)
UNRELATED = "does not belong to this store. It was not changed."

KIND_OF = {NotFiniteShard: "not finite", DamagedShard: "damaged", ForeignShard: "foreign", NewerVersion: "newer"}
INTACT = ("", "unplanned")
HARMLESS = ("leftover", "extra")
REMOVED = ("damaged", "not finite", "foreign", "duplicated")
"""Kinds of files that `repair` removes. In an unfinished store, `repair` keeps foreign shards."""


class FileCheck(NamedTuple):
    """The result of examining one file."""

    name: str
    kind: str  # empty if nothing is wrong
    detail: str  # the rest of a sentence that starts with the name: "has 8 rows instead of 32."
    belongs_to: str = ""  # the shard that the footer names; empty if the shard is from a different store
    sha256: str = ""
    rows: int = 0  # rows of an intact shard
    bytes: int = 0


class VerifySpec(Spec):
    """Check every byte of a store, using all CPUs. Exits with 1 unless the store is finished and intact."""

    stage = "verify"
    store: StorePath = input_path(..., "endpoint store: a path or s3:// URI")
    repair: bool = unhashed(False, "remove damaged, foreign and duplicated shards; rerun the rollout to replace them")


@dataclass(frozen=True)
class VerifyReport:
    """The result of verifying a store."""

    store: str
    shards: int  # intact shards
    rows: int  # rows in intact shards
    bytes: int  # bytes read
    problems: tuple[FileCheck, ...]  # sorted by file name
    removed: tuple[str, ...]  # names of the files that `repair` removed

    @property
    def is_whole(self) -> bool:
        """Whether the store is finished and intact."""
        return all(problem.kind in HARMLESS for problem in self.problems)


def run(spec: VerifySpec) -> None:
    """Log one line per problem and a summary. Raises ``StoreError`` unless the store is finished and intact."""
    report = verify(spec)
    for problem in report.problems:
        removed = " It was removed." if problem.name in report.removed else ""
        log.info(f"verify: {problem.kind}: {problem.name} {problem.detail}{removed}")
    intact = f"{report.shards:,} intact shards with {report.rows:,} rows"
    log.info(f"verify: {report.store} has {intact}; read {report.bytes / 2**20:.1f} MiB")
    if not report.is_whole:
        counts = Counter(problem.kind for problem in report.problems if problem.kind not in HARMLESS)
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        advice = "Run the rollout again to compute the missing shards."
        if not report.removed and counts.keys() & set(REMOVED):
            advice = f"Run `python -m jobs.store verify {report.store} --repair`, then run the rollout again."
        raise StoreError(f"{report.store} is not a finished, intact store. Problems: {found}. {advice}")


def verify(spec: VerifySpec) -> VerifyReport:
    """Check every file of the store. With ``spec.repair``, remove the shards that must be recomputed.

    Raises ``StoreError`` if the store does not exist or is from a newer version, or if its manifest is damaged.
    """
    store = cluster.absolute(spec.store)
    storage.check_shared({"STORE": store}, lambda: True)
    manifest = read_manifest(store)
    sizes = files.list_sizes(store).items()
    names = {name: size for name, size in sizes if name not in OWN_FILES and not is_receipt_file(name)}
    identity = manifest.identity if manifest else _identity_by_majority(store, names)
    listed = {receipt.name: receipt for receipt in manifest.shards} if manifest else {}
    parquet = [name for name in names if name.endswith(".parquet")]
    checks = []
    for check in examine_all(store, identity, listed, parquet):
        kind, detail = check.kind, check.detail
        if kind == "duplicated" and check.belongs_to not in names:
            kind, detail = "foreign", f"is a copy of {check.belongs_to}, which does not exist."
        elif not kind and manifest and check.name not in listed:
            problem = f"has {check.rows} rows that {MANIFEST} does not list"
            kind, detail = "unplanned", f"{problem}. Run the rollout of these rows again, or move the file away."
        checks.append(check._replace(kind=kind, detail=detail))
    intact = [check for check in checks if check.kind in INTACT]
    return VerifyReport(
        store=store,
        shards=len(intact),
        rows=sum(check.rows for check in intact),
        bytes=sum(check.bytes for check in checks),
        problems=tuple(sorted([*(check for check in checks if check.kind), *_check_names(manifest, names)])),
        removed=_repair(store, manifest is not None, checks) if spec.repair else (),
    )


def _identity_by_majority(store: str, names: Iterable[str]) -> StoreIdentity:
    """Return the most common identity among the shards of an unfinished store."""

    def identity_or_error(name: str) -> StoreIdentity | StoreError:
        try:
            return shards.identity_of_shard(store, name)
        except StoreError as error:
            return error

    results = shards.map_in_threads(identity_or_error, filter(parse_shard_name, names))
    identities = Counter(result for result in results if isinstance(result, StoreIdentity))
    if identities:
        return identities.most_common(1)[0][0]
    errors = [result for result in results if isinstance(result, StoreError)]
    missing = StoreError(f"{store} is not an endpoint store. Create one with `python -m jobs.rollout`.")
    raise min(errors, key=lambda error: not isinstance(error, NewerVersion), default=missing)


def _check_names(manifest: Manifest | None, names: Collection[str]) -> Iterator[FileCheck]:
    """Yield the problems that the file names show."""
    if manifest is None:
        yield FileCheck(MANIFEST, "unfinished", "does not exist, so the store is unfinished.")
    for shard in manifest.plan() if manifest else ():
        if shard.name not in names:
            yield FileCheck(shard.name, "missing", f"does not exist (samples {shard.start} to {shard.ids.stop - 1}).")
    for name in names:
        if files.is_temporary(name.rsplit("/", 1)[-1]):
            yield FileCheck(name, "leftover", "is a temporary file of a stopped or running writer. It was not changed.")
        elif not name.endswith(".parquet"):
            yield FileCheck(name, "extra", UNRELATED)


def examine_all(
    store: str, identity: StoreIdentity, listed: Mapping[str, Receipt], names: Sequence[str]
) -> list[FileCheck]:
    """Examine Parquet files on all CPUs of the cluster with Ray Data."""
    if not names:
        return []
    import ray
    from tqdm import tqdm

    from pipeline.cluster.ray_data import each

    cluster.connect()

    def examine_one(batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        name, receipt = json.loads(batch["item"][0])
        result = examine(store, identity, name, Receipt(**receipt) if receipt else None)
        return {field: [value] for field, value in result._asdict().items()}

    items = [json.dumps([name, listed[name].model_dump() if name in listed else None]) for name in names]
    results = each(items, examine_one, pause_seconds=PAUSE_SECONDS)
    try:
        bar = tqdm(results.iter_rows(), desc="verify", total=len(names), unit="shard", disable=None)
        return sorted(FileCheck(**row) for row in bar)
    except ray.exceptions.RayError as error:
        raise StoreError(f"Checking {store} failed in Ray: {one_line(error, 10**6)[-300:]}") from error


def examine(store: str, identity: StoreIdentity, name: str, receipt: Receipt | None) -> FileCheck:
    """Examine one Parquet file. ``receipt`` is the manifest's receipt for the file, or None."""
    try:
        data = files.read_bytes(files.join(store, name))
    except FileNotFoundError:
        return FileCheck(name, "missing", "was deleted during the check.")
    except (OSError, StorageError) as error:
        return FileCheck(name, "unreadable", f"cannot be read: {one_line(error, 160)}")
    kind, detail, rows = "", "", 0
    shard, belongs_to = parse_shard_name(name, identity.shard_size), _name_in_footer(identity, data)
    if shard is None:
        kind, detail = ("duplicated", f"is a copy of {belongs_to}.") if belongs_to else ("extra", UNRELATED)
    else:
        try:
            rows = shards.confirm(store, shard, identity, data, receipt).rows
        except StoreError as error:
            kind, detail = KIND_OF[type(error)], str(error).removeprefix(f"{store}/{name} ")
    if kind == "foreign" and belongs_to:
        kind = "duplicated"
    if kind == "newer" and receipt:
        kind = "damaged"  # this version's manifest lists no shards of a newer version
    return FileCheck(name, kind, detail, belongs_to, shards.sha256_of(data), rows, len(data))


def _name_in_footer(identity: StoreIdentity, data: bytes) -> str:
    """Return the name of the shard that the footer describes, or "" if the shard is from a different store."""
    try:
        found, shard = shards.read_footer("", pq.read_schema(pa.BufferReader(data)))
    except (*shards.UNREADABLE, NewerVersion):
        return ""
    return shard.name if found.fingerprint() == identity.fingerprint() else ""


def _repair(store: str, is_finished: bool, checks: Sequence[FileCheck]) -> tuple[str, ...]:
    """Remove copies of intact shards, and shards that must be recomputed; return the names of the removed files."""
    intact = {(check.name, check.sha256) for check in checks if check.kind in INTACT}

    def is_bad(check: FileCheck) -> bool:
        if not parse_shard_name(check.name):
            # A user chose this name. Remove the file only if it is an exact copy of an intact shard.
            return check.kind == "duplicated" and (check.belongs_to, check.sha256) in intact
        # Without a manifest, the shards with a rare identity may be the correct shards.
        return check.kind in REMOVED and (check.kind != "foreign" or is_finished)

    def remove(check: FileCheck) -> bool:
        """Remove a file unless it has changed since it was read: a running rollout may have replaced it."""
        path = files.join(store, check.name)
        try:
            is_same = shards.sha256_of(files.read_bytes(path)) == check.sha256
        except FileNotFoundError:
            return False
        if is_same:
            files.remove(path)
        return is_same

    return tuple(check.name for check in checks if is_bad(check) and remove(check))
