"""Tracking: one table of metrics."""

import importlib
from typing import Any

import pytest

from pipeline import tracking


@pytest.mark.parametrize("name", ["speed", "losses/endpoint", "Loss"])
def test_other_metrics_than_those_of_the_table_are_refused(name: str):
    with pytest.raises(KeyError, match=name):
        tracking.TrackedRun("sqlite://", "none").metrics({name: 1.0})


def test_parts_of_the_loss_are_logged_by_name(monkeypatch: pytest.MonkeyPatch):
    logged: dict[str, float] = {}

    class Client:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            logged.update({metric.key: metric.value for metric in metrics})

    monkeypatch.setattr(tracking.TrackedRun, "_client", lambda self: Client())
    tracking.TrackedRun("sqlite://", "none").metrics({"loss": 3.0, "loss/endpoint": 1.0, "loss/energy": 2.0})
    assert logged == {"loss": 3.0, "loss/endpoint": 1.0, "loss/energy": 2.0}


def test_every_stages_metrics_are_in_the_table():
    importlib.import_module("pipeline.training")
    importlib.import_module("pipeline.rollout")
    importlib.import_module("pipeline.evaluate")
    assert {
        "frechet_distance_pixels",
        "label_agreement",
        "loss",
        "learning_rate",
        "samples_per_second",
        "trajectories",
    } <= set(tracking.METRICS)
    assert all(name == metric.name and metric.meaning for name, metric in tracking.METRICS.items())
