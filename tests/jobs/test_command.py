"""A job: its name, its exit code, and one line for every error."""

import contextlib
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
from pipeline.config.specs import SampleSpec

JOBS = [
    *("teach", "convert", "rollout", "distill", "sweep", "evaluate", "study", "sample"),
    *("quickstart", "benchmark", "store", "runs", "cluster"),
]
WORDS = ["--model", "m", "--out", "o.png"]


def end_of(stage, *words: str) -> int:
    """The exit code of a job with this stage."""
    try:
        command.main(SampleSpec, stage, arguments=[*words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def raising(error: BaseException):
    def stage(spec: SampleSpec) -> None:
        raise error

    return stage


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["jobs.rollout", "--teacher", "no/such", "--store", "s"], 1, "no/such: expected a model folder"),
        (["jobs.distill", "--store", "no/such", "--out", "o"], 1, "no/such: expected an endpoint store, found none"),
        (["jobs.rollout", "--knots", "0", "--teacher", "t", "--store", "s"], 2, "--knots: input should be greater"),
        (["jobs.teach", "--out", "/dev/null/teacher"], 1, "/dev/null/teacher: expected a place that can be written"),
        (["jobs.sample", "--model", "m", "--out", "x.gif"], 1, "--out: expected a .png or .npz file"),
        (["jobs.evaluate", "--teacher", "no/such", "--out"], 2, "--out: expected a value, found none"),
        (["jobs.sweep", "--store", "s"], 2, "--out: expected a value, found none"),
        (["jobs.store", "merge", "no/such", "--into", "s"], 1, "no/such: expected an endpoint store, found none"),
    ],
)
def test_a_job_ends_with_one_line_and_a_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, project_root: Path
):
    arguments = [str(tmp_path / part) if part == "no/such" else part for part in arguments]
    ended = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=project_root, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"python -m {arguments[0]}")
    assert f": error: {message}" in line.replace(f"{tmp_path}/", "")
    assert all(line.startswith("teach: digits: ") for line in ended.stdout.splitlines())


def test_the_stage_gets_the_spec_and_its_end_is_code_0():
    seen = []
    assert end_of(seen.append, *WORDS, "--count", "3") == 0
    assert seen == [SampleSpec(model="m", out="o.png", count=3)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DistillKacError("m: expected\n  a model, found none"), 1, "m: expected a model, found none"),
        (FileNotFoundError(2, "No such file", "m"), 1, "[Errno 2] No such file: 'm'"),
        (OSError(), 1, "OSError"),
        (DistillKacError("long " * 200), 1, ("long " * 200).strip()),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on"),
    ],
    ids=str,
)
def test_an_error_of_the_stage_is_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture):
    assert end_of(raising(error), *WORDS) == code
    assert capsys.readouterr() == ("", f"python -m jobs.sample: error: {line}\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        end_of(raising(ZeroDivisionError()), *WORDS)


def test_an_error_of_the_options_has_another_code_and_runs_nothing(capsys: pytest.CaptureFixture):
    assert end_of(raising(AssertionError()), *WORDS, "--count", "0") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m jobs.sample: error: --count: input should be greater than 0")


@pytest.mark.parametrize("job", JOBS)
def test_every_job_says_how_it_is_called(job: str, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    monkeypatch.delitem(sys.modules, f"jobs.{job}", raising=False)
    with contextlib.suppress(SystemExit):
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: python -m jobs.{job} ")
    assert err == ""


def test_every_job_is_tested(project_root: Path):
    modules = {path.stem for path in (project_root / "jobs").glob("*.py")}
    assert modules - {"__init__", "command", "config_files", "parsing"} == set(JOBS)


def test_a_job_that_is_told_to_stop_closes_what_is_open():
    """As by ``ray job stop``: the stage sees an exception, and the job ends with the code of a terminated program."""
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
        assert end_of(stage, *WORDS) == 143
        assert end_of(waiting_for_ray, *WORDS) == 143
        assert end_of(raising(SystemExit(15)), *WORDS) == 143, "by the handler that Ray puts in the place of ours"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert closed == ["m", "m"]


def test_sync_tracking_is_an_option_of_every_job(monkeypatch: pytest.MonkeyPatch):
    from pipeline import tracking

    asked: list[str] = []
    monkeypatch.setattr(tracking, "sync", lambda uri: (asked.append(uri), (3, 0))[1])
    seen: list[SampleSpec] = []
    assert end_of(seen.append, "--sync-tracking") == 0
    assert (len(asked), seen) == (1, []), "with nothing else that is all"
    assert end_of(seen.append, *WORDS, "--sync-tracking") == 0
    assert (len(asked), len(seen)) == (2, 1)
    monkeypatch.setattr(tracking, "sync", lambda uri: (0, 2))
    assert end_of(seen.append, "--sync-tracking") == 1
    assert end_of(seen.append, *WORDS, "--sync-tracking") == 0, "what still waits holds up no job"
