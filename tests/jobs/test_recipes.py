"""Every recipe works in every stage, with sizes reduced by options."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml

from jobs import config_files
from jobs.config_files import RECIPES, recipe_names
from jobs.parsing import parse
from kac.model import image_shape, load_model
from kac.util.errors import ArgumentError
from pipeline import quickstart, store
from pipeline.benchmark import BenchmarkSpec
from pipeline.config import (
    ConvertSpec,
    DistillSpec,
    EvaluateSpec,
    ExportSpec,
    OptimizerConfig,
    QuickstartSpec,
    RolloutSpec,
    SampleSpec,
    StudySpec,
    SweepSpec,
    TeachSpec,
    TeachSweepSpec,
)
from pipeline.convert import convert
from pipeline.distill import distill
from pipeline.rollout import rollout
from pipeline.sample import sample
from pipeline.teach import teach
from tests import autoencoders
from tests.kac.data.making import cifar_batches, pixels, write_archive, write_folder, write_idx
from tests.kac.diffusers_folders import dit, unet, write

FLOAT32 = "--precision.dtype float32"
ONE_UPDATE = f"--optimizer.updates 1 --optimizer.batch-size 2 --optimizer.accumulation 1 --workers 0 {FLOAT32}"
ONE_SHARD = f"--trajectories 2 --shard-size 2 --knots 4 --solver-steps 4 --actors 0 {FLOAT32}"
SMALL = {
    "digits": "--network.width 16",
    "fashion-mnist": "--network.channels 8 16",
    "cifar10-duong": "--network.channels 32 32 32 64 --network.blocks 1 --network.head-channels 16",
    "cifar10-han": "--network.channels 32 32 32 64 --network.blocks 1 --network.head-channels 8",
    "celeba64": "--data.size 32 --network.channels 32 32 32 64 --network.blocks 1 --network.head-channels 8",
    "lsun256": "--data.size 64 --network.channels 32 32 32 32 32 64 --network.blocks 1 --network.head-channels 32",
    "latent-dit-b-2": "--data.size 16 --network.heads 2 --network.head-channels 8 --network.depth 2",
    "dit-s-2": "--network.heads 2 --network.head-channels 8 --network.depth 2",
}
"""Options that shrink the network of each recipe but keep its structure."""

CONVERTED = [name for name in recipe_names() if name not in SMALL]
"""Recipes that start from a public model instead of training a teacher."""

LATENT = ("latent-dit-b-2", "dit-xl-2-256")
ANY_STEP = ("digits", "fashion-mnist", "latent-dit-b-2")
"""The recipes whose student is an any-step student."""

STAGES = {
    "teach": TeachSpec,
    "convert": ConvertSpec,
    "rollout": RolloutSpec,
    "distill": DistillSpec,
    "sweep": SweepSpec,
    "evaluate": EvaluateSpec,
    "sample": SampleSpec,
}
REQUIRED = {
    "teach": "--out o",
    "convert": "--checkpoint c.pt --out o",
    "rollout": "--teacher t --store s",
    "distill": "--store s --out o",
    "sweep": "--store s --out o",
    "evaluate": "--teacher t --out o",
    "sample": "--model m --out o.png",
}


def root_of(recipe: str, folder: Path) -> str:
    """Write a few images of the recipe's kind and size, and return the option for them."""
    labels = [0, 1] * 5
    if recipe == "digits":
        return ""
    if recipe == "fashion-mnist":
        root = write_idx(folder / "idx", pixels(10, 1, 28), np.array(labels, np.uint8), held_out=2)
    elif recipe in {"celeba64", "lsun256", *LATENT}:
        root = write_folder(folder / "images", pixels(10, 3, 72), labels)
    else:
        root = write_archive(folder / "cifar-10-python.tar.gz", cifar_batches(pixels(60, 3, 32), [*range(10)] * 6))
    if recipe in LATENT:
        root = f"{root} --data.autoencoder {autoencoders.write(folder / 'vae', channels=3, latent_channels=4)}"
    return f"--data.root {root}"


def options(spec_type: type, words: str):
    return parse(spec_type, words.split(), "job")


@pytest.mark.parametrize("recipe", SMALL)
def test_a_recipe_works_in_every_stage(recipe: str, tmp_path: Path):
    teacher, path, student, images = (tmp_path / name for name in ("teacher", "store", "student", "images.npz"))
    grids = "--objective flow-map --objective.grids 1 2 4" if recipe in ANY_STEP else ""
    small = f"{ONE_UPDATE} {SMALL[recipe]} {root_of(recipe, tmp_path)}"
    taught = teach(options(TeachSpec, f"--config {recipe} {small} --out {teacher}"))
    assert taught is not None
    rollout(options(RolloutSpec, f"--config {recipe} {ONE_SHARD} --teacher {teacher} --store {path}"))
    assert store.open(str(path)).identity.sample_shape == taught.sample_shape
    distilled = distill(
        options(DistillSpec, f"--config {recipe} {ONE_UPDATE} {grids} --store {path} --steps 2 --out {student}")
    )
    network, loaded = load_model(str(student))
    assert loaded == distilled
    assert loaded.network == taught.network.model_copy(update={"conditions": loaded.network.conditions})
    assert all(bool(torch.isfinite(weight).all()) for weight in network.state_dict().values())
    sample(options(SampleSpec, f"--model {student} --count 2 --out {images}"))
    delivered = np.load(images)["images"]
    assert delivered.shape == (2, *image_shape(taught))
    assert np.abs(delivered).max() <= 1


def public_model(recipe: str, folder: Path) -> str:
    """Write a small model with the structure of the recipe's, and return the options for it and its data."""
    root = root_of(recipe, folder)
    if recipe == "dit-xl-2-256":
        write(folder / "model", dit(classes=2, in_channels=4, out_channels=8), diffusers.DDIMScheduler())
        return f"--checkpoint {folder / 'model'} --data.size 16 {root}"
    sizes = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8, 8, 8)}
    down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    down[1], up[2] = "AttnDownBlock2D", "AttnUpBlock2D"
    model = unet(**sizes, down_block_types=down, up_block_types=up)
    write(folder / "model", model, diffusers.DDPMScheduler(clip_sample=True))
    return f"--checkpoint {folder / 'model'} {root}"


@pytest.mark.parametrize("recipe", CONVERTED)
def test_a_recipe_of_a_public_model_works_in_every_stage(recipe: str, tmp_path: Path):
    teacher, path, student = (tmp_path / name for name in ("teacher", "store", "student"))
    convert(options(ConvertSpec, f"--config {recipe} {public_model(recipe, tmp_path)} --out {teacher}"))
    rollout(options(RolloutSpec, f"--config {recipe} {ONE_SHARD} --teacher {teacher} --store {path}"))
    words = f"{ONE_UPDATE} --objective flow-map --objective.grids 1 2 4 --store {path} --out {student}"
    distill(options(DistillSpec, f"--config {recipe} {words}"))
    assert load_model(str(student)).sample(2, steps=1).images.isfinite().all()


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_section_of_a_recipe_belongs_to_a_stage(recipe: str):
    sections = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    assert {"convert" if recipe in CONVERTED else "teach", "rollout", "distill", "sweep", "evaluate"} <= set(sections)
    for stage in sections:
        data = "--data.root somewhere" if stage in {"teach", "convert"} and recipe != "digits" else ""
        options(STAGES[stage], f"--config {recipe} {REQUIRED[stage]} {data}")
        if stage == "teach":  # a sweep of teachers reads the same section
            options(TeachSweepSpec, f"--config {recipe} {REQUIRED[stage]} {data}")


def test_the_digits_recipe_is_the_demo():
    assert options(TeachSpec, "--config digits --out o") == TeachSpec(out="o", optimizer=quickstart.TEACHER)
    distilled = options(DistillSpec, "--config digits --store s --out o")
    assert distilled == DistillSpec(store="s", out="o", objective=quickstart.OBJECTIVE, optimizer=quickstart.FLOW_MAP)
    options(SweepSpec, "--config digits --store s --out o")
    assert options(RolloutSpec, "--config digits --teacher t --store s") == RolloutSpec(teacher="t", store="s")
    assert options(EvaluateSpec, "--config digits --teacher t --out o") == EvaluateSpec(teacher="t", out="o")


def test_a_users_file_can_have_sections(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("teach: {out: there, optimizer: {updates: 7, batch-size: 8}}\nsample: {model: m, out: o.png}\n")
    spec = options(TeachSpec, f"--config {file} --optimizer.updates 9")
    assert spec == TeachSpec(out="there", optimizer=OptimizerConfig(updates=9, batch_size=8))
    assert options(SampleSpec, f"--config {file}").model == "m"
    file.write_text("teach:\nrollout: {knots: 4}\n")
    assert options(TeachSpec, f"--config {file} --out o") == TeachSpec(out="o")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("no-such", ", ".join(recipe_names())),
        ("{file}", "section for rollout"),
        ("{mixed}", "updates"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(config: str, part: str, tmp_path: Path):
    (tmp_path / "file.yaml").write_text("teach: {out: there}")
    (tmp_path / "mixed.yaml").write_text("teach: {out: there}\nupdates: 7")
    path = config.format(file=tmp_path / "file.yaml", mixed=tmp_path / "mixed.yaml")
    with pytest.raises(ArgumentError) as error:
        options(RolloutSpec, f"--config {path}")
    assert error.value.name == "config"
    assert path in str(error.value)
    assert part in str(error.value)


def test_sections_are_named_like_stages():
    every = {
        **STAGES,
        "study": StudySpec,
        "export": ExportSpec,
        "quickstart": QuickstartSpec,
        "benchmark": BenchmarkSpec,
    }
    assert set(every) == set(config_files.STAGES)
    assert all(spec.stage == name for name, spec in every.items())
