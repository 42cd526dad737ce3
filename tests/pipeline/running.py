"""Run rollouts as processes that a test can kill, and read their output and child processes."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline.config import RolloutSpec

ROOT = Path(__file__).parents[2]
SHARDS, TRAJECTORIES = 20, 620
"""Totals of ``spec_of`` over its two guidance scales."""

WAIT_SECONDS = 300.0


def spec_of(teacher: str, store: str, **options: object) -> RolloutSpec:
    """Return the spec of a quick rollout with enough shards to inject a fault in the middle."""
    defaults = {
        "trajectories": 310,  # the last shard of each guidance scale is short
        "shard_size": 32,
        "guidance": (0.0, 1.0),
        "knots": 4,
        "solver_steps": 40,
        "batch_size": 16,
        "actors": 2,
    }
    return RolloutSpec(teacher=teacher, store=store, **{**defaults, **options})


def command_line(spec: RolloutSpec) -> list[str]:
    """Return the options of `python -m jobs.rollout` for this spec."""
    words: list[str] = []
    for name, value in spec.model_dump(mode="json", exclude_defaults=True).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


class Job:
    """A job in its own process, on the cluster at ``address`` or with an embedded Ray."""

    def __init__(self, module: list[str], spec: RolloutSpec, address: str | None, log: Path | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        if address:
            environment["RAY_ADDRESS"] = address
        self.log = log or Path(f"{spec.store}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module, *command_line(spec)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text()

    def started(self) -> list[psutil.Process]:
        """Return the child processes of the driver: an embedded Ray and its workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self) -> str:
        """Wait until the job succeeds, and return its output."""
        assert self.process.wait(timeout=WAIT_SECONDS) == 0, self.output()
        return self.output()

    def kill_driver(self) -> None:
        """Kill only the driver, and wait until its embedded Ray has ended too."""
        started = self.started()
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(started, timeout=60)
        for process in left:
            process.kill()


@contextmanager
def running_job(module: list[str], spec: RolloutSpec, address: str | None, log: Path | None = None) -> Iterator[Job]:
    """Run a job until the end of the block. Its output goes to ``log``, or to a file next to a local store."""
    job = Job(module, spec, address, log)
    try:
        yield job
    finally:
        if not job.is_over():
            job.kill_driver()


def named(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Return the Ray worker processes whose actor of this class has finished its constructor."""
    matching = []
    for process in processes:
        try:
            title = process.name()
        except psutil.Error:  # the process has ended
            continue
        if name in title and "__init__" not in title:
            matching.append(process)
    return matching


def end(pid: int) -> None:
    """Kill a process if it still runs."""
    try:
        process = psutil.Process(pid)
        process.kill()
        process.wait(30)
    except psutil.NoSuchProcess:
        pass


class Summary:
    """The counts in the last line that a rollout prints."""

    def __init__(self, output: str) -> None:
        counts = r"([\d,]+) trajectories computed in ([\d,]+) shards, ([\d,]+) reused in ([\d,]+) shards"
        match = re.search(counts, output)
        assert match, output
        numbers = [int(text.replace(",", "")) for text in match.groups()]
        self.computed, self.computed_shards, self.reused, self.reused_shards = numbers
