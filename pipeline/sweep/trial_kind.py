"""The interface between a sweep and the models that its trials train: students or teachers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import ray

from kac.data import DataConfig
from pipeline import tracking, training
from pipeline.config import EvaluateSpec
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.planned_trials import PlannedTrial


class TrialKind(ABC):
    """What the trials of a sweep train. ``Any`` stands for a trial's spec: a DistillSpec or a TeachSpec."""

    noun: ClassVar[str]
    made_by: ClassVar[str]
    """The name of the input in the sweep's run: the stage that made the input, or data."""
    inputs: dict[str, str]
    """The hash of the input in the sweep's fingerprint, by name. Set by ``check``."""
    dataset: tracking.LoggedDataset
    """The input. Set by ``check``."""
    data: DataConfig
    """The data that the evaluation compares with. Set by ``check``."""

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
        """Return a trial of the grid with the values that ``settle`` has determined, if it has a record."""
        return trial

    @abstractmethod
    def resolve(self, trial: PlannedTrial) -> tuple[Any, dict[str, Any]] | None:
        """Return a trial's spec as its stage resolves it, and the hashes of its inputs; None if one does not exist."""

    @abstractmethod
    def start_run(self, spec: Any, parent: tracking.TrackedRun) -> AbstractContextManager[tracking.TrackedRun]:
        """Start the run of a trial with a resolved spec."""

    @abstractmethod
    def finish(self, spec: Any) -> None:
        """Finish a complete model's run if its job left the run unfinished."""

    def share(self, specs: Sequence[Any]) -> list[ray.ObjectRef]:
        """Put inputs of the trials with these specs into Ray's object store, and return them for ``train``."""
        return []

    def settle(self, spec: Any) -> Any:
        """Return a trial's spec with all values that only the trial's process can determine."""
        return spec

    @abstractmethod
    def train(self, spec: Any, run: tracking.TrackedRun, on_report: training.OnReport, shared: Sequence[Any]) -> None:
        """Train a trial's model and write its folder. Runs in the trial's process."""

    @abstractmethod
    def evaluations(self, folders: Sequence[str]) -> list[EvaluateSpec]:
        """The evaluations of the models in these folders."""
