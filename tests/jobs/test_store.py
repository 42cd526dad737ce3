"""`python -m jobs.store`: commands, positional stores and flags."""

import sys
from typing import Any

import pytest

from jobs import command, store
from pipeline.store.describe import DescribeSpec
from pipeline.store.merge import MergeSpec
from pipeline.store.verify import VerifySpec


@pytest.fixture
def run_job(monkeypatch: pytest.MonkeyPatch):
    """Run the job without its stages; return the exit code and the spec."""

    def run(*words: str) -> tuple[int, Any]:
        seen: list[Any] = []
        commands = {name: (spec_type, seen.append) for name, (spec_type, _) in store.COMMANDS.items()}
        monkeypatch.setattr(sys, "argv", ["store", *words])
        try:
            command.main_of(commands, "python -m jobs.store", "Manage stores.")
        except SystemExit as stop:
            return int(stop.code or 0), None
        return 0, seen[0] if seen else None

    return run


@pytest.mark.parametrize(
    ("words", "spec"),
    [
        ("describe s", DescribeSpec(store="s")),
        ("describe s --json", DescribeSpec(store="s", as_json=True)),
        ("describe --json s", DescribeSpec(store="s", as_json=True)),
        ("verify s", VerifySpec(store="s")),
        ("verify s --repair", VerifySpec(store="s", repair=True)),
        ("verify --repair s", VerifySpec(store="s", repair=True)),
        ("merge a --into b", MergeSpec(stores=("a",), into="b")),
        ("merge a b c --into d", MergeSpec(stores=("a", "b", "c"), into="d")),
        ("merge --into d a b", MergeSpec(stores=("a", "b"), into="d")),
        ("merge --into=d a b", MergeSpec(stores=("a", "b"), into="d")),
    ],
)
def test_a_command_gets_its_stores_and_flags(words: str, spec: Any, run_job):
    assert run_job(*words.split()) == (0, spec)


def test_a_store_can_come_from_a_file(tmp_path, run_job):
    file = tmp_path / "verify.yaml"
    file.write_text("{store: s, repair: true}")
    assert run_job("verify", "--config", str(file)) == (0, VerifySpec(store="s", repair=True))
    assert run_job("verify", "t", "--config", str(file)) == (0, VerifySpec(store="t", repair=True))


@pytest.mark.parametrize(
    ("words", "prog", "problem"),
    [
        ("", "", "command"),
        ("destroy s", "", "destroy"),
        ("--json", "", "--json"),
        ("verify", " verify", "STORE"),
        ("verify --repair", " verify", "STORE"),
        ("verify s --mend", " verify", "--mend"),
        ("verify s --repair t", " verify", "'t'"),
        ("describe s t", " describe", "'t'"),
        ("merge --into d", " merge", "STORES"),
        ("merge a", " merge", "--into"),
        ("merge a --into", " merge", "--into"),
    ],
)
def test_a_wrong_command_prints_one_line_and_exits_with_2(
    words: str, prog: str, problem: str, run_job, capfd: pytest.CaptureFixture
):
    assert run_job(*words.split()) == (2, None)
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"python -m jobs.store{prog}: error: ")
    assert problem in line


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_the_help_describes_the_commands(word: str, run_job, capsys: pytest.CaptureFixture):
    assert run_job(word) == (0, None)
    out = capsys.readouterr().out
    for name, spec_type in (("describe", DescribeSpec), ("verify", VerifySpec), ("merge", MergeSpec)):
        assert f"  {name:8}  {spec_type.__doc__}" in out.splitlines()


def test_the_help_of_a_command_shows_a_flag_without_a_value(run_job, capsys: pytest.CaptureFixture):
    assert run_job("verify", "--help") == (0, None)
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m jobs.store verify [-h] STORE ")
    assert "--repair" in out.partition("options")[2]
    assert "{True,False}" not in out
