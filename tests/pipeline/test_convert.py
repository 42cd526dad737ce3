"""Converting existing weights to a teacher."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from jobs.parsing import parse
from kac.data import DataConfig, open_dataset
from kac.guidance import guide
from kac.model import load_config, load_model
from kac.networks import OutsideConfig, UNetConfig
from kac.solvers import knot_times, solve
from kac.util.errors import ArgumentError, DistillKacError
from pipeline.config import ConvertSpec, EvaluateSpec, OptimizerConfig, SampleSpec
from pipeline.convert import convert
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import rollout
from pipeline.sample import sample
from tests.kac.openai_unet import OpenAIUNet, randomised
from tests.kac.outside_modules import Field
from tests.pipeline.stages import distill_spec, run_of, runs_of
from tests.pipeline.stores import make_spec

UNET = UNetConfig(channels=(32, 64), blocks=1, attention=(4,), head_channels=32, time_scale=1.0)
DIGITS = (1, 8, 8)
FIELD = OutsideConfig(module="tests.kac.outside_modules:Field", time="data_at_1", arguments={"scale": 0.5})


def openai(classes: int | None = None, seed: int = 0) -> OpenAIUNet:
    options = (UNET.channels, UNET.blocks, UNET.attention, UNET.head_channels, UNET.scale_shift)
    return randomised(OpenAIUNet(*options, DIGITS, classes), seed)


@pytest.fixture
def field() -> Field:
    torch.manual_seed(0)
    return Field(scale=0.5).eval()


def spec(checkpoint: Path, out: Path, **options: Any) -> ConvertSpec:
    values = {"network": UNET, "data": "digits", "path": {"a": 4, "c": 2}, **options}
    return ConvertSpec(checkpoint=str(checkpoint), out=str(out), **values)


def outside(checkpoint: Path, out: Path, **options: Any) -> ConvertSpec:
    return spec(checkpoint, out, **{"network": FIELD, "data": "moons", **options})


def refusal(spec: ConvertSpec) -> str:
    with pytest.raises(DistillKacError) as error:
        convert(spec)
    message = str(error.value)
    assert "\n" not in message
    assert not Path(spec.out).exists(), "nothing is written"
    return message


# The model folder


def test_openais_unet_becomes_a_teacher_with_the_same_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    theirs = openai()
    torch.save(
        {"net_model": openai(seed=1).state_dict(), "ema_model": theirs.state_dict(), "step": 7}, tmp_path / "e.pt"
    )
    made = convert(spec(tmp_path / "e.pt", tmp_path / "teacher"))
    network, config = load_model(str(tmp_path / "teacher"))
    x, t = torch.randn(4, *DIGITS), torch.tensor([0.0, 0.3, 0.6, 1.0])
    assert torch.allclose(network(x, t, torch.arange(4)), theirs(x, t), atol=1e-5)
    assert config == made
    data = open_dataset(DataConfig(kind="digits")).description
    assert (config.kind, config.network, config.path.a, config.path.c) == ("teacher", UNET, 4, 2)
    assert (config.data_sha256, config.sample_shape, config.num_classes) == (data.sha256, DIGITS, 10)
    assert (tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    out = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert "e.pt, ema_model (sha256 " in out
    assert "32 channels" in out
    assert f"wrote {tmp_path / 'teacher'}: unet of {parameters / 1e3:.0f} k parameters" in out


def test_the_run_names_the_inputs(tmp_path: Path):
    torch.save(openai(10).state_dict(), tmp_path / "model.pt")
    config = convert(spec(tmp_path / "model.pt", tmp_path / "teacher"))
    run = run_of("convert", config.fingerprint)
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert tags["distillkac.input.checkpoint"] == hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest()
    assert tags["distillkac.input.data"] == config.data_sha256
    assert tags["distillkac.weights_sha256"] == config.weights_sha256
    assert tags["distillkac.path"] == str(tmp_path / "teacher")
    assert run.data.params["network.attention"] == "[4]"


def test_a_complete_folder_refuses_a_different_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(openai().state_dict(), tmp_path / "model.pt")
    given = spec(tmp_path / "model.pt", tmp_path / "teacher")
    config, count = convert(given), len(runs_of("convert"))
    assert convert(given) == config
    assert f"convert: {tmp_path / 'teacher'} is complete: nothing to do" in capsys.readouterr().out
    assert len(runs_of("convert")) == count
    with pytest.raises(DistillKacError, match=r"another spec .*path\.c is 2\.0, not 3\.0"):
        convert(spec(tmp_path / "model.pt", tmp_path / "teacher", path={"a": 4, "c": 3}))
    torch.save(openai(seed=1).state_dict(), tmp_path / "model.pt")
    with pytest.raises(DistillKacError, match=r"another spec .*checkpoint-sha256"):
        convert(given)
    assert load_config(str(tmp_path / "teacher")) == config


def test_weights_of_diffusers_are_loaded_unchanged(tmp_path: Path):
    torch.save(openai(10).state_dict(), tmp_path / "model.pt")
    first = convert(spec(tmp_path / "model.pt", tmp_path / "first"))
    again = tmp_path / "first" / "unet" / "diffusion_pytorch_model.safetensors"
    assert convert(spec(again, tmp_path / "second")).weights_sha256 == first.weights_sha256


# An outside teacher in all stages


def test_an_outside_teacher_works_in_every_stage(tmp_path: Path, field: Field):
    torch.save({"state_dict": field.state_dict()}, tmp_path / "field.ckpt")
    teacher = convert(outside(tmp_path / "field.ckpt", tmp_path / "teacher"))
    network, _ = load_model(str(tmp_path / "teacher"))

    options = {"trajectories": 32, "guidance": (0.0, 1.0)}
    manifest = rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), **options))
    assert manifest.identity.teacher_sha256 == teacher.weights_sha256
    shard = tmp_path / "store" / "data" / "guidance=1.0" / "shard-000000.parquet"
    table = pq.read_table(shard)
    x_1, image = (table[f"knot_{knot}"].combine_chunks().to_numpy_ndarray() for knot in ("00", "04"))
    label = torch.tensor(table["label"].to_pylist())
    with torch.inference_mode():
        velocity = guide(network, 1.0, label)
        expected = solve(velocity, torch.from_numpy(x_1.copy()), knot_times(8, "uniform"), "ab2").x
        theirs = -0.5 * (field.linear(torch.cat([expected, torch.zeros(32, 1)], 1)) + field.classes(label))
        assert torch.allclose(network(expected, torch.tensor(1.0), label), theirs, atol=1e-6)
    np.testing.assert_allclose(image, expected.numpy(), atol=1e-5)

    one = OptimizerConfig(updates=1, batch_size=16, warmup_updates=0)
    student = distill(distill_spec(str(tmp_path / "store"), tmp_path / "student", optimizer=one, guidance=1.0))
    assert (student.kind, student.network, student.steps) == ("student", FIELD, 2)
    assert student.weights_sha256 != teacher.weights_sha256
    for model in ("teacher", "student"):
        sample(SampleSpec(model=str(tmp_path / model), out=str(tmp_path / f"{model}.npz"), count=5))
        with np.load(tmp_path / f"{model}.npz") as made:
            assert np.isfinite(made["images"]).all()
    scores = evaluate(
        EvaluateSpec(
            teacher=str(tmp_path / "teacher"),
            students=(str(tmp_path / "student"),),
            out=str(tmp_path / "evaluation"),
            features=("pixels",),
            samples=100,
            actors=0,
        )
    )
    assert [score.name for score in scores] == ["real images", "teacher w=0", "teacher w=1", "student"]


def test_guidance_without_a_null_label_is_refused_before_any_work(tmp_path: Path):
    torch.save(Field(classes=2).state_dict(), tmp_path / "field.pt")
    network = FIELD.model_copy(update={"labels": "without_null", "arguments": {"classes": 2}})
    convert(outside(tmp_path / "field.pt", tmp_path / "teacher", network=network))
    message = r"`guidance`.* no null label"
    with pytest.raises(ArgumentError, match=message):
        rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), guidance=(0.0, 1.0)))
    assert not (tmp_path / "store").exists()
    with pytest.raises(ArgumentError, match=message):
        sample(SampleSpec(model=str(tmp_path / "teacher"), out=str(tmp_path / "x.npz"), guidance=1.0))
    rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), trajectories=32))
    sample(SampleSpec(model=str(tmp_path / "teacher"), out=str(tmp_path / "x.npz"), count=3))


@pytest.mark.parametrize(
    ("classes", "conditioning", "label"), [(None, "none", {10}), (10, "classes", set(range(10))), (11, None, None)]
)
def test_a_converted_teacher_gets_the_labels_that_its_weights_have(
    classes: int | None, conditioning: str | None, label: set[int] | None, tmp_path: Path
):
    torch.save(openai(classes).state_dict(), tmp_path / "model.pt")
    made = convert(spec(tmp_path / "model.pt", tmp_path / "teacher"))
    assert made.conditioning == (conditioning or "classes_and_null")
    options = {"trajectories": 64, "solver_steps": 4, "guidance": (0.0, 1.0)}
    if label is None:
        rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), **options))
        return
    with pytest.raises(ArgumentError, match="`guidance`"):
        rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), **options))
    rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), **{**options, "guidance": (0.0,)}))
    table = pq.read_table(tmp_path / "store" / "data" / "guidance=0.0")
    assert set(table["label"].to_pylist()) == label


# The weights in a file


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_key_and_the_other_contents_of_the_file_are_printed(
    ending: str, tmp_path: Path, field: Field, capsys: pytest.CaptureFixture[str]
):
    contents = {f"model.net.{name}": value.clone() for name, value in field.state_dict().items()}
    contents["discriminator.weight"] = torch.ones(3)
    file = tmp_path / f"file.{ending}"
    torch.save(contents, file) if ending == "pt" else safetensors.torch.save_file(contents, file)
    convert(outside(file, tmp_path / "teacher"))
    network, _ = load_model(str(tmp_path / "teacher"))
    assert torch.equal(network.inner.classes.weight, field.classes.weight)
    out = capsys.readouterr().out
    assert f"{file}, model.net (sha256 " in out
    assert "also in the file: discriminator (1)" in out


def test_the_key_chooses_among_weights_that_fit(tmp_path: Path, field: Field):
    other = Field(scale=0.5)
    torch.save({"first": field.state_dict(), "second": other.state_dict()}, tmp_path / "file.pt")
    message = refusal(outside(tmp_path / "file.pt", tmp_path / "out"))
    assert str(tmp_path / "file.pt") in message
    assert "first, second" in message
    convert(outside(tmp_path / "file.pt", tmp_path / "teacher", key="second"))
    assert torch.equal(load_model(str(tmp_path / "teacher")).network.inner.classes.weight, other.classes.weight)


WEIGHTS = {"a": torch.ones(2), "b": torch.zeros(1)}


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused_and_never_runs(tmp_path: Path):
    torch.save({"model": WEIGHTS, "args": Payload(tmp_path / "trap")}, tmp_path / "bomb.pt")
    message = refusal(outside(tmp_path / "bomb.pt", tmp_path / "out"))
    assert str(tmp_path / "bomb.pt") in message
    assert "posix.mkdir" in message
    assert "torch.save(model.state_dict(), FILE)" in message
    assert not (tmp_path / "trap").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "trap").exists()  # unpickling does create the folder


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("content", [b"", b"something else", b"PK\x03\x04 cut off"])
def test_damaged_files_are_refused(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(outside(tmp_path / name, tmp_path / "out"))


def test_a_missing_file_is_named(tmp_path: Path):
    path = tmp_path / "none.pt"
    assert str(path) in refusal(outside(path, tmp_path / "out"))


def test_a_folder_is_refused_with_the_files_in_it(tmp_path: Path, field: Field):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert str(folder) in refusal(outside(folder, tmp_path / "out"))
    (folder / "unet").mkdir()
    torch.save(field.state_dict(), folder / "unet" / "model.pt")
    assert "unet/model.pt" in refusal(outside(folder, tmp_path / "out"))


# Weights that do not fit


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"network": UNET.model_copy(update={"blocks": 2})}, "`network.blocks` 1"),
        ({"network": UNET.model_copy(update={"time_scale": 1000.0})}, "`network.time_scale`"),
        ({"network": FIELD}, "tests.kac.outside_modules:Field"),
        ({"data": "moons"}, "`network`"),
        ({"network": UNET.model_copy(update={"attention": (16,)})}, "`network.attention`"),
    ],
    ids=["blocks", "time scale", "outside", "data", "attention"],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(options: dict, named: str, tmp_path: Path):
    torch.save(openai().state_dict(), tmp_path / "model.pt")
    message = refusal(spec(tmp_path / "model.pt", tmp_path / "out", **options))
    assert named in message


def test_a_network_without_finite_velocity_is_refused_before_anything_is_written(tmp_path: Path, field: Field):
    weights = field.state_dict()
    weights["linear.bias"] = weights["twin.bias"] = torch.full((2,), torch.inf)
    torch.save(weights, tmp_path / "field.pt")
    message = refusal(outside(tmp_path / "field.pt", tmp_path / "out"))
    assert "field.pt" in message
    assert "NaN" in message
    torch.save(field.state_dict(), tmp_path / "field.pt")
    message = refusal(outside(tmp_path / "field.pt", tmp_path / "out", data="digits"))
    assert "[1, 8, 8]" in message
    assert "RuntimeError: " in message


def test_a_teacher_with_conditions_is_refused(tmp_path: Path):
    with pytest.raises(ArgumentError, match=r"`network\.conditions`"):
        spec(tmp_path / "w.pt", tmp_path / "out", network={"kind": "mlp", "conditions": ("end_time",)})


# The command line

WORDS = "--checkpoint ema_400000.pt --out teacher --data digits --path.a 9 --path.c 3"


def test_the_default_network_is_the_authors_network():
    made = parse(ConvertSpec, shlex.split(WORDS), "prog")
    assert made.network == UNetConfig(
        channels=(128, 256, 256, 256), blocks=2, attention=(16,), head_channels=64, time_scale=1.0
    )
    smaller = parse(ConvertSpec, shlex.split(f"{WORDS} --network unet --network.channels 32 64"), "prog")
    assert smaller.network == made.network.model_copy(update={"channels": (32, 64)})
    with pytest.raises(ArgumentError, match="`data` is required"):
        parse(ConvertSpec, shlex.split("--checkpoint c --out o"), "prog")


def test_the_job_converts(tmp_path: Path, project_root: Path):
    torch.save(openai().state_dict(), tmp_path / "ema_400000.pt")
    options = (
        "--network unet --network.channels 32 64 --network.blocks 1 --network.attention 4 --network.head-channels 32"
    )
    words = shlex.split(
        f"{WORDS} {options}".replace("ema_", f"{tmp_path}/ema_").replace("--out ", f"--out {tmp_path}/")
    )
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.convert", *words], cwd=project_root, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"convert: wrote {tmp_path}/teacher: unet of " in ended.stdout
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["network"]["channels"] == [32, 64]
