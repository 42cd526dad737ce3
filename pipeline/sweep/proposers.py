"""Search algorithms, which propose the values of new trials.

To add one, write a class here, add it to ``PROPOSERS``, and add its name to ``SweepSpec.searcher``.
"""

import math
import random
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from kac.util import files
from pipeline.config import SweepSpec
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.search_space import is_choice, search_space

OPTUNA_FILE = "optuna.log"


class Proposer(ABC):
    """A search algorithm."""

    uses_reports: ClassVar[bool] = True
    """Whether the values that it proposes depend on ``SweepSpec.asha_metric`` of earlier trials."""

    def __init__(self, spec: SweepSpec, ledger: Ledger) -> None:
        self.spec, self.space = spec, search_space(spec)

    @abstractmethod
    def propose(self, number: int) -> dict[str, Any]:
        """The values of trial ``number`` by field."""

    def observe(self, record: TrialRecord) -> None:  # noqa: B027 - optional
        """Learn from a trial that has ended."""


class RandomSearch(Proposer):
    """Random search. The values of a trial depend only on the seed and the trial's number."""

    uses_reports = False

    def propose(self, number: int) -> dict[str, Any]:
        """The values of trial ``number`` by field."""
        generator = random.Random(f"{self.spec.seed}-{number}")
        return {name: _sample(distribution, generator) for name, distribution in self.space.items()}


class Optuna(Proposer):
    """Optuna's TPE (tree-structured Parzen estimator), with the trials of the ledger as its history.

    Each start rebuilds the study from the ledger, which is never behind the study. A local sweep also writes the study
    to OUT/optuna.log for Optuna's dashboard.
    """

    def __init__(self, spec: SweepSpec, ledger: Ledger) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        super().__init__(spec, ledger)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = None
        if "://" not in spec.out:
            path = files.join(spec.out, OPTUNA_FILE)
            files.write_bytes(path, b"")
            storage = JournalStorage(JournalFileBackend(path))
        records = ledger.records
        # With the same seed, a restarted sampler would repeat its first proposals.
        sampler = optuna.samplers.TPESampler(seed=spec.seed + len(records), constant_liar=True)
        self.study = optuna.create_study(storage=storage, sampler=sampler, study_name="distillkac")
        self.proposed: dict[int, Any] = {}
        for record in records:
            if not record.is_open:
                self.observe(record)

    def propose(self, number: int) -> dict[str, Any]:
        """The values of trial ``number`` by field."""
        self.proposed[number] = self.study.ask(self.space)
        return dict(self.proposed[number].params)

    def observe(self, record: TrialRecord) -> None:
        """Add a trial that has ended to the study. A trial that stopped early counts with its last value."""
        from optuna.trial import TrialState, create_trial

        value = record.metrics.get(self.spec.asha_metric, math.nan)
        has_failed = record.status == "failed" or math.isnan(value)
        outcome = {"state": TrialState.FAIL} if has_failed else {"state": TrialState.COMPLETE, "value": value}
        values = {name: _as_given(one, record.values.get(name)) for name, one in self.space.items()}
        if record.number in self.proposed:
            self.study.tell(self.proposed.pop(record.number), outcome.get("value"), outcome["state"])
        elif None not in values.values():
            self.study.add_trial(create_trial(params=values, distributions=self.space, **outcome))


PROPOSERS: dict[str, type[Proposer]] = {"random": RandomSearch, "optuna": Optuna}
"""Search algorithms by ``SweepSpec.searcher``."""


def _sample(distribution: Any, generator: random.Random) -> Any:
    if is_choice(distribution):
        return generator.choice(distribution.choices)
    low, high = distribution.low, distribution.high
    if isinstance(low, int):
        return generator.randint(low, high)
    if distribution.log:
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


def _as_given(distribution: Any, value: Any) -> Any:
    """The value as the user wrote it: a record has typed values, but a choice has text. None if no choice matches."""
    if not is_choice(distribution):
        return value
    return next((choice for choice in distribution.choices if _is_same(choice, value)), None)


def _is_same(choice: Any, value: Any) -> bool:
    try:
        return float(choice) == float(value)
    except (TypeError, ValueError):
        return str(choice) == str(value)
