"""Converting models of diffusers to teachers, and distilling them."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import nn

from kac.data.autoencoder import Autoencoder
from kac.model import load_config, load_model
from kac.util.errors import DistillKacError
from pipeline import distill, evaluate, rollout
from pipeline.config import ConvertSpec
from pipeline.convert import convert
from tests import autoencoders
from tests.kac.diffusers_folders import dit, unet, write

DIGITS = 10


def spec(folder: Path, out: Path, **options: Any) -> ConvertSpec:
    return ConvertSpec(**{"checkpoint": str(folder), "out": str(out), "data": "digits", **options})


def refusal(folder: Path, out: Path, **options: Any) -> str:
    with pytest.raises(DistillKacError) as failure:
        convert(spec(folder, out, **options))
    assert not out.exists()
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.mark.parametrize(
    ("model", "conditioning"),
    [
        (unet(), "none"),
        (unet(classes=DIGITS), "classes"),
        (unet(classes=DIGITS + 1), "classes_and_null"),
        (unet(classes=DIGITS + 1, kind="UNet2DConditionModel"), "classes_and_null"),
        (dit(classes=DIGITS), "classes_and_null"),
    ],
    ids=["unconditional", "classes", "null", "conditional-unet", "dit"],
)
def test_a_converted_model_samples_from_the_gaussian_path(model: nn.Module, conditioning: str, tmp_path: Path):
    folder = write(tmp_path / "diffusers", model, diffusers.DDPMScheduler())
    config = convert(spec(folder, tmp_path / "teacher"))
    assert (config.conditioning, config.path.kind) == (conditioning, "gaussian")
    labels = None if conditioning == "none" else [3]
    teacher = load_model(str(tmp_path / "teacher"))
    assert teacher.sample(2, steps=4, labels=labels).images.shape == (2, 1, 8, 8)
    name = str(teacher.network.diffusers_name)
    again = type(model).from_pretrained(tmp_path / "teacher", subfolder=name)  # type: ignore[attr-defined]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert convert(spec(folder, tmp_path / "teacher")) == config  # a complete folder stays unchanged


@pytest.mark.parametrize("objective", ["endpoint", "flow-map"])
def test_a_converted_teacher_is_distilled(objective: str, tmp_path: Path):
    folder = write(tmp_path / "diffusers", unet(classes=DIGITS + 1), diffusers.DDPMScheduler())
    convert(spec(folder, tmp_path / "teacher"))
    store = rollout(
        teacher=tmp_path / "teacher", store=tmp_path / "store", trajectories=128, knots=4, solver_steps=8,
        guidance=(0, 1), tracking=False,
    )  # fmt: skip
    refine = {"kind": "data", "real_images": 32} if objective == "flow-map" else "none"
    student = distill(
        store=store.path, out=tmp_path / "student", steps=2, guidance=1, refine=refine, tracking=False,
        objective={"kind": objective} if objective == "endpoint" else {"kind": objective, "grids": (1, 2, 4)},
        optimizer={"updates": 8, "batch_size": 32, "warmup_updates": 2},
    )  # fmt: skip
    assert student.config.network.student  # type: ignore[union-attr]
    scores = evaluate(
        teacher=tmp_path / "teacher", students=[student.path], out=tmp_path / "evaluation", samples=64, solver_steps=8,
        steps=(1, 2), features=["pixels"], tracking=False,
    )  # fmt: skip
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in scores.metrics.values())


def test_a_dit_is_found_by_its_former_class_name(tmp_path: Path):
    folder = write(tmp_path / "diffusers", dit(classes=DIGITS), diffusers.DDPMScheduler())
    changed(folder, "config.json", _class_name="Transformer2DModel")
    assert convert(spec(folder, tmp_path / "teacher")).network.model["_class_name"] == "DiTTransformer2DModel"  # type: ignore[union-attr]


def test_the_data_of_a_model_in_latents_is_not_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = {"kind": "digits", "autoencoder": autoencoders.write(tmp_path / "autoencoder", latent_channels=4)}
    folder = write(
        tmp_path / "diffusers",
        dit(classes=DIGITS, in_channels=4, out_channels=8, sample_size=4),
        diffusers.DDPMScheduler(),
    )
    monkeypatch.setattr(Autoencoder, "encode", None)
    assert convert(spec(folder, tmp_path / "teacher", data=data)).sample_shape == (4, 4, 4)


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unsupported_folders_are_refused_before_anything_is_written(tmp_path: Path):
    folder, out = write(tmp_path / "diffusers", unet(), diffusers.DDPMScheduler()), tmp_path / "teacher"
    assert "[1, 28, 28]" in refusal(folder, out, data={"kind": "outside", "factory": "tests.kac.diffusers_folders:big"})
    assert "`path`" in refusal(folder, out, path={"a": 9})
    assert "`network`" in refusal(folder, out, network={"kind": "mlp"})
    index = folder / "model_index.json"
    before = index.read_text()
    changed(folder, "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    assert "text-to-image" in refusal(folder, out)
    index.write_text(before)
    changed(folder, "scheduler/scheduler_config.json", _class_name="CMStochasticIterativeScheduler")
    assert "CMStochasticIterativeScheduler" in refusal(folder, out)
    changed(folder, "scheduler/scheduler_config.json", _class_name="DDPMScheduler")
    changed(folder, "unet/config.json", block_out_channels=[8, 8])
    assert "do not fit" in refusal(folder, out)
    changed(folder, "unet/config.json", block_out_channels=[16, 16], num_class_embeds=5)
    assert "5 labels" in refusal(folder, out)
    changed(folder, "unet/config.json", _class_name="UNet3DConditionModel")
    assert "UNet3DConditionModel" in refusal(folder, out)


def test_missing_weights_and_schedulers_are_named(tmp_path: Path):
    folder, out = write(tmp_path / "diffusers", unet(), diffusers.DDPMScheduler()), tmp_path / "teacher"
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    content = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: w for name, w in content.items() if name != "conv_in.bias"}, weights)
    assert "conv_in.bias" in refusal(folder, out)
    weights.unlink()
    assert "no weights" in refusal(folder, out)
    (folder / "scheduler/scheduler_config.json").unlink()
    assert "scheduler" in refusal(folder, out)
    (folder / "model_index.json").unlink()
    assert "model_index.json" in refusal(folder, out)


def test_a_unet_that_attends_to_text_is_refused(tmp_path: Path):
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 16), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    folder = write(tmp_path / "diffusers", model, diffusers.DDPMScheduler())
    assert "text" in refusal(folder, tmp_path / "teacher")


def test_the_fingerprint_depends_on_the_weights_and_the_scheduler(tmp_path: Path):
    fingerprints = set()
    for number, (model, beta_end) in enumerate(((unet(), 0.02), (unet(seed=1), 0.02), (unet(), 0.03))):
        folder = write(tmp_path / f"diffusers-{number}", model, diffusers.DDPMScheduler(beta_end=beta_end))
        convert(spec(folder, tmp_path / f"teacher-{number}"))
        fingerprints.add(load_config(str(tmp_path / f"teacher-{number}")).fingerprint)
    assert len(fingerprints) == 3
