"""Teach, sample and evaluate on data from a user's factory."""

import json
from pathlib import Path

import numpy as np
import pytest

from kac.data import DataConfig, open_dataset
from kac.model import load_config
from kac.util.errors import ArgumentError
from pipeline.config import EvaluateSpec, SampleSpec
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.sample import sample
from pipeline.teach import teach
from tests.pipeline.stages import run_of, teach_spec

FACTORY = "tests.kac.data.outside_data"
DATA = DataConfig(kind="outside", factory=f"{FACTORY}:named", arguments={"held_out": 12})


def test_teach_sample_and_evaluate(tmp_path: Path):
    teacher, samples, out = (str(tmp_path / name) for name in ("teacher", "samples.npz", "evaluation"))
    teach(teach_spec(Path(teacher), data=DATA))
    config, described = load_config(teacher), open_dataset(DATA).description
    assert (config.data, config.data_sha256) == (DATA, described.sha256)
    assert run_of("teach", config.fingerprint).inputs.dataset_inputs[0].dataset.source.find(DATA.factory) > 0
    sample(SampleSpec(model=teacher, out=samples, count=3, steps=2, labels=("dog", "cat")))
    with np.load(samples) as made:
        assert made["images"].shape == (3, 1, 8, 8)
        assert made["labels"].tolist() == [1, 0, 1]
    open_dataset.cache_clear()
    evaluate(EvaluateSpec(teacher=teacher, out=out, samples=64, solver_steps=2, actors=0, features=("pixels",)))
    record = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert [score["kind"] for score in record["scores"]] == ["real", "teacher"]
    assert described.sha256 in json.dumps(record)


def test_a_bad_factory_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(ArgumentError, match="no data today") as error:
        teach(teach_spec(tmp_path / "out", data=DataConfig(kind="outside", factory=f"{FACTORY}:raises")))
    assert error.value.name == "data.factory"
    assert not (tmp_path / "out").exists()
