"""The stages as Python functions, the endpoint store, and tracking. Each function shadows the module of the same name.

Each function takes either a spec or the spec's fields as keyword arguments. The fields are the options of the command
(``python -m jobs.teach --help``); a dictionary has the options with dots, such as ``--optimizer.updates``.

    from pipeline import teach, rollout, distill, evaluate

    teacher = teach(data="moons", out="runs/teacher", optimizer={"updates": 500}, tracking=False)
    store = rollout(teacher=teacher.path, store="runs/store", trajectories=2000, tracking=False)
    student = distill(store=store.path, out="runs/student", steps=4, tracking=False)
    images = student.load().sample(16)

Each function returns an object that describes its output, or raises ``DistillKacError``. With ``tracking=False``,
MLflow records no run. Log lines go to the logger ``distillkac``. If RAY_ADDRESS is not set, every stage except
``sweep`` runs in this process without Ray, unless ``workers`` or ``actors`` is set.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from kac.model import Model, ModelConfig, load_model
from kac.util import files
from kac.util.errors import ArgumentError
from kac.util.log import show
from pipeline import store as endpoint_store
from pipeline.cluster import connection
from pipeline.config import SWEEPS, AnySweep, DistillSpec, EvaluateSpec, RolloutSpec, Spec, TeachSpec
from pipeline.distill import distill as _distill
from pipeline.evaluate.evaluate_stage import evaluate as _evaluate
from pipeline.evaluate.inputs import ANSWER_FILE
from pipeline.evaluate.scores import Score
from pipeline.rollout.rollout_stage import rollout as _rollout
from pipeline.store.manifest import Manifest
from pipeline.sweep.ledger import TrialRecord
from pipeline.sweep.sweep_stage import sweep as _sweep
from pipeline.teach import teach as _teach
from pipeline.tracking import tracking_off

AnySpec = TypeVar("AnySpec", bound=Spec)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelResult:
    """A trained model."""

    path: str  # model folder, absolute
    config: ModelConfig
    metrics: dict[str, float] = field(default_factory=dict)
    """The last metrics of the training run, such as ``loss``. Empty if the folder was complete before the call."""

    def load(self, device: torch.device | str = "cpu") -> Model:
        """Load the model."""
        return load_model(self.path, device)


@dataclass(frozen=True)
class StoreResult:
    """An endpoint store."""

    path: str  # absolute
    manifest: Manifest

    def open(self) -> endpoint_store.Store:
        """Open the store for reading."""
        return endpoint_store.open(self.path)


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    path: str  # folder with report.html, absolute
    trials: tuple[TrialRecord, ...]
    best: str | None  # model folder of the best student or teacher; None if no trial was evaluated


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of an evaluation."""

    path: str  # folder with evaluation.json and the pictures, absolute
    scores: tuple[Score, ...]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of each table row, by row name."""
        return {score.name: score.metrics for score in self.scores}


def teach(spec: TeachSpec | None = None, *, tracking: bool = True, **fields: Any) -> ModelResult:
    """Train a teacher.

    Keywords are the fields of ``TeachSpec``, such as ``data="digits"`` and ``out="runs/teacher"``.
    """
    metrics: dict[str, float] = {}
    with _stage(TeachSpec, spec, fields, tracking, workers=0) as options:
        config = _teach(options, on_report=metrics.update)
    return ModelResult(connection.absolute(options.out), _made(config), metrics)


def rollout(spec: RolloutSpec | None = None, *, tracking: bool = True, **fields: Any) -> StoreResult:
    """Write or extend an endpoint store: integrate the teacher from noise to images.

    Keywords are the fields of ``RolloutSpec``, such as ``teacher="runs/teacher"`` and ``store="runs/store"``.
    """
    with _stage(RolloutSpec, spec, fields, tracking, actors=0) as options:
        manifest = _rollout(options)
    return StoreResult(connection.absolute(options.store), _made(manifest))


def distill(spec: DistillSpec | None = None, *, tracking: bool = True, **fields: Any) -> ModelResult:
    """Train a student from a store.

    Keywords are the fields of ``DistillSpec``, such as ``store="runs/store"``, ``out="runs/student"`` and ``steps=4``.
    """
    metrics: dict[str, float] = {}
    with _stage(DistillSpec, spec, fields, tracking, workers=0) as options:
        config = _distill(options, on_report=metrics.update)
    return ModelResult(connection.absolute(options.out), _made(config), metrics)


def sweep(spec: AnySweep | None = None, *, stage: str = "distill", tracking: bool = True, **fields: Any) -> SweepResult:
    """Train and evaluate many students, or many teachers with ``stage="teach"``, on Ray Tune.

    Keywords are the fields of ``SweepSpec``, such as ``store="runs/store"``, ``out="runs/sweep"`` and ``steps=(1, 4)``,
    or of ``TeachSweepSpec``, such as ``data="digits"``, ``out="runs/paths"`` and ``grid={"path.a": (9, 25)}``.
    """
    if stage not in SWEEPS:
        raise ArgumentError(f"`stage` is {stage}, which a sweep cannot train. Choose {' or '.join(SWEEPS)}.")
    with _stage(SWEEPS[stage], spec, fields, tracking) as options:
        trials = _sweep(options)
    out = connection.absolute(options.out)
    best = json.loads(files.read_bytes(files.join(out, ANSWER_FILE)))["best"]
    return SweepResult(out, tuple(trials), best and best["out"])


def evaluate(spec: EvaluateSpec | None = None, *, tracking: bool = True, **fields: Any) -> EvaluationResult:
    """Compare a teacher and its students from the same noise.

    Keywords are the fields of ``EvaluateSpec``, such as ``teacher="runs/teacher"``, ``students=["runs/student"]``
    and ``out="runs/evaluation"``.
    """
    with _stage(EvaluateSpec, spec, fields, tracking, actors=0) as options:
        scores = _evaluate(options)
    return EvaluationResult(connection.absolute(options.out), tuple(scores))


@contextlib.contextmanager
def _stage(
    spec_type: type[AnySpec], spec: AnySpec | None, fields: dict[str, Any], tracking: bool, **in_process: Any
) -> Iterator[AnySpec]:
    """Yield the given spec, or a spec built from ``fields``.

    If RAY_ADDRESS is not set, the fields of ``in_process`` that have no value get one.
    """
    if spec is not None and fields:
        raise TypeError(f"Give either a {spec_type.__name__} or its fields, not both.")
    defaults = {} if os.environ.get(connection.RAY_ADDRESS) else in_process
    if spec is None:
        spec = spec_type(**{name: _as_text(value) for name, value in fields.items()})
    missing = {name: value for name, value in defaults.items() if getattr(spec, name) is None}
    with contextlib.nullcontext() if tracking else tracking_off():
        yield spec.model_copy(update=missing)


def _as_text(value: Any) -> Any:
    """A path, or each path of a list, as text."""
    if isinstance(value, list | tuple):
        return [_as_text(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _made(result: Result | None) -> Result:
    if result is None:
        raise ArgumentError("A dry run returns no result. Leave out `dry_run`, or run this stage as a job.")
    return result


if "ray" in sys.modules and connection.is_worker():  # Ray forwards the workers' output to the driver
    show()
