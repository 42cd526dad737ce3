"""Convert: weights that others trained become a teacher like any other."""

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
from kac.checkpoint import load_config, load_model
from kac.data import DataConfig, open_dataset
from kac.errors import DistillKacError
from kac.guidance import guide
from kac.networks import OutsideConfig, UNetConfig
from kac.options import OptionError
from kac.solvers import knot_times, solve
from kac.state_dict import read_state_dict
from pipeline.config import ConvertSpec, EvaluateSpec, OptimizerConfig, SampleSpec
from pipeline.convert import convert
from pipeline.distill import distill
from pipeline.evaluate import evaluate
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
    assert not Path(spec.out).exists(), "nothing is left behind"
    return message


# What is written


def test_a_unet_of_openai_becomes_a_teacher_with_its_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
    assert "U-Net of OpenAI, with 32 channels a head in attention" in out
    assert f"wrote {tmp_path / 'teacher'}: unet of {parameters / 1e3:.0f} k parameters" in out


def test_its_run_names_what_went_in(tmp_path: Path):
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


def test_a_complete_folder_is_left_alone_and_another_spec_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(openai().state_dict(), tmp_path / "model.pt")
    given = spec(tmp_path / "model.pt", tmp_path / "teacher")
    made, count = convert(given), len(runs_of("convert"))
    assert convert(given) == made
    assert f"convert: {tmp_path / 'teacher'} is complete: nothing to do" in capsys.readouterr().out
    assert len(runs_of("convert")) == count
    with pytest.raises(DistillKacError, match=r"found one of another spec .*path.c is 2.0, not 3.0"):
        convert(spec(tmp_path / "model.pt", tmp_path / "teacher", path={"a": 4, "c": 3}))
    torch.save(openai(seed=1).state_dict(), tmp_path / "model.pt")
    with pytest.raises(DistillKacError, match=r"found one of another spec .*checkpoint-sha256 is"):
        convert(given)
    assert load_config(str(tmp_path / "teacher")) == made


def test_the_weights_of_a_folder_of_diffusers_are_taken_as_they_are(tmp_path: Path):
    torch.save(openai(10).state_dict(), tmp_path / "model.pt")
    first = convert(spec(tmp_path / "model.pt", tmp_path / "first"))
    again = tmp_path / "first" / "unet" / "diffusion_pytorch_model.safetensors"
    assert convert(spec(again, tmp_path / "second")).weights_sha256 == first.weights_sha256


# An outside teacher through the stages


def test_an_outside_teacher_goes_through_every_stage(tmp_path: Path, field: Field):
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


def test_guidance_of_a_teacher_without_null_label_is_refused_before_work(tmp_path: Path):
    torch.save(Field(classes=2).state_dict(), tmp_path / "field.pt")
    network = FIELD.model_copy(update={"labels": "without_null", "arguments": {"classes": 2}})
    convert(outside(tmp_path / "field.pt", tmp_path / "teacher", network=network))
    message = r"^--guidance: expected 0, since this network has no null label"
    with pytest.raises(OptionError, match=message):
        rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), guidance=(0.0, 1.0)))
    assert not (tmp_path / "store").exists()
    with pytest.raises(OptionError, match=message):
        sample(SampleSpec(model=str(tmp_path / "teacher"), out=str(tmp_path / "x.npz"), guidance=1.0))
    rollout(make_spec(tmp_path / "store", str(tmp_path / "teacher"), trajectories=32))
    sample(SampleSpec(model=str(tmp_path / "teacher"), out=str(tmp_path / "x.npz"), count=3))


# Where in a file the weights are


WEIGHTS = {"a": torch.ones(2), "b": torch.zeros(1)}
OTHERS = {"a": torch.zeros(2), "b": torch.zeros(1)}


@pytest.mark.parametrize(
    ("content", "key", "found"),
    [
        (WEIGHTS, None, None),
        ({"anything": WEIGHTS}, None, "anything"),
        ({"model": WEIGHTS, "optimizer": {"state": {0: {"step": torch.ones(())}}}, "epoch": 3}, None, "model"),
        ({"model": OTHERS, "ema": WEIGHTS}, None, "ema"),
        ({"model": OTHERS, "ema_model": WEIGHTS, "best": OTHERS}, None, "ema_model"),
        ({"model": WEIGHTS, "ema": OTHERS}, "model", "model"),
        ({"first": OTHERS, "second": WEIGHTS}, "second", "second"),
    ],
)
def test_the_weights_are_found_in_the_file(content: Any, key: str | None, found: str | None, tmp_path: Path):
    torch.save(content, tmp_path / "file.pt")
    read = read_state_dict(str(tmp_path / "file.pt"), key)
    assert read.key == found
    assert read.weights.keys() == WEIGHTS.keys()
    assert torch.equal(read.weights["a"], torch.ones(2))
    assert read.sha256 == hashlib.sha256((tmp_path / "file.pt").read_bytes()).hexdigest()


def test_safetensors_are_read(tmp_path: Path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "file.safetensors")
    assert torch.equal(read_state_dict(str(tmp_path / "file.safetensors")).weights["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"first": WEIGHTS, "second": WEIGHTS}, None, "found state dicts under first, second: choose one with --key"),
        ({"ema": WEIGHTS, "model_ema": WEIGHTS}, None, "found state dicts under ema, model_ema: choose one with --key"),
        ({"first": WEIGHTS, "step": 3}, "model", "expected a state dict under --key model, found state dicts under"),
        ({"step": 3, "loss": 0.1}, None, "expected one state dict, found no state dict among step, loss"),
        ({"weights": {}}, None, "found no state dict among weights"),
        ([1, 2], None, "found no mapping of names"),
        (torch.ones(2), None, "found no mapping of names"),
        (WEIGHTS, "model", "expected a state dict under --key model, found no state dict among a, b"),
    ],
)  # fmt: skip
def test_files_in_which_the_weights_are_not_clear_are_refused(
    content: Any, key: str | None, message: str, tmp_path: Path
):
    torch.save(content, tmp_path / "file.pt")
    said = refusal(outside(tmp_path / "file.pt", tmp_path / "out", key=key))
    assert said.startswith(f"{tmp_path / 'file.pt'}: expected ")
    assert message in said


class Payload:
    """What a pickle would run when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path):
    torch.save({"model": WEIGHTS, "args": Payload(tmp_path / "trap")}, tmp_path / "bomb.pt")
    said = refusal(outside(tmp_path / "bomb.pt", tmp_path / "out"))
    assert said.startswith(f"{tmp_path / 'bomb.pt'}: expected tensors and plain values, found posix.mkdir, and code is")
    assert "torch.save(model.state_dict(), FILE)" in said
    assert not (tmp_path / "trap").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "trap").exists()  # the trap works


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("content", [b"", b"something else", b"PK\x03\x04 cut off"])
def test_damaged_files_are_refused(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    assert refusal(outside(tmp_path / name, tmp_path / "out")).startswith(
        f"{tmp_path / name}: expected a file of weights, found "
    )


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    for path in (tmp_path / "none.pt", tmp_path):
        assert refusal(outside(path, tmp_path / "out")) == f"{path}: expected a file of weights, found none"


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": UNET.model_copy(update={"blocks": 2})}, "FILE: expected the weights of this U-Net, found"),
        ({"network": UNET.model_copy(update={"time_scale": 1000.0})}, "--network.time-scale: expected 1"),
        ({"network": FIELD}, "FILE: expected the weights of tests.kac.outside_modules:Field, found version missing"),
        ({"data": "moons"}, "--network: expected square images"),
        ({"network": UNET.model_copy(update={"attention": (16,)})}, "--network.attention: expected widths of"),
    ],
    ids=["blocks", "time scale", "outside", "data", "attention"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(options: dict, message: str, tmp_path: Path):
    torch.save(openai().state_dict(), tmp_path / "model.pt")
    said = refusal(spec(tmp_path / "model.pt", tmp_path / "out", **options))
    assert said.startswith(message.replace("FILE", str(tmp_path / "model.pt")))


def test_a_network_without_a_velocity_is_refused_before_anything_is_written(tmp_path: Path, field: Field):
    weights = field.state_dict()
    weights["linear.bias"] = weights["twin.bias"] = torch.full((2,), torch.inf)
    torch.save(weights, tmp_path / "field.pt")
    said = refusal(outside(tmp_path / "field.pt", tmp_path / "out"))
    assert said.endswith("field.pt: expected finite velocities of shape [2, 2], found NaN or infinity")
    torch.save(field.state_dict(), tmp_path / "field.pt")
    said = refusal(outside(tmp_path / "field.pt", tmp_path / "out", data="digits"))
    assert "expected a velocity for samples of [1, 8, 8], found RuntimeError: " in said


def test_conditions_are_no_teachers(tmp_path: Path):
    with pytest.raises(OptionError, match=r"a teacher takes time and label alone: leave --network.conditions out"):
        spec(tmp_path, tmp_path, network={"kind": "mlp", "conditions": ("end_time",)})


# The command line

WORDS = "--checkpoint ema_400000.pt --out teacher --data digits --path.a 9 --path.c 3"


def test_the_networks_default_is_the_authors():
    made = parse(ConvertSpec, shlex.split(WORDS), "prog")
    assert made.network == UNetConfig(
        channels=(128, 256, 256, 256), blocks=2, attention=(16,), head_channels=64, time_scale=1.0
    )
    smaller = parse(ConvertSpec, shlex.split(f"{WORDS} --network unet --network.channels 32 64"), "prog")
    assert smaller.network == made.network.model_copy(update={"channels": (32, 64)})
    with pytest.raises(OptionError, match="--data: expected a value, found none"):
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
