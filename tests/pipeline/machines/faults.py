"""Inject faults into running stages, and compare time and results with undisturbed runs."""

import contextlib
import json
import re
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
"""Path in the bucket for the outputs of undisturbed runs. All other outputs are below the name of their fault."""

CHECKPOINT_UPDATES = 50
CUT_SECONDS = 30.0
LATE_SECONDS = 100.0
DRAIN_SECONDS = 30
NOTICE_SECONDS = 90.0
"""A raylet that Ray has declared dead ends itself within this time after the network is back."""
TRAINING = f"--optimizer.batch-size 64 --validation-updates 0 --checkpoint-updates {CHECKPOINT_UPDATES}".split()


class Stage(NamedTuple):
    """A stage that runs long enough to inject a fault in the middle.

    Attributes:
        command: the job and its options; ``{plain}`` is the path of undisturbed outputs, ``{out}`` of its own output.
        progress: path, containing ``{out}``, and name endings of the files that the stage writes while it runs.
        middle: number of these files at which the fault is injected.
        difference: compares the downloaded output with the undisturbed one; fails if parts that must be equal differ.
    """

    command: str
    progress: tuple[str, tuple[str, ...]]
    middle: int
    difference: Callable[[Path, Path], float]


def weights_difference(found: Path, expected: Path) -> float:
    """Return the largest difference of any weight between the models in both folders."""
    names = sorted(path.relative_to(expected) for path in expected.rglob("model.safetensors"))
    assert names == sorted(path.relative_to(found) for path in found.rglob("model.safetensors"))
    assert names
    pairs = [(load_file(found / name), load_file(expected / name)) for name in names]
    return max(float(abs(first[key] - second[key]).max()) for first, second in pairs for key in second)


def store_difference(found: Path, expected: Path) -> float:
    """Return 0. Fail unless the rows agree within the tolerance of ``compare.py``."""
    assert_same_store(str(found), str(expected))
    return 0.0


def scores_difference(found: Path, expected: Path) -> float:
    """Return the largest difference of any metric except speeds, relative for values above 1."""
    tables = [json.loads((folder / "evaluation.json").read_text())["scores"] for folder in (found, expected)]
    largest = 0.0
    for row, expected_row in zip(*tables, strict=True):
        assert row["name"] == expected_row["name"]
        for name, value in expected_row["metrics"].items():
            if "per_second" not in name:
                largest = max(largest, abs(row["metrics"][name] - value) / max(abs(value), 1.0))
    return largest


CHECKPOINTS = ("state.pt",)

STAGES = {
    "teach": Stage(
        "jobs.teach --data digits --network.width 64 --network.depth 1 --workers 2 --optimizer.updates 400 --out {out}",
        ("{out}/training", CHECKPOINTS),
        2,
        weights_difference,
    ),
    "rollout": Stage(
        "jobs.rollout --teacher {plain}/teach --trajectories 4096 --shard-size 32 --actors 2 --store {out}",
        ("{out}/data", (".parquet",)),
        16,
        store_difference,
    ),
    "distill": Stage(
        "jobs.distill --store {plain}/rollout --steps 4 --workers 2 --optimizer.updates 400 --out {out}",
        ("{out}/training", CHECKPOINTS),
        2,
        weights_difference,
    ),
    "elastic": Stage(
        "jobs.distill --store {plain}/rollout --steps 4 --workers 1:2 --optimizer.updates 400 --out {out}",
        ("{out}/training", CHECKPOINTS),
        2,
        weights_difference,
    ),
    "sweep": Stage(
        "jobs.sweep --store {plain}/rollout --grid steps=1,4 --optimizer.updates 400 --samples 1000 --out {out}",
        ("{out}", CHECKPOINTS),
        3,
        weights_difference,
    ),
    "evaluate": Stage(
        "jobs.evaluate --teacher {plain}/teach --students {plain}/sweep --samples 8000 --actors 2 --out {out}",
        ("cache/samples", (".npz",)),
        3,
        scores_difference,
    ),
}
"""Each stage is listed after the stages that make its inputs."""


def command_of(name: str, plain: str, out: str) -> list[str]:
    """Return the module and the options of a stage's job.

    Args:
        name: name of the stage.
        plain: path of the undisturbed outputs, which are its inputs.
        out: path of its own output.
    """
    training = [] if name in {"rollout", "evaluate"} else TRAINING
    return [*STAGES[name].command.format(plain=plain, out=out).split(), *training]


class Watch:
    """Records when a stage writes each object, including rewrites."""

    def __init__(self, cluster: Cluster, stage: Stage, out: str) -> None:
        self.cluster = cluster
        path, self.endings = stage.progress
        self.path = path.format(out=out)
        self.seen: dict[tuple[str, float], float] = {}
        self.before = set(self._objects())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def until(self, moment: float) -> list[str]:
        """Return the names of the objects that were written before ``moment``, once per write."""
        return [name for (name, _), seen in self.seen.items() if seen <= moment]

    def next_after(self, moment: float) -> float | None:
        """Return the seconds from ``moment`` to the next write, or None if nothing was written."""
        return min((seen - moment for seen in self.seen.values() if seen > moment), default=None)

    def close(self) -> None:
        """Stop recording."""
        self._ended.set()
        self._thread.join()

    def _record(self) -> None:
        while not self._ended.wait(0.2):
            now = time.time()
            for written in self._objects():
                if written not in self.before:
                    self.seen.setdefault(written, now)

    def _objects(self) -> list[tuple[str, float]]:
        return [pair for pair in self.cluster.objects(self.path).items() if pair[0].endswith(self.endings)]


@contextmanager
def watching(cluster: Cluster, stage: Stage, out: str) -> Iterator[Watch]:
    """Record the writes of a stage during the block."""
    watch = Watch(cluster, stage, out)
    try:
        yield watch
    finally:
        watch.close()


class Outcome(NamedTuple):
    """The effects of a fault on a stage."""

    fault: str
    stage: str
    ended: str  # "by itself" or "resubmitted"
    seconds: float  # in total
    undisturbed: float  # seconds without a fault
    next_seconds: float | None  # from the fault to the next shard, checkpoint or chunk
    lost: str
    difference: float  # between the result and that of the undisturbed run
    statuses: tuple[str, ...]  # of the runs in MLflow at the end, the stage's own first
    stopped: tuple[str, ...]  # of the runs between stop and resubmission


def lose_machine(cluster: Cluster, job: Submission) -> None:
    """Stop the worker's machine without notice, and replace it with a fresh machine."""
    cluster.lose_worker()
    cluster.replace_worker()


def lose_machine_for_good(cluster: Cluster, job: Submission) -> None:
    """Stop the worker's machine without notice; only the head remains."""
    cluster.lose_worker()


def replace_machine_late(cluster: Cluster, job: Submission) -> None:
    """Stop the worker's machine without notice, and replace it after Ray Train has stopped waiting for resources."""
    cluster.lose_worker()
    time.sleep(LATE_SECONDS)
    cluster.replace_worker()


def drain_machine(cluster: Cluster, job: Submission) -> None:
    """Announce that the worker's machine will be taken away. Then stop it, and replace it with a fresh machine."""
    cluster.drain_worker(DRAIN_SECONDS)
    time.sleep(DRAIN_SECONDS)
    lose_machine(cluster, job)


def kill_raylet(cluster: Cluster, job: Submission) -> None:
    """Send SIGKILL to the worker's raylet, and start Ray again on the same machine."""
    assert cluster.worker.kill(lambda name, _: name == "raylet") == 1
    time.sleep(5)
    cluster.start_worker()


def kill_driver(cluster: Cluster, job: Submission) -> None:
    """Send SIGKILL to the driver on the head."""
    job.kill_driver()
    assert job.wait() != 0, job.output()


def stop_job(cluster: Cluster, job: Submission) -> None:
    """Stop the job with `ray job stop`, after which `ray job submit` may exit with 0."""
    job.stop()
    job.wait()


def cut_network(cluster: Cluster, job: Submission) -> None:
    """Disconnect the worker for a while. If Ray has declared the node dead by then, replace the machine."""
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
    """Stop the head's machine without notice, and start a new cluster."""
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
    "drain": drain_machine,
    "raylet": kill_raylet,
    "cut": cut_network,
    "driver": kill_driver,
    "stop": stop_job,
    "head": lose_head,
}


class Trials:
    """Runs stages on a cluster, with and without faults, and keeps the undisturbed times and outputs."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.undisturbed: dict[str, float] = {}
        self.expected: dict[str, Path] = {}

    def command(self, name: str, out: str) -> list[str]:
        """Return the module and the options of a stage's job, for paths in the bucket."""
        return command_of(name, self.cluster.path(PLAIN), self.cluster.path(out))

    def run_plain(self, name: str) -> None:
        """Run a stage, and the stages that make its inputs, without a fault. Skip stages that have run."""
        if name in self.undisturbed:
            return
        for needed in STAGES:
            if f"{{plain}}/{needed}" in STAGES[name].command:
                self.run_plain(needed)
        out = f"{PLAIN}/{name}"
        job = self.cluster.submit(*self.command(name, out))
        job.finish()
        self.undisturbed[name] = time.time() - job.started
        self.expected[name] = self.cluster.download(out, self.folder / out)

    def mend(self) -> None:
        """Restart the cluster, with two nodes and no jobs."""
        for machine in (self.cluster.head, self.cluster.worker):
            machine.lose()
        self.cluster.head.boot()
        self.cluster.start_head()
        self.cluster.replace_worker()

    def run(self, fault: str, name: str, out: str = "") -> Outcome:
        """Run a stage with a fault in the middle. If the job does not survive the fault, submit the same command again.

        Args:
            fault: key of ``FAULTS``.
            name: key of ``STAGES``.
            out: path of the output in the bucket; default: below the name of the fault.
        """
        cluster, stage, out = self.cluster, STAGES[name], out or f"{fault}/{name}"
        if name == "evaluate":  # otherwise it would reuse earlier samples
            cluster.remove("cache/samples")
            cluster.remove("cache/features")
        command = self.command(name, out)
        with watching(cluster, stage, out) as watch:
            job = cluster.submit(*command)
            wait_until(lambda: len(watch.seen) >= stage.middle, job)
            moment = time.time()
            FAULTS[fault](cluster, job)
            stopped: tuple[str, ...] = ()
            if ended_by_itself := fault not in {"driver", "stop", "head"}:
                output = job.finish()
            else:
                stopped = self.statuses(out)
                output = cluster.submit(*command).finish()
            seconds = time.time() - job.started
        if fault in {"for-good", "cut"}:  # a disconnected raylet may still end itself
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
        """Return the statuses of an output's runs in MLflow and of their nested runs, in order of start time."""
        runs = sorted(self.cluster.runs(out), key=lambda run: run.info.start_time)
        return tuple(run.info.status for run in runs)

    def students(self, out: str) -> list[str]:
        """Return the output folder names of all ``distill`` runs below an output, once per run."""
        runs = [run for run in self.cluster.runs(out) if run.data.tags[tracking.STAGE_TAG] == "distill"]
        return sorted(run.data.params["out"].rsplit("/", 1)[-1] for run in runs)

    def lost(self, name: str, out: str, watch: Watch, moment: float, output: str) -> str:
        """Describe the work that was repeated."""
        before = watch.until(moment)
        if name in {"rollout", "evaluate"}:
            kind = "shards" if name == "rollout" else "chunks"
            written = [written for written, _ in watch.seen]
            again = len(written) - len(set(written))
            return f"{len(before)} of {len(set(written))} {kind} were written before the fault, {again} were rewritten"
        if drained := re.search(r"after update (\d+); resuming", output):
            resumed = re.search(r"resuming after ([\d,]+) of", output)
            assert resumed, output
            return f"{int(drained[1]) - int(resumed[1].replace(',', ''))} updates were repeated"
        repeated = 0
        for run in self.cluster.runs(out):
            logged = [point.step for point in self.cluster.history(run.info.run_id, "loss")]
            times = [point.timestamp / 1000 for point in self.cluster.history(run.info.run_id, "loss")]
            reached = max((step for step, when in zip(logged, times, strict=True) if when <= moment), default=0)
            folder = str(run.data.params.get("out", "")).removeprefix(self.cluster.path(out)).lstrip("/")
            saved = sum(1 for written in before if written.startswith(folder)) * CHECKPOINT_UPDATES
            repeated += max(0, reached - saved)
        return f"{repeated} updates were repeated"


def format_table(outcomes: list[Outcome]) -> str:
    """Format the outcomes as a Markdown table."""
    head = ["fault", "stage", "ended", "undisturbed", "seconds", "next", "lost", "difference", "runs", "after stop"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for outcome in outcomes:
        seconds = [f"{outcome.undisturbed:.0f}", f"{outcome.seconds:.0f}", outcome.next_seconds]
        cells: list[Any] = [outcome.fault, outcome.stage, outcome.ended, *seconds, outcome.lost]
        cells += [f"{outcome.difference:.1e}", " ".join(outcome.statuses), " ".join(outcome.stopped)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
