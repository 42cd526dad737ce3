"""The command line: options, a YAML file, and one line for every error."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.command import parse
from kac.options import OptionError
from pipeline.config import DistillSpec, RolloutSpec, SweepSpec


def options(spec_type: type, text: str):
    return parse(spec_type, text.split(), "python -m jobs.test")


def test_options_reach_the_spec():
    spec = options(RolloutSpec, "--teacher t --store s --guidance 0 1.5 --knots 10 --solver heun")
    assert (spec.guidance, spec.knots, spec.solver) == ((0.0, 1.5), 10, "heun")


def test_a_file_gives_defaults_and_options_override_it(tmp_path: Path):
    file = tmp_path / "distill.yaml"
    file.write_text("store: here\nout: there\nsteps: 2\noptimizer: {learning-rate: 0.5}\n")
    spec = options(DistillSpec, f"--config {file} --steps 5 --optimizer.updates 7")
    assert (spec.store, spec.out, spec.steps) == ("here", "there", 5)
    assert (spec.optimizer.learning_rate, spec.optimizer.updates) == (0.5, 7)
    assert spec.optimizer.warmup_updates == DistillSpec(store="s", out="o").optimizer.warmup_updates


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--store s", "--teacher"),
        ("--teacher t --store s --knots 0", "--knots: input should be greater than 0, found 0"),
        ("--teacher t --store s --knots 7", "--solver-steps: expected a multiple of --knots 7, found 100"),
        (
            "--teacher t --store s --shard-size 3 --first-sample 4",
            "--first-sample: expected a multiple of --shard-size 3",
        ),
        ("--teacher t --store s --colour red", "--colour"),
        ("--teacher t --store s --solver rk4", "rk4"),
        ("--teacher t --store s --seed -1", "--seed"),
        ("--teacher t --store s --guidance nan", "--guidance"),
        ("--teacher t --store s --config no/such.yaml", "no/such.yaml"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(text: str, message: str):
    with pytest.raises(OptionError) as refusal:
        options(RolloutSpec, text)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("body", ["colour: red", "optimizer: {speed: 3}", "- a list", "steps: ["])
def test_a_bad_file_is_refused(tmp_path: Path, body: str):
    file = tmp_path / "sweep.yaml"
    file.write_text(body)
    with pytest.raises(OptionError, match="--config"):
        options(SweepSpec, f"--config {file} --store s --out o")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["jobs.rollout", "--teacher", "no/such", "--store", "s"], 1, "no/such: expected a model folder"),
        (["jobs.distill", "--store", "no/such", "--out", "o"], 1, "no/such: expected an endpoint store, found none"),
        (["jobs.rollout", "--knots", "0", "--teacher", "t", "--store", "s"], 2, "--knots"),
        (["jobs.teach", "--out", "/dev/null/teacher"], 1, "/dev/null/teacher: expected a place that can be written"),
        (["jobs.sample", "--model", "m", "--out", "x.gif"], 1, "expected a .png or .npz file"),
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
    assert len(ended.stderr.strip().splitlines()) == 1
    assert message in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("job", ["teach", "rollout", "distill", "sweep", "evaluate", "sample", "quickstart"])
def test_help_explains_every_option(job: str, project_root: Path):
    ended = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", "--help"], cwd=project_root, capture_output=True, text=True, check=True
    )
    assert "--config FILE.yaml" in ended.stdout
    assert "--out" in ended.stdout or "--store" in ended.stdout


def test_every_field_of_every_spec_has_a_description():
    from pydantic import BaseModel

    from pipeline import config

    specs = [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    missing = [
        f"{spec.__name__}.{name}"
        for spec in specs
        for name, field in spec.model_fields.items()
        if not field.description and field.annotation not in specs
    ]
    assert missing == []
