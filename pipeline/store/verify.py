"""Verify a store: report the problems of each file, and remove shards that must be recomputed."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kac.util import files
from kac.util.fingerprint import unhashed
from kac.util.log import log
from kac.util.path_options import input_path
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config import Spec
from pipeline.store.describe import StorePath
from pipeline.store.examine import UNRELATED, FileCheck, Kind, examine_all
from pipeline.store.layout import MANIFEST, StoreError, StoreIdentity, parse_shard_name
from pipeline.store.manifest import Manifest, list_files, read_manifest
from pipeline.store.shards import identity_of_shard, sha256_of
from pipeline.store.threads import map_in_threads
from pipeline.store.versions import NewerVersion

HARMLESS: tuple[Kind, ...] = ("leftover", "extra")
"""Only reported: readers of the store ignore these files."""

REMOVED: tuple[Kind, ...] = ("damaged", "not finite", "foreign", "duplicated")
"""Removed by `repair`, except foreign shards in an unfinished store."""

INTACT: tuple[Kind, ...] = ("", "unplanned")
"""Intact shards. The manifest does not list the unplanned ones."""


class VerifySpec(Spec):
    """Check every byte of a store, using all CPUs. Exits with 1 unless the store is finished and intact."""

    stage = "verify"
    store: StorePath = input_path(..., "endpoint store: a path or s3:// URI")
    repair: bool = unhashed(
        False, "remove damaged, foreign and duplicated shards; a rerun of the rollout recomputes them"
    )


@dataclass(frozen=True)
class VerifyReport:
    """The result of verifying a store."""

    store: str
    shards: int  # intact shards
    rows: int  # in intact shards
    bytes: int  # read
    problems: tuple[FileCheck, ...]  # sorted by file name
    removed: tuple[str, ...]  # by `repair`

    @property
    def is_whole(self) -> bool:
        """Whether the store is finished and intact."""
        return all(problem.kind in HARMLESS for problem in self.problems)


def run(spec: VerifySpec) -> None:
    """Log one line per problem and a summary.

    Raises:
        StoreError: the store is not finished or not intact.
    """
    report = verify(spec)
    for problem in report.problems:
        removed = " It was removed." if problem.name in report.removed else ""
        log.info(f"verify: {problem.kind}: {problem.name} {problem.detail}{removed}")
    log.info(
        f"verify: {report.store} has {report.shards:,} intact shards with {report.rows:,} rows; "
        f"read {report.bytes / 2**20:.1f} MiB"
    )
    if not report.is_whole:
        raise StoreError(_describe_problems(report))


def _describe_problems(report: VerifyReport) -> str:
    counts = Counter(problem.kind for problem in report.problems if problem.kind not in HARMLESS)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    advice = "Run the rollout again to compute the missing shards."
    if not report.removed and counts.keys() & set(REMOVED):
        advice = f"Run `python -m jobs.store verify {report.store} --repair`, then run the rollout again."
    return f"{report.store} is not a finished, intact store. Problems: {found}. {advice}"


def verify(spec: VerifySpec) -> VerifyReport:
    """Check every file of the store. With ``spec.repair``, remove the shards that must be recomputed.

    Raises:
        StoreError: the store does not exist or is from a newer version, or its manifest is damaged.
    """
    store = cluster.absolute(spec.store)
    storage.check_shared({"STORE": store}, lambda: True)
    manifest = read_manifest(store)
    names = list_files(store)
    identity = manifest.identity if manifest else identity_by_majority(store, names)
    parquet = [name for name in names if name.endswith(".parquet")]
    planned = {shard.name for shard in manifest.plan()} if manifest else None
    checks = [_in_context(check, names, planned) for check in examine_all(store, identity, manifest, parquet)]
    problems = [check for check in checks if check.kind]
    intact = [check for check in checks if check.kind in INTACT]
    return VerifyReport(
        store=store,
        shards=len(intact),
        rows=sum(check.rows for check in intact),
        bytes=sum(check.bytes for check in checks),
        problems=tuple(sorted([*problems, *_check_names(manifest, names)])),
        removed=_repair(store, manifest is not None, checks) if spec.repair else (),
    )


def identity_by_majority(store: str, names: Iterable[str]) -> StoreIdentity:
    """Return the identity that most shards of an unfinished store have.

    Raises:
        StoreError: no shard has a readable identity.
    """

    def identity_or_error(name: str) -> StoreIdentity | StoreError:
        try:
            return identity_of_shard(store, name)
        except StoreError as error:
            return error

    results = map_in_threads(identity_or_error, filter(parse_shard_name, names))
    identities = Counter(result for result in results if isinstance(result, StoreIdentity))
    if identities:
        return identities.most_common(1)[0][0]
    for result in results:
        if isinstance(result, NewerVersion):
            raise result
    if results:
        raise StoreError(
            f"{store} has no manifest, and none of its {len(results)} shards is readable. "
            "Delete them and run the rollout again."
        )
    raise StoreError(f"{store} is not an endpoint store. Create one with `python -m jobs.rollout`.")


def _in_context(check: FileCheck, names: Collection[str], planned: Collection[str] | None) -> FileCheck:
    """Refine the result of a file, given the names of all files and planned shards."""
    if check.kind == "duplicated" and check.belongs_to not in names:
        return check._replace(kind="foreign", detail=f"is a copy of {check.belongs_to}, which does not exist.")
    if not check.kind and planned is not None and check.name not in planned:
        detail = f"has {check.rows} rows that {MANIFEST} does not list. Run their rollout again, or move the file away."
        return check._replace(kind="unplanned", detail=detail)
    return check


def _check_names(manifest: Manifest | None, names: Collection[str]) -> Iterator[FileCheck]:
    """Yield the problems that the names of the files show."""
    if manifest is None:
        yield FileCheck(MANIFEST, "unfinished", "does not exist, so the store is unfinished.")
    for shard in manifest.plan() if manifest else ():
        if shard.name not in names:
            yield FileCheck(shard.name, "missing", f"does not exist; samples {shard.start} to {shard.ids.stop - 1}.")
    for name in names:
        if files.is_temporary(name.rsplit("/", 1)[-1]):
            yield FileCheck(name, "leftover", "is a temporary file of a stopped or running writer. It was left alone.")
        elif not name.endswith(".parquet"):
            yield FileCheck(name, "extra", UNRELATED)


def _repair(store: str, is_finished: bool, checks: Sequence[FileCheck]) -> tuple[str, ...]:
    """Remove the shards that must be recomputed and copies of intact shards; return the names of removed files."""
    intact = {(check.name, check.sha256) for check in checks if check.kind in INTACT}

    def is_bad(check: FileCheck) -> bool:
        if not parse_shard_name(check.name):
            # The user chose this name. Remove the file only if it is certainly a copy.
            return check.kind == "duplicated" and (check.belongs_to, check.sha256) in intact
        # In an unfinished store, it is unknown which identity is the right one.
        return check.kind in REMOVED and (check.kind != "foreign" or is_finished)

    bad = [check for check in checks if is_bad(check)]
    return tuple(check.name for check in bad if _remove(files.join(store, check.name), check.sha256))


def _remove(path: str, sha256: str) -> bool:
    """Remove a file unless it changed since it was read: a running rollout may have repaired it."""
    try:
        if sha256_of(files.read_bytes(path)) != sha256:
            return False
        location = files.locate(path)
        location.fs.rm_file(location.path)
    except FileNotFoundError:
        return False
    return True
