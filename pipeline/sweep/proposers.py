"""Search: distributions of the options that a search varies, and algorithms that propose values for new trials.

To add an algorithm, write a class in this module, add it to ``PROPOSERS``, and add its name to ``SweepSpec.searcher``.
"""

import math
import random
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from kac.util.errors import ArgumentError
from pipeline.config import AnySweep
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.planned_trials import PlannedTrial, axes_of, field_named, plan_trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Proposer(ABC):
    """A search algorithm."""

    uses_reports: ClassVar[bool] = True
    """Whether proposals depend on the ``SweepSpec.asha_metric`` of earlier trials."""

    def __init__(self, spec: AnySweep, ledger: Ledger) -> None:
        self.spec, self.space = spec, search_space(spec)

    @abstractmethod
    def propose(self, number: int) -> dict[str, Any]:
        """Return the values of trial ``number``, by field."""

    def observe(self, record: TrialRecord) -> None:  # noqa: B027 - optional
        """Learn from a trial that has ended."""


class RandomSearch(Proposer):
    """Random search. The values of a trial depend only on the seed and the trial's number."""

    uses_reports = False

    def propose(self, number: int) -> dict[str, Any]:
        """Return the values of trial ``number``, by field."""
        generator = random.Random(f"{self.spec.seed}-{number}")
        return {name: _sample(distribution, generator) for name, distribution in self.space.items()}


class Optuna(Proposer):
    """Optuna's TPE (tree-structured Parzen estimator), with the ledger's trials as its history."""

    def __init__(self, spec: AnySweep, ledger: Ledger) -> None:
        import optuna

        super().__init__(spec, ledger)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        records = ledger.records
        # With the same seed, a restarted sampler would repeat its first proposals.
        sampler = optuna.samplers.TPESampler(seed=spec.seed + len(records), constant_liar=True)
        self.study = optuna.create_study(sampler=sampler)
        self.proposed: dict[int, Any] = {}
        for record in records:
            if not record.is_open:
                self.observe(record)

    def propose(self, number: int) -> dict[str, Any]:
        """Return the values of trial ``number``, by field."""
        self.proposed[number] = self.study.ask(self.space)
        return dict(self.proposed[number].params)

    def observe(self, record: TrialRecord) -> None:
        """Add a finished trial to the study. A trial that stopped early counts with its last value."""
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
    """The value as the user wrote it, or None. Trial records hold typed values, but a search's choices are strings."""
    if not is_choice(distribution):
        return value
    return next((choice for choice in distribution.choices if _is_same(choice, value)), None)


def _is_same(choice: Any, value: Any) -> bool:
    try:
        return float(choice) == float(value)
    except (TypeError, ValueError):
        return str(choice) == str(value)


def is_choice(distribution: Any) -> bool:
    """Whether a distribution is a choice of values instead of a range of numbers."""
    return hasattr(distribution, "choices")


def edge_trials(spec: AnySweep) -> list[PlannedTrial]:
    """Trials that check a search: each field in turn takes its bounds or choices; others keep their first value.

    A field with a range of real numbers also takes a fraction, which a field of integers refuses.
    """
    tested: dict[str, Any] = {
        name: one.choices if is_choice(one) else (one.low, one.high, *_fractions(one))
        for name, one in search_space(spec).items()
    }
    first = {name: values[0] for name, values in tested.items()}
    return [
        plan_trial(spec, {**first, name: value}, name="trial") for name, values in tested.items() for value in values
    ]


def _fractions(distribution: Any) -> tuple[float, ...]:
    """A number inside a range of real numbers that is no integer."""
    low, high = distribution.low, distribution.high
    return () if isinstance(low, int) else (low + (high - low) / math.pi,)


def search_space(spec: AnySweep) -> "dict[str, BaseDistribution]":
    """The distribution of each field of a search. Axes of the grid become choices."""
    from optuna.distributions import CategoricalDistribution

    axes = {name: CategoricalDistribution(values) for name, values in axes_of(spec).items()}
    return {**axes, **{field_named(spec, name): _parse(name, text) for name, text in spec.search.items()}}


def _parse(field: str, text: str) -> "BaseDistribution":
    """Parse an expression such as ``loguniform(1e-4,3e-3)``. No code is evaluated."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match = re.fullmatch(r"(uniform|loguniform|randint|choice)\((.+)\)", str(text).strip())
    kind, parts = (match[1], [part.strip() for part in match[2].split(",")]) if match else ("", [])
    try:
        if kind == "choice" and all(parts):
            return CategoricalDistribution(parts)
        low, high = parts
        if kind == "randint":
            return IntDistribution(int(low), int(high))
        if kind and -math.inf < float(low) < float(high) < math.inf:
            return FloatDistribution(float(low), float(high), log=kind == "loguniform")
    except ValueError:
        pass
    raise ArgumentError(
        f"`search` cannot parse {text!r} for {field}. Use uniform(LOW,HIGH), loguniform(LOW,HIGH) with LOW above 0, "
        "randint(LOW,HIGH) or choice(VALUE,...)."
    )
