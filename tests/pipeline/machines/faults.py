"""What breaks in the middle of a stage, and what it costs: each stage under each fault, beside itself undisturbed."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load_file

from pipeline import tracking
from tests.pipeline.compare import assert_same_store
from tests.pipeline.machines.cluster import Cluster, Submission, wait_until

PLAIN = "plain"
"""Where the outputs of undisturbed runs lie in the bucket; those of others lie under the name of their fault."""

CHECKPOINT_UPDATES = 50
CUT_SECONDS = 30.0
LATE_SECONDS = 100.0
NOTICE_SECONDS = 90.0
"""A raylet that was given up ends itself once it hears of it."""
TRAINING = f"`optimizer.batch_size` 64 `validation_updates` 0 `checkpoint_updates` {CHECKPOINT_UPDATES}".split()


class Stage(NamedTuple):
    """A stage at a size at which a fault hits the middle of it.

    Attributes:
        words: the job and its options; ``{plain}`` is where undisturbed outputs lie, ``{out}`` where its own does.
        progress: what it writes as it goes on: the place, ``{out}`` in it, and how the names there end.
        middle: after so many of these it is in the middle.
        difference: of its output, downloaded, to the undisturbed one; asserts what must be equal.
    """

    words: str
    progress: tuple[str, tuple[str, ...]]
    middle: int
    difference: Callable[[Path, Path], float]


def weights_difference(found: Path, expected: Path) -> float:
    """The largest of any weight in the model folders below both."""
    names = sorted(path.relative_to(expected) for path in expected.rglob("model.safetensors"))
    assert names == sorted(path.relative_to(found) for path in found.rglob("model.safetensors"))
    assert names
    pairs = [(load_file(found / name), load_file(expected / name)) for name in names]
    return max(float(abs(mine[key] - theirs[key]).max()) for mine, theirs in pairs for key in theirs)


def store_difference(found: Path, expected: Path) -> float:
    """None: the rows agree within the tolerance of ``compare.py``."""
    assert_same_store(str(found), str(expected))
    return 0.0


def scores_difference(found: Path, expected: Path) -> float:
    """The largest of any metric in the tables, relative to values above 1; speeds are left out."""
    tables = [json.loads((folder / "evaluation.json").read_text())["scores"] for folder in (found, expected)]
    largest = 0.0
    for mine, theirs in zip(*tables, strict=True):
        assert mine["name"] == theirs["name"]
        for name, value in theirs["metrics"].items():
            if "per_second" not in name:
                largest = max(largest, abs(mine["metrics"][name] - value) / max(abs(value), 1.0))
    return largest


CHECKPOINTS = ("state.pt",)

STAGES = {
    "teach": Stage(
        "jobs.teach `data` digits `network.width` 64 `network.depth` 1 `workers` 2 `optimizer.updates` 400 `out` {out}",
        ("{out}/training", CHECKPOINTS),
        2,
        weights_difference,
    ),
    "rollout": Stage(
        "jobs.rollout `teacher` {plain}/teach `trajectories` 4096 `shard_size` 32 `actors` 2 `store` {out}",
        ("{out}/data", (".parquet",)),
        16,
        store_difference,
    ),
    "distill": Stage(
        "jobs.distill `store` {plain}/rollout `steps` 4 `workers` 2 `optimizer.updates` 400 `out` {out}",
        ("{out}/training", CHECKPOINTS),
        2,
        weights_difference,
    ),
    "elastic": Stage(
        "jobs.distill `store` {plain}/rollout `steps` 4 `workers` 1:2 `optimizer.updates` 400 `out` {out}",
        ("{out}/training", CHECKPOINTS),
        2,
        weights_difference,
    ),
    "sweep": Stage(
        "jobs.sweep `store` {plain}/rollout `grid` steps=1,4 `optimizer.updates` 400 `samples` 1000 `out` {out}",
        ("{out}", CHECKPOINTS),
        3,
        weights_difference,
    ),
    "evaluate": Stage(
        "jobs.evaluate `teacher` {plain}/teach `students` {plain}/sweep `samples` 8000 `actors` 2 `out` {out}",
        ("cache/samples", (".npz",)),
        3,
        scores_difference,
    ),
}
"""In an order in which each finds its inputs."""


def words_of(name: str, plain: str, out: str) -> list[str]:
    """The module and the options of a stage's job.

    Args:
        plain: where the undisturbed outputs lie, its inputs. out: where its own is to lie.
    """
    training = [] if name in {"rollout", "evaluate"} else TRAINING
    return [*STAGES[name].words.format(plain=plain, out=out).split(), *training]


class Watch:
    """Sees what a stage writes, and when: each object each time that it is written."""

    def __init__(self, cluster: Cluster, stage: Stage, out: str) -> None:
        self.cluster = cluster
        place, self.endings = stage.progress
        self.place = place.format(out=out)
        self.seen: dict[tuple[str, float], float] = {}
        self.before = set(self._objects())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def until(self, moment: float) -> list[str]:
        """The names of what was written by then."""
        return [name for (name, _), seen in self.seen.items() if seen <= moment]

    def next_after(self, moment: float) -> float | None:
        """Seconds from then to what was written next."""
        return min((seen - moment for seen in self.seen.values() if seen > moment), default=None)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            now = time.time()
            for written in self._objects():
                if written not in self.before:
                    self.seen.setdefault(written, now)

    def _objects(self) -> list[tuple[str, float]]:
        return [pair for pair in self.cluster.objects(self.place).items() if pair[0].endswith(self.endings)]


@contextmanager
def watching(cluster: Cluster, stage: Stage, out: str) -> Iterator[Watch]:
    """A watch for the block."""
    watch = Watch(cluster, stage, out)
    try:
        yield watch
    finally:
        watch.close()


class Outcome(NamedTuple):
    """What a fault did to a stage."""

    fault: str
    stage: str
    ended: str  # "by itself" or "resubmitted"
    seconds: float  # of all
    undisturbed: float  # seconds of the same without a fault
    next_seconds: float | None  # from the fault to the next shard, checkpoint or chunk
    lost: str
    difference: float  # of the result from the undisturbed one
    statuses: tuple[str, ...]  # of the runs in MLflow when it was over, the stage's own first
    stopped: tuple[str, ...]  # the same between stop and resubmission


def lose_machine(cluster: Cluster, job: Submission) -> None:
    """Every process of the worker's machine is killed and its network is gone; a fresh machine takes its place."""
    cluster.lose_worker()
    cluster.replace_worker()


def lose_machine_for_good(cluster: Cluster, job: Submission) -> None:
    """The same without a replacement; the head is left."""
    cluster.lose_worker()


def replace_machine_late(cluster: Cluster, job: Submission) -> None:
    """The same with a replacement after longer than Ray Train waits for room."""
    cluster.lose_worker()
    time.sleep(LATE_SECONDS)
    cluster.replace_worker()


def kill_raylet(cluster: Cluster, job: Submission) -> None:
    """SIGKILL to the worker's raylet; Ray is started again on the same machine."""
    assert cluster.worker.kill(lambda name, _: name == "raylet") == 1
    time.sleep(5)
    cluster.start_worker()


def kill_driver(cluster: Cluster, job: Submission) -> None:
    """SIGKILL to the job's own process on the head."""
    job.kill_driver()
    assert job.wait() != 0, job.output()


def stop_job(cluster: Cluster, job: Submission) -> None:
    """`ray job stop`; that is no failure to `ray job submit`."""
    job.stop()
    job.wait()


def cut_network(cluster: Cluster, job: Submission) -> None:
    """The worker's cable is out for a while; if Ray has given the node up by then, it is started again there."""
    cluster.network.cut(cluster.worker)
    time.sleep(CUT_SECONDS)
    cluster.network.mend(cluster.worker)
    deadline = time.monotonic() + NOTICE_SECONDS
    while time.monotonic() < deadline and not job.is_over():
        if not any(process.name() == "raylet" for process in cluster.worker.processes()):
            cluster.replace_worker()
            return
        time.sleep(1)


def lose_head(cluster: Cluster, job: Submission) -> None:
    """The head's machine goes, and the cluster with it; a new cluster takes its place."""
    cluster.head.lose()
    with contextlib.suppress(Exception):
        job.wait(120)
    cluster.head.boot()
    cluster.start_head()
    cluster.replace_worker()


FAULTS: dict[str, Callable[[Cluster, Submission], None]] = {
    "machine": lose_machine,
    "for-good": lose_machine_for_good,
    "late": replace_machine_late,
    "raylet": kill_raylet,
    "cut": cut_network,
    "driver": kill_driver,
    "stop": stop_job,
    "head": lose_head,
}


class Trials:
    """Runs stages on a cluster, and remembers how long they took undisturbed."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.undisturbed: dict[str, float] = {}
        self.expected: dict[str, Path] = {}

    def command(self, name: str, out: str) -> list[str]:
        """The words of a stage's job."""
        return words_of(name, self.cluster.path(PLAIN), self.cluster.path(out))

    def run_plain(self, name: str) -> None:
        """The stage undisturbed, and what it reads, unless that has been done."""
        if name in self.undisturbed:
            return
        for needed in STAGES:
            if f"{{plain}}/{needed}" in STAGES[name].words:
                self.run_plain(needed)
        out = f"{PLAIN}/{name}"
        job = self.cluster.submit(*self.command(name, out))
        job.finish()
        self.undisturbed[name] = time.time() - job.started
        self.expected[name] = self.cluster.download(out, self.folder / out)

    def mend(self) -> None:
        """Two nodes that answer and no job, whatever there was before."""
        for machine in (self.cluster.head, self.cluster.worker):
            machine.lose()
        self.cluster.head.boot()
        self.cluster.start_head()
        self.cluster.replace_worker()

    def run(self, fault: str, name: str, out: str = "") -> Outcome:
        """The stage with a fault in its middle, to its end: by itself, or by the same command again.

        Args:
            out: where its output is to lie in the bucket; by default below the name of the fault.
        """
        cluster, stage, out = self.cluster, STAGES[name], out or f"{fault}/{name}"
        if name == "evaluate":  # what is drawn is kept
            cluster.remove("cache/samples")
            cluster.remove("cache/features")
        words = self.command(name, out)
        with watching(cluster, stage, out) as watch:
            job = cluster.submit(*words)
            wait_until(lambda: len(watch.seen) >= stage.middle, job)
            moment = time.time()
            FAULTS[fault](cluster, job)
            stopped: tuple[str, ...] = ()
            if ended_by_itself := fault not in {"driver", "stop", "head"}:
                output = job.finish()
            else:
                stopped = self.statuses(out)
                output = cluster.submit(*words).finish()
            seconds = time.time() - job.started
        if fault in {"for-good", "cut"}:  # a raylet that was cut off may yet end itself
            cluster.replace_worker()
        found = cluster.download(out, self.folder / out)
        return Outcome(
            fault,
            name,
            "by itself" if ended_by_itself else "resubmitted",
            round(seconds, 1),
            round(self.undisturbed.get(name, 0.0), 1),
            None if (after := watch.next_after(moment)) is None else round(after, 1),
            self.lost(name, out, watch, moment, output),
            stage.difference(found, self.expected[name]),
            self.statuses(out),
            stopped,
        )

    def statuses(self, out: str) -> tuple[str, ...]:
        """Of the runs of an output in MLflow and of those nested in them, the first one's first."""
        runs = sorted(self.cluster.runs(out), key=lambda run: run.info.start_time)
        return tuple(run.info.status for run in runs)

    def students(self, out: str) -> list[str]:
        """The outputs of the runs of ``distill`` below an output, with as many of each as MLflow has."""
        runs = [run for run in self.cluster.runs(out) if run.data.tags[tracking.STAGE_TAG] == "distill"]
        return sorted(run.data.params["out"].rsplit("/", 1)[-1] for run in runs)

    def lost(self, name: str, out: str, watch: Watch, moment: float, output: str) -> str:
        """What was done again, in words."""
        before = watch.until(moment)
        if name in {"rollout", "evaluate"}:
            kind = "shards" if name == "rollout" else "chunks"
            written = [written for written, _ in watch.seen]
            again = len(written) - len(set(written))
            return f"{len(before)} of {len(set(written))} {kind} were there, {again} of them written again"
        repeated = 0
        for run in self.cluster.runs(out):
            logged = [point.step for point in self.cluster.history(run.info.run_id, "loss")]
            times = [point.timestamp / 1000 for point in self.cluster.history(run.info.run_id, "loss")]
            reached = max((step for step, when in zip(logged, times, strict=True) if when <= moment), default=0)
            folder = str(run.data.params.get("out", "")).removeprefix(self.cluster.path(out)).lstrip("/")
            saved = sum(1 for written in before if written.startswith(folder)) * CHECKPOINT_UPDATES
            repeated += max(0, reached - saved)
        return f"{repeated} updates were done again"


def show(outcomes: list[Outcome]) -> str:
    """The table, in Markdown."""
    head = ["fault", "stage", "ended", "undisturbed", "seconds", "next", "lost", "difference", "runs", "after stop"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in outcomes:
        cells: list[Any] = [one.fault, one.stage, one.ended, f"{one.undisturbed:.0f}", f"{one.seconds:.0f}"]
        cells += [one.next_seconds, one.lost, f"{one.difference:.1e}", " ".join(one.statuses), " ".join(one.stopped)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
