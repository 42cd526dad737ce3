"""Verify: say what is wrong with a store, file by file, and remove what must be redone."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kac.util import files
from kac.util.fingerprint import unhashed
from kac.util.log import log
from kac.util.path_options import input_path
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config.specs import Spec
from pipeline.store.describe import StorePath
from pipeline.store.examine import NOT_OURS, Finding, Kind, examine_all
from pipeline.store.layout import MANIFEST, StoreError, StoreIdentity, parse_shard_name
from pipeline.store.manifest import Manifest, list_files, read_manifest
from pipeline.store.shards import identity_of_shard, sha256_of
from pipeline.store.threads import in_threads
from pipeline.store.versions import NewerVersion

HARMLESS: tuple[Kind, ...] = ("leftover", "extra")
"""Reported and left alone: readers of the store do not look at them."""

REDONE: tuple[Kind, ...] = ("damaged", "not finite", "foreign", "duplicated")
"""Removed by `repair`; what was foreign in an unfinished store stays."""

WHOLE: tuple[Kind, ...] = ("", "unplanned")
"""All that can be wrong with such a shard is that the manifest has no use for it."""


class VerifySpec(Spec):
    """Read every byte of a store on all cores and name what is wrong; exit 1 unless it is finished and whole."""

    stage = "verify"
    store: StorePath = input_path(..., "endpoint store: a path or s3:// URI")
    repair: bool = unhashed(
        False, "remove damaged, foreign and duplicated shards, so that a rerun of the rollout redoes just these"
    )


@dataclass(frozen=True)
class Report:
    """What was found in a store."""

    store: str
    shards: int  # whole ones
    rows: int  # in whole shards
    bytes: int  # read
    problems: tuple[Finding, ...]  # by file name
    removed: tuple[str, ...]  # by `repair`

    @property
    def is_whole(self) -> bool:
        """Whether the store is finished and nothing is wrong with it."""
        return all(problem.kind in HARMLESS for problem in self.problems)


def run(spec: VerifySpec) -> None:
    """Print a line for each problem.

    Raises:
        StoreError: the store is not finished and whole.
    """
    report = verify(spec)
    for problem in report.problems:
        removed = ": removed" if problem.name in report.removed else ""
        log.info(f"verify: {problem.kind}: {problem.name}: {problem.detail}{removed}")
    whole, read = f"{report.shards:,} whole shards, {report.rows:,} rows", f"{report.bytes / 2**20:.1f} MiB read"
    log.info(f"verify: {report.store}: {whole}, {read}")
    if not report.is_whole:
        raise StoreError(_verdict(report))


def _verdict(report: Report) -> str:
    """One line on a store that is not whole: what is wrong, and what to do."""
    counts = Counter(problem.kind for problem in report.problems if problem.kind not in HARMLESS)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    advice = "run the rollout again to redo what is missing"
    if not report.removed and counts.keys() & set(REDONE):
        advice = f"python -m jobs.store verify {report.store} --repair, then {advice}"
    return f"{report.store}: expected a finished and whole store, found {found}: {advice}"


def verify(spec: VerifySpec) -> Report:
    """Check every file of the store; with ``spec.repair`` remove the shards that must be redone.

    Raises:
        StoreError: no store at all, or one of a newer version or with a damaged manifest.
    """
    store = cluster.absolute(spec.store)
    storage.check_shared({"STORE": store}, lambda: True)
    manifest = read_manifest(store)
    names = list_files(store)
    identity = manifest.identity if manifest else identity_by_majority(store, names)
    parquet = [name for name in names if name.endswith(".parquet")]
    planned = {shard.name for shard in manifest.plan()} if manifest else None
    findings = [_in_context(finding, names, planned) for finding in examine_all(store, identity, manifest, parquet)]
    problems = [finding for finding in findings if finding.kind]
    whole = [finding for finding in findings if finding.kind in WHOLE]
    return Report(
        store=store,
        shards=len(whole),
        rows=sum(finding.rows for finding in whole),
        bytes=sum(finding.bytes for finding in findings),
        problems=tuple(sorted([*problems, *_problems_of_names(manifest, names)])),
        removed=_repair(store, manifest is not None, findings) if spec.repair else (),
    )


def identity_by_majority(store: str, names: Iterable[str]) -> StoreIdentity:
    """The identity that most shards of an unfinished store carry.

    Raises:
        StoreError: not one shard says what it is.
    """

    def identity_or_error(name: str) -> StoreIdentity | StoreError:
        try:
            return identity_of_shard(store, name)
        except StoreError as error:
            return error

    answers = in_threads(identity_or_error, filter(parse_shard_name, names))
    identities = Counter(answer for answer in answers if isinstance(answer, StoreIdentity))
    if identities:
        return identities.most_common(1)[0][0]
    for answer in answers:
        if isinstance(answer, NewerVersion):
            raise answer
    found = f"{len(answers)} shards, none of them readable" if answers else "none"
    raise StoreError(f"{store}: expected an endpoint store, found {found}: make one with python -m jobs.rollout")


def _in_context(finding: Finding, names: Collection[str], planned: Collection[str] | None) -> Finding:
    """The finding in the light of what else there is."""
    if finding.kind == "duplicated" and finding.belongs_to not in names:
        detail = f"expected another shard, found {finding.belongs_to}, which is not in its place"
        return finding._replace(kind="foreign", detail=detail)
    if not finding.kind and planned is not None and finding.name not in planned:
        again = "run the rollout that made them again, or move it away"
        detail = f"{finding.rows} rows that {MANIFEST} does not plan: {again}"
        return finding._replace(kind="unplanned", detail=detail)
    return finding


def _problems_of_names(manifest: Manifest | None, names: Collection[str]) -> Iterator[Finding]:
    if manifest is None:
        yield Finding(MANIFEST, "unfinished", "expected the manifest of a finished store, found none")
    for shard in manifest.plan() if manifest else ():
        if shard.name not in names:
            samples = f"{shard.start} .. {shard.ids.stop - 1}"
            yield Finding(shard.name, "missing", f"expected samples {samples}, found no file")
    for name in names:
        if files.is_temporary(name.rsplit("/", 1)[-1]):
            yield Finding(name, "leftover", "a temporary file of a writer that died or is at work: left alone")
        elif not name.endswith(".parquet"):
            yield Finding(name, "extra", NOT_OURS)


def _repair(store: str, is_finished: bool, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Remove the shards that must be redone, and copies of whole ones; returns their names."""
    whole = {(finding.name, finding.sha256) for finding in findings if finding.kind in WHOLE}

    def is_bad(finding: Finding) -> bool:
        if not parse_shard_name(finding.name):
            # A name of the user's choice: only what is certainly there a second time.
            return finding.kind == "duplicated" and (finding.belongs_to, finding.sha256) in whole
        # Nothing says which of the identities in an unfinished store is the right one.
        return finding.kind in REDONE and (finding.kind != "foreign" or is_finished)

    bad = [finding for finding in findings if is_bad(finding)]
    return tuple(finding.name for finding in bad if _remove(files.join(store, finding.name), finding.sha256))


def _remove(path: str, sha256: str) -> bool:
    """Remove a file unless it has changed since it was read: a rollout at work may have mended it."""
    try:
        if sha256_of(files.read_bytes(path)) != sha256:
            return False
        location = files.locate(path)
        location.fs.rm_file(location.path)
    except FileNotFoundError:
        return False
    return True
