"""Decoding with Ray Data gives the same cache as one process. A failure gives a one-line error and leaves no files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kac.data import DataConfig, all_rows, begin_decoding, decoded, open_dataset
from kac.util.errors import DistillKacError
from pipeline import decode
from pipeline.config import TeachSpec
from pipeline.teach import teach
from tests.kac.data import making

COUNT, ROWS_PER_GROUP = 90, 20


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    making.write_parquet(tmp_path / "data" / "p.parquet", making.pixels(COUNT), np.arange(COUNT) % 3, ROWS_PER_GROUP)
    return DataConfig(kind="parquet", root=str(tmp_path / "data"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    open_dataset.cache_clear()


def test_ray_and_one_process_decode_the_same(config, ray_cluster, monkeypatch, tmp_path):
    single = open_dataset(config)
    open_dataset.cache_clear()
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "other"))
    decode.prepare(config, from_images=1)
    monkeypatch.setattr(decoded, "decode_here", None)  # the data must be decoded by now
    distributed = open_dataset(config)
    assert distributed.description == single.description
    for split in ("train", "held_out"):
        ours, theirs = (all_rows(getattr(data, split)) for data in (distributed, single))
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("from_images", [1, 1000], ids=["on Ray", "in this process"])
def test_a_damaged_image_is_named_and_no_file_is_left(config, ray_cluster, tmp_path, from_images):
    making.write_folder(tmp_path / "folder", making.pixels(1200), np.arange(1200) % 2)
    (tmp_path / "folder" / "b" / "01101.png").write_bytes(b"nothing")
    broken = DataConfig(kind="folder", root=str(tmp_path / "folder"))
    with pytest.raises(DistillKacError, match=r"01101\.png") as error:
        decode.prepare(broken, from_images)
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_teach_decodes_its_data_first_and_only_once(config, tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(decode, "begin_decoding", lambda data: configs.append(data) or begin_decoding(data))
    spec = TeachSpec(out=str(tmp_path / "t"), data=config, network={"kind": "mlp", "width": 8, "depth": 1}, workers=0)
    assert teach(spec.model_copy(update={"dry_run": True})) is None
    assert configs
    assert begin_decoding(config) is None
    assert not (tmp_path / "t").exists()
