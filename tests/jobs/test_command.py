"""Jobs: names, exit codes, and one line per error."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import command
from kac.util.errors import DistillKacError
from pipeline.config import SampleSpec
from pipeline.tracking import delivery

JOBS = [
    *("teach", "convert", "rollout", "distill", "sweep", "evaluate", "study", "sample", "export"),
    *("quickstart", "benchmark", "store", "runs", "cluster"),
]
WORDS = ["--model", "m", "--out", "o.png"]


def exit_code(stage, *words: str) -> int:
    """Run a job with this stage and return its exit code."""
    try:
        command.main(SampleSpec, stage, arguments=[*words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def run_job(monkeypatch: pytest.MonkeyPatch):
    """Run the module of a job as ``python -m`` does, and return its exit code."""

    def run(module: str, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", [module, *words])
        monkeypatch.delitem(sys.modules, module, raising=False)
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def raising(error: BaseException):
    def stage(spec: SampleSpec) -> None:
        raise error

    return stage


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["jobs.rollout", "--teacher", "no/such", "--store", "s"], 1, "no/such"),
        (["jobs.distill", "--store", "no/such", "--out", "o"], 1, "no/such"),
        (["jobs.rollout", "--knots", "0", "--teacher", "t", "--store", "s"], 2, "--knots"),
        (["jobs.teach", "--out", "/dev/null/teacher"], 1, "/dev/null/teacher"),
        (["jobs.sample", "--model", "m", "--out", "x.gif"], 1, "--out x.gif"),
        (["jobs.evaluate", "--teacher", "no/such", "--out"], 2, "--out"),
        (["jobs.sweep", "--store", "s"], 2, "--out"),
        (["jobs.sweep", "--stage=teach", "--store", "s", "--out", "o"], 2, "--store"),
        (["jobs.sweep", "--stage", "teach", "--out", "o"], 1, "--grid"),
        (["jobs.sweep", "--stage", "paint", "--out", "o"], 2, "distill or teach"),
        (["jobs.sweep", "--out", "o", "--stage"], 2, "--stage"),
        (["jobs.store", "merge", "no/such", "--into", "s"], 1, "no/such"),
    ],
)
def test_a_job_fails_with_one_line_and_a_code(
    arguments: list[str], code: int, named: str, tmp_path: Path, run_job, capfd: pytest.CaptureFixture
):
    assert run_job(*(str(tmp_path / part) if part == "no/such" else part for part in arguments)) == code
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"python -m {arguments[0]}")
    assert ": error: " in line
    assert named in line.replace(f"{tmp_path}/", "")
    assert all(line.startswith("teach: digits: ") for line in out.splitlines())


def test_the_stage_gets_the_spec_and_success_is_code_0():
    seen = []
    assert exit_code(seen.append, *WORDS, "--count", "3") == 0
    assert seen == [SampleSpec(model="m", out="o.png", count=3)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DistillKacError("m holds\n  no model."), 1, "m holds no model."),
        (FileNotFoundError(2, "No such file", "m"), 1, "[Errno 2] No such file: 'm'"),
        (OSError(), 1, "OSError"),
        (DistillKacError("long " * 200), 1, ("long " * 200).strip()),
        (KeyboardInterrupt(), 130, "interrupted. Run the same command again to resume."),
    ],
    ids=str,
)
def test_an_error_of_the_stage_is_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture):
    assert exit_code(raising(error), *WORDS) == code
    assert capsys.readouterr() == ("", f"python -m jobs.sample: error: {line}\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()), *WORDS)


def test_an_invalid_option_has_a_different_code_and_runs_nothing(capsys: pytest.CaptureFixture):
    assert exit_code(raising(AssertionError()), *WORDS, "--count", "0") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m jobs.sample: error: --count is '0'")


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job: str, run_job, capsys: pytest.CaptureFixture):
    assert run_job(f"jobs.{job}", "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: python -m jobs.{job} ")
    assert err == ""


def test_the_help_of_a_job_with_commands_is_aligned(run_job, capsys: pytest.CaptureFixture):
    assert run_job("jobs.runs", "--help") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line[:14].split() for line in lines] == [["close-dead"], ["sync"]]


def test_help_into_a_closed_pipe_is_quiet(project_root: Path):
    """As in ``--help | head``, where ``head`` closes the pipe early."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jobs.rollout", "--help"]
    ended = subprocess.run(command, cwd=project_root, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_every_job_is_tested(project_root: Path):
    modules = {path.stem for path in (project_root / "jobs").glob("*.py")}
    assert modules - {"__init__", "command", "config_files", "parsing"} == set(JOBS)


def test_a_terminated_job_closes_its_resources():
    """SIGTERM, as sent by ``ray job stop``, raises an exception in the stage. The job exits with code 143."""
    closed = []

    def stage(spec: SampleSpec) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            closed.append(spec.model)

    def waiting_for_ray(spec: SampleSpec) -> None:
        try:
            stage(spec)
        except SystemExit:
            raise SystemExit(1) from None

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert exit_code(stage, *WORDS) == 143
        assert exit_code(waiting_for_ray, *WORDS) == 143
        assert exit_code(raising(SystemExit(15)), *WORDS) == 143, "Ray's handler, which replaces ours, exits with 15"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert closed == ["m", "m"]


def test_sync_tracking_is_an_option_of_every_job(monkeypatch: pytest.MonkeyPatch):
    waiting = 0

    def deliver(self: delivery.Delivery) -> tuple[int, int]:
        synced.append(self.uri)
        return 3, waiting

    synced: list[str] = []
    monkeypatch.setattr(delivery, "waiting_servers", set)
    monkeypatch.setattr(delivery.Delivery, "deliver_leftovers", deliver)
    seen: list[SampleSpec] = []
    assert exit_code(seen.append, "--sync-tracking") == 0
    assert (len(synced), seen) == (1, []), "without other options, the job only delivers entries"
    assert exit_code(seen.append, *WORDS, "--sync-tracking") == 0
    assert (len(synced), len(seen)) == (2, 1)
    waiting = 2
    assert exit_code(seen.append, "--sync-tracking") == 1
    assert exit_code(seen.append, *WORDS, "--sync-tracking") == 0, "undelivered entries do not stop a job"
