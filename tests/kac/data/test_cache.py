"""The cache of decoded images on S3: one process decodes, and every machine reads a copy."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kac.data import DataConfig, all_rows, begin_decoding, open_dataset
from kac.util import files
from kac.util.errors import DistillKacError
from tests.kac.data import making
from tests.pipeline.s3_server import FaultyS3, environment

# Set during collection, before any test starts Ray, because the workers inherit this environment.
os.environ.update(environment())


def test_a_cache_on_s3_is_decoded_once(tmp_path: Path, s3_server: FaultyS3, monkeypatch: pytest.MonkeyPatch):
    images, labels = making.pixels(60, 3), np.arange(60) % 3
    making.write_parquet(tmp_path / "p.parquet", images, labels.tolist(), rows=7)
    config = DataConfig(kind="parquet", root=str(tmp_path / "p.parquet"))
    local = open_dataset(config)
    s3_server.client().create_bucket(Bucket="decoded")
    monkeypatch.setenv("DISTILLKAC_CACHE", "s3://decoded/cache")
    for machine in ("first", "second"):
        open_dataset.cache_clear()
        (tmp_path / machine).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / machine))
        decoding = begin_decoding(config)
        assert (decoding is None) == (machine == "second")
        found = open_dataset(config)
        assert found.description == local.description
        for split in ("train", "held_out"):
            assert all(map(torch.equal, all_rows(getattr(found, split)), all_rows(getattr(local, split))))
    block = next(name for name in files.list_sizes("s3://decoded/cache") if "train-images" in name)
    files.remove(f"s3://decoded/cache/{block}")
    open_dataset.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DistillKacError, match="train-images is damaged"):
        open_dataset(config)
