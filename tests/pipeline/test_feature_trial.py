"""A user's feature networks are tried before an evaluation or a sweep draws, trains or writes anything."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kac.util.errors import ArgumentError
from pipeline.config import EvaluateSpec, SweepSpec
from pipeline.evaluate import compute
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.sweep import sweep
from tests import feature_networks
from tests.pipeline.stages import runs_of
from tests.pipeline.stores import make_store, make_teacher


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(tmp_path_factory.mktemp("models") / "digits", "digits")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache. A fixture named ``cache`` would replace the session's cache, which Ray needs at its start."""
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec_of(teacher: str, out: Path, *features: str, **options: object) -> EvaluateSpec:
    defaults = {"samples": 300, "solver_steps": 2, "actors": 0}
    return EvaluateSpec(**{**defaults, **options}, teacher=teacher, out=str(out), features=features)


def scripted(folder: Path, name: str) -> str:
    path = str(folder / f"{name}.pt")
    torch.jit.script(getattr(feature_networks, name)()).save(path)
    return path


@pytest.mark.parametrize("name", ["ThreeChannels", "NotANumber", "TrainingMode"])
def test_an_evaluation_draws_and_writes_nothing_before_a_refusal(
    name: str, digits_teacher: str, empty_cache: Path, tmp_path: Path
):
    """Even the classifier, which comes first in ``features``, is not trained."""
    given, runs = scripted(tmp_path, name), len(runs_of("evaluate"))
    with pytest.raises(ArgumentError, match=f"`features` {given}"):
        evaluate(spec_of(digits_teacher, tmp_path / "out", "classifier", given))
    assert not (tmp_path / "out").exists() and not any(path.is_file() for path in empty_cache.rglob("*"))
    assert len(runs_of("evaluate")) == runs


@pytest.mark.parametrize("given", ["no.such.module:net", "tests.feature_networks:Nowhere", "FOLDER/weights.pt"])
def test_a_network_that_cannot_be_opened_is_refused_before_anything_is_written(
    given: str, digits_teacher: str, empty_cache: Path, tmp_path: Path
):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ArgumentError, match="`features`"):
        evaluate(spec_of(digits_teacher, tmp_path / "out", given.replace("FOLDER", str(tmp_path))))
    assert not (tmp_path / "out").exists() and not any(path.is_file() for path in empty_cache.rglob("*"))


def test_networks_are_tried_where_the_evaluation_will_run_them(
    digits_teacher: str, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """With actors, the driver never runs the network."""
    monkeypatch.setattr(compute, "try_space", lambda *_: pytest.fail("the driver tried the network"))
    with pytest.raises(ArgumentError, match="3 channels"):
        evaluate(spec_of(digits_teacher, tmp_path / "out", "tests.feature_networks:ThreeChannels", actors=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Thin", "Wide", "exported"])
def test_unusual_features_are_evaluated(name: str, digits_teacher: str, tmp_path: Path):
    """Evaluate one feature, more features than samples (float16), and a module from torch.export."""
    scores = evaluate(spec_of(digits_teacher, tmp_path / "out", f"tests.feature_networks:{name}"))
    for score in scores:
        assert score.metrics[f"frechet_distance_{name}"] >= -1e-6
    assert scores[1].metrics[f"frechet_distance_{name}"] > scores[0].metrics[f"frechet_distance_{name}"]


@pytest.mark.parametrize(("name", "samples"), [("Later", 50), ("LaterNaN", 300), ("LaterWider", 50)])
def test_a_network_that_fails_after_the_trial_is_refused_in_one_line(
    name: str, samples: int, digits_teacher: str, tmp_path: Path
):
    given = f"tests.feature_networks:{name}"
    with pytest.raises(ArgumentError, match=f"`features` {given}") as caught:
        evaluate(spec_of(digits_teacher, tmp_path / "out", given, samples=samples))
    assert "\n" not in str(caught.value)


def test_a_network_that_fails_on_an_actor_is_refused_in_one_line(
    digits_teacher: str, tmp_path: Path, ray_cluster: None
):
    given = "tests.feature_networks:Later"
    with pytest.raises(ArgumentError, match=f"`features` {given}.*more than I can take") as caught:
        evaluate(spec_of(digits_teacher, tmp_path / "out", given, actors=1))
    assert "\n" not in str(caught.value)


def test_a_finished_evaluation_needs_no_network(digits_teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = spec_of(digits_teacher, tmp_path / "out", "tests.feature_networks:Thin")
    scores = evaluate(spec)
    monkeypatch.delattr(feature_networks, "Thin")
    assert evaluate(spec) == scores


def test_cached_features_that_are_not_finite_are_refused_by_path(
    digits_teacher: str, empty_cache: Path, tmp_path: Path
):
    given = "tests.feature_networks:Thin"
    evaluate(spec_of(digits_teacher, tmp_path / "first", given))
    for path in (empty_cache / "features").rglob("*.npy"):
        np.save(path, np.full_like(np.load(path), np.nan))
    with pytest.raises(ArgumentError, match=f"`features` {given} .*features/.*NaN"):
        evaluate(spec_of(digits_teacher, tmp_path / "second", given, batch_size=100))


def test_a_sweep_trains_nothing_before_a_refusal(digits_teacher: str, tmp_path: Path, ray_cluster: None):
    store = str(tmp_path / "store")
    make_store(store, digits_teacher, trajectories=64, shard_size=64, guidance=(0.0,))
    given, runs = "tests.feature_networks:ThreeChannels", len(runs_of("sweep"))
    spec = SweepSpec(store=store, out=str(tmp_path / "sweep"), steps=(2,), guidance=(0.0,), features=(given,))
    with pytest.raises(ArgumentError, match=f"`features` {given}.*3 channels"):
        sweep(spec)
    assert not (tmp_path / "sweep").exists() and len(runs_of("sweep")) == runs
