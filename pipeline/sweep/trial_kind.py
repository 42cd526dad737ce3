"""The interface between a sweep and the models that its trials train: students or teachers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

from kac.data import DataConfig
from pipeline import tracking, training
from pipeline.config import EvaluateSpec
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.planned_trials import PlannedTrial


class ResolvedTrial(NamedTuple):
    """A trial's spec as its stage resolves it, and how to record a complete model."""

    spec: Any
    content: dict[str, Any]  # hashes of the inputs, which are part of the model's fingerprint
    start_run: Callable[[tracking.TrackedRun], AbstractContextManager[tracking.TrackedRun]]  # takes the parent
    finish: Callable[[], object]  # finishes the model's run if its job left the run unfinished


class TrialKind(ABC):
    """What the trials of a sweep train. ``Any`` stands for a trial's spec: a DistillSpec or a TeachSpec."""

    noun: ClassVar[str]
    made_by: ClassVar[str]
    """The name of the input in the sweep's run: the stage that made the input, or data."""
    inputs: dict[str, str]
    """The hash of the input in the sweep's fingerprint, by name. Set by ``check``."""
    dataset: tracking.LoggedDataset
    """The input. Set by ``check``."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    @abstractmethod
    def check(self, trials: Sequence[PlannedTrial]) -> None:
        """Check every trial against the input, before any work. Call this method before the methods below.

        Raises:
            DistillKacError: options conflict, or an input is missing or does not fit the trials.
        """

    def add_inputs(self) -> None:  # noqa: B027 - optional
        """Compute missing inputs before the first trial."""

    def replan(self, trial: PlannedTrial, ledger: Ledger) -> PlannedTrial:
        """Return a trial of the grid with the number of updates in its record, if that was measured."""
        return trial

    @abstractmethod
    def resolve(self, trial: PlannedTrial) -> ResolvedTrial | None:
        """Resolve a planned trial; return None if one of its inputs does not exist yet."""

    def share(self, specs: Sequence[Any]) -> list[Any]:
        """Put inputs of the trials with these specs into Ray's object store; return their references for ``train``."""
        return []

    def measured_updates(self, spec: Any) -> int | None:
        """Return the number of updates that a budget allows, measured in the trial's process; None without a budget."""
        return None

    @abstractmethod
    def train(self, spec: Any, run: tracking.TrackedRun, on_report: training.OnReport, shared: Sequence[Any]) -> None:
        """Train a trial's model and write its folder. Runs in the trial's process."""

    @abstractmethod
    def data(self) -> DataConfig:
        """The data that the evaluations compare with."""

    @abstractmethod
    def evaluations(self, folders: Sequence[str]) -> list[EvaluateSpec]:
        """The evaluations of the models in these folders."""

    def _evaluation(self, **options: Any) -> EvaluateSpec:
        """An evaluation with the sweep's options."""
        shared = {name: getattr(self.spec, name) for name in ("samples", "features", "label_selector")}
        return EvaluateSpec(**shared, **options)
