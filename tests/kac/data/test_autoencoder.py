"""Latents of a dataset: shapes, scaling, identity, the cache, and the refusal of wrong autoencoders."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kac.data import (
    ArrayData,
    DataConfig,
    all_rows,
    autoencoder,
    decoded,
    describe_dataset,
    open_autoencoder,
    open_dataset,
)
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import decode
from tests import autoencoders
from tests.kac.data import making


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    forget()


def forget() -> None:
    """Forget what this process has opened."""
    open_dataset.cache_clear()
    open_autoencoder.cache_clear()


@pytest.mark.parametrize("name", autoencoders.SIZES)
def test_each_class_encodes_and_decodes_with_its_scale(name: str, tmp_path: Path):
    config = DataConfig(autoencoder=autoencoders.write(tmp_path / "a", name))
    data, images = open_dataset(config), open_dataset(config.images)
    assert data.description == describe_dataset(config)
    assert data.description.sample_shape == (2, 4, 4)
    assert len(data.train) == len(images.train)
    latents, labels = all_rows(data.held_out)
    assert torch.equal(labels, all_rows(images.held_out).labels)
    assert latents.dtype == torch.float32
    network = autoencoders.make_network(name).eval()
    with torch.no_grad():
        found = network.encode(all_rows(images.held_out).images[:256])
        raw = {"AutoencoderKL": lambda: found.latent_dist.mean, "AutoencoderTiny": lambda: found.latents}
        unscaled = raw.get(name, lambda: found.latent)()
        expected = (unscaled - autoencoders.SIZES[name].get("shift_factor", 0)) * network.config.scaling_factor
        assert torch.allclose(latents[:256], expected, atol=1e-5)
        back = open_autoencoder(config.autoencoder).decode(latents[:256])
        assert torch.allclose(back, network.decode(unscaled).sample, atol=1e-5)
    assert back.shape == (256, 1, 8, 8)


def test_latents_are_encoded_once_and_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = DataConfig(autoencoder=autoencoders.write(tmp_path / "a"))
    first = open_dataset(config)
    monkeypatch.setattr(autoencoder, "encode_images", None)
    open_dataset.cache_clear()
    second = open_dataset(config)
    assert second is not first
    for split in ("train", "held_out"):
        ours, theirs = (all_rows(getattr(data, split)) for data in (first, second))
        assert torch.equal(ours.images, theirs.images)


def test_the_identity_is_that_of_the_images_and_of_the_autoencoder(tmp_path: Path):
    folder = autoencoders.write(tmp_path / "a")
    config = DataConfig(autoencoder=folder)
    sha256 = open_dataset(config).description.sha256
    moved = shutil.copytree(folder, tmp_path / "b")
    assert describe_dataset(DataConfig(autoencoder=str(moved))).sha256 == sha256
    assert open_dataset(config.images).description.sha256 != sha256
    autoencoders.write(tmp_path / "a", seed=1)
    forget()
    assert open_dataset(config).description.sha256 != sha256


def test_the_random_state_of_the_process_is_unchanged(tmp_path: Path):
    folder = autoencoders.write(tmp_path / "a")
    before = torch.random.get_rng_state()
    open_dataset(DataConfig(autoencoder=folder))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_ray_encodes_the_decoded_images_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None):
    making.write_parquet(tmp_path / "data" / "p.parquet", making.pixels(90), np.arange(90) % 3, 20)
    folder = autoencoders.write(tmp_path / "a", channels=3)
    config = DataConfig(kind="parquet", root=str(tmp_path / "data"), size=8, channels=3, autoencoder=folder)
    monkeypatch.setattr(autoencoder, "UNIT_CALLS", 1)
    monkeypatch.setattr(autoencoder, "CALL_IMAGES", 20)
    single = open_dataset(config)
    forget()
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "other"))
    decode.prepare(config, from_images=1)
    monkeypatch.setattr(decoded, "decode_here", None)  # images and latents must be in the cache by now
    distributed = open_dataset(config)
    assert distributed.description == single.description
    assert torch.allclose(all_rows(distributed.train).images, all_rows(single.train).images, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "part"),
    [
        ({"channels": 3}, {}, "3 channels"),
        ({}, {"kind": "outside", "factory": "tests.kac.data.outside_data:points"}, "points"),
        ({}, {"kind": "outside", "factory": "tests.kac.data.test_autoencoder:odd"}, "divisible by 2"),
        ({"_class_name": "UNet2DModel"}, {}, "AutoencoderKL, AutoencoderTiny"),
        ({"block_out_channels": [8, 32]}, {}, "cannot be loaded"),
        ({"config.json": "[1]"}, {}, "damaged config.json"),
        ({"diffusion_pytorch_model.safetensors": "x"}, {}, "cannot be loaded"),
        ({"diffusion_pytorch_model.safetensors": None}, {}, "lacks config.json or diffusion_pytorch_model.safetensors"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(
    change: dict[str, Any], options: dict[str, Any], part: str, tmp_path: Path
):
    folder = Path(autoencoders.write(tmp_path / "a", **{"channels": change.pop("channels", 1)}))
    for name, value in change.items():
        if not name.endswith((".json", ".safetensors")):
            values = json.loads((folder / "config.json").read_text()) | {name: value}
            (folder / "config.json").write_text(json.dumps(values))
        elif value is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(value)
    with pytest.raises(DistillKacError) as error:
        decode.prepare(DataConfig(autoencoder=str(folder), **options))
    assert part in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def odd() -> ArrayData:
    """Return images of 7 x 7 pixels."""
    return ArrayData(np.zeros((20, 1, 7, 7), np.uint8), np.arange(20) % 2)


@pytest.mark.parametrize(
    "options",
    [{"kind": "moons"}, {"kind": "folder", "root": "r", "horizontal_flip": True}],
)
def test_points_and_flips_are_refused_before_anything_is_read(options: dict[str, Any]):
    with pytest.raises(ArgumentError, match="autoencoder"):
        DataConfig(**options, autoencoder="nowhere")
