"""A stage whose output is inside an input, or that gets a file instead of a folder, fails before it writes anything."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kac.data import DataConfig
from kac.model import save_model, teacher_config
from kac.networks import MLPConfig, build_network
from kac.path import PathConfig
from kac.util.errors import ArgumentError
from pipeline.benchmark import BenchmarkSpec, benchmark
from pipeline.config import EvaluateSpec, StudySpec, SweepSpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import rollout
from pipeline.study import study
from pipeline.sweep import sweep
from tests.pipeline.stages import distill_spec
from tests.pipeline.stores import make_spec, make_store


@pytest.mark.parametrize(
    ("job", "arguments", "options"),
    [
        ("teach", "--data folder --data.root in --out in/out", ("--out", "--data.root")),
        ("convert", "--data moons --checkpoint in/w.pt --out in", ("--out", "--checkpoint")),
        ("convert", "--data folder --data.root in --checkpoint w.pt --out in", ("--out", "--data.root")),
        ("rollout", "--teacher in --store in/store", ("--store", "--teacher")),
        ("distill", "--store in --out in/student", ("--out", "--store")),
        ("distill", "--store s --teacher in --out in/student", ("--out", "--teacher")),
        ("distill", "--store s --init in --out in", ("--out", "--init")),
        ("sweep", "--store in/store --out in", ("--out", "--store")),
        ("sweep", "--store s --features in/net.pt --out in", ("--out", "--features")),
        ("evaluate", "--teacher in --out in/evaluation", ("--out", "--teacher")),
        ("evaluate", "--teacher t --students s in --out in/evaluation", ("--out", "--students")),
        ("evaluate", "--teacher t --features pixels in/net.ts --out in", ("--out", "--features")),
        ("evaluate", "--from-sweep in --out in/front", ("--out", "--from-sweep")),
        ("study", "--teacher t --rivals x in --out in", ("--out", "--rivals")),
        ("study", "--teacher t --students in --out in/x", ("--out", "--students")),
        ("study", "--teacher t --store in --out in/x", ("--out", "--store")),
        ("sample", "--model in --out in/sheet.png", ("--out", "--model")),
        ("export", "--model in --out in/export", ("--out", "--model")),
        ("export", "--model m --evaluation in --out in", ("--out", "--evaluation")),
        ("store", "merge in/a in/b --into in", ("--into", "--stores")),
        ("benchmark", "--teacher in --json in/figures.json", ("--json", "--teacher")),
    ],
)
def test_a_job_refuses_an_output_in_its_input_in_one_line(
    job: str,
    arguments: str,
    options: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["job", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2, line
    assert f"error: {options[0]} " in line, line
    assert f" {options[1]} " in line, line
    assert list(tmp_path.rglob("*")) == [tmp_path / "in"]


@pytest.mark.parametrize(
    ("job", "arguments", "option"),
    [
        ("teach", "--config folder --data moons --out o", "--config folder is a folder"),
        ("teach", "--config file/x.yaml --data moons --out o", "--config file/x.yaml"),
        ("teach", "--data parquet --data.root file/x --out o", "--data.root"),
        ("teach", "--data moons --out file", "--out"),
        ("convert", "--data moons --checkpoint w.pt --out file/x", "--out"),
        ("rollout", "--teacher file --store s", "--teacher"),
        ("rollout", "--teacher t --store file", "--store"),
        ("distill", "--store file --out o", "--store"),
        ("distill", "--store s --init file --out o", "--init"),
        ("sweep", "--store s --teacher file --out o", "--teacher"),
        ("evaluate", "--teacher t --students file --out o", "--students"),
        ("evaluate", "--from-sweep file --out o", "--from-sweep"),
        ("evaluate", "--teacher t --features folder.pt --out o", "--features"),
        ("study", "--teacher t --rivals file --out o", "--rivals"),
        ("sample", "--model file --out o.png", "--model"),
        ("sample", "--model m --out folder.png", "--out"),
        ("export", "--model file --out o", "--model"),
        ("quickstart", "--out file", "--out"),
        ("store", "merge file --into o", "--stores"),
        ("store", "verify file", "--store"),
        ("store", "describe file", "--store"),
        ("benchmark", "--json folder", "--json"),
    ],
)
def test_a_job_names_a_path_of_the_wrong_kind_in_one_line(
    job: str,
    arguments: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name in ("folder", "folder.pt", "folder.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["job", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code in {1, 2}, line
    assert f"error: {option}" in line, line
    assert "[Errno" not in line, line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of twelve images in two classes."""
    root = tmp_path_factory.mktemp("data") / "images"
    for number in range(12):
        path = root / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def models(images: Path, tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> tuple[str, str]:
    """A teacher of these images, and its store."""
    folder = tmp_path_factory.mktemp("models")
    teacher, store = str(folder / "teacher"), str(folder / "store")
    config = teacher_config(MLPConfig(width=8, depth=1), PathConfig(), DataConfig(kind="folder", root=str(images)))
    network = build_network(config.network, config.sample_shape, config.num_classes)
    save_model(teacher, config, network.state_dict())
    make_store(store, teacher, trajectories=32)
    return teacher, store


STAGES: dict[str, Callable[[str, str, Path], object]] = {
    "rollout": lambda teacher, store, out: rollout(make_spec(out, teacher)),
    "distill": lambda teacher, store, out: distill(distill_spec(store, out)),
    "sweep": lambda teacher, store, out: sweep(SweepSpec(store=store, out=str(out))),
    "evaluate": lambda teacher, store, out: evaluate(EvaluateSpec(teacher=teacher, out=str(out), actors=0)),
    "study": lambda teacher, store, out: study(StudySpec(teacher=teacher, out=str(out))),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_data_of_the_teacher_is_an_input_too(stage: str, images: Path, models: tuple[str, str]):
    before = sorted(images.rglob("*"))
    message = rf"^`\w+` {images}/new\S* is inside `data\.root` of the teacher {images}\b"
    with pytest.raises(ArgumentError, match=message):
        STAGES[stage](*models, images / "new")
    assert sorted(images.rglob("*")) == before


@pytest.mark.parametrize("stage", ["distill", "sweep"])
def test_the_teacher_of_a_store_is_an_input(stage: str, models: tuple[str, str]):
    teacher, store = models
    with pytest.raises(ArgumentError, match=rf"^`out` {teacher}/new\S* is inside the teacher of the store {teacher}\b"):
        STAGES[stage](teacher, store, Path(teacher) / "new")
    assert not (Path(teacher) / "new").exists()


def test_the_scratch_folder_of_a_benchmark_is_apart_from_the_teacher(models: tuple[str, str], ray_cluster: None):
    with pytest.raises(ArgumentError, match=r"^`folder` .* is inside `teacher` "):
        benchmark(BenchmarkSpec(teacher=models[0], folder=models[0]))
