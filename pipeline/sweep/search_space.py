"""The search space: the distribution of each field that a search draws."""

import math
import re
from typing import TYPE_CHECKING, Any

from kac.util.errors import ArgumentError
from pipeline.config import SweepSpec
from pipeline.sweep.planned_trials import PlannedTrial, axes_of, field_named, plan_trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def search_space(spec: SweepSpec) -> "dict[str, BaseDistribution]":
    """The distribution of each field of a search. Axes of the grid become choices.

    Raises:
        ArgumentError: an expression cannot be parsed, or ``axes_of`` raises.
    """
    from optuna.distributions import CategoricalDistribution

    searched = {field_named(name): _parse(name, text) for name, text in spec.search.items()}
    return {**{name: CategoricalDistribution(values) for name, values in axes_of(spec).items()}, **searched}


def is_choice(distribution: Any) -> bool:
    """Whether a distribution is a choice of values instead of a range of numbers."""
    return hasattr(distribution, "choices")


def edge_trials(spec: SweepSpec) -> list[PlannedTrial]:
    """Trials of a search, for checks: each field in turn takes its bounds or choices, the others their first.

    Raises:
        ArgumentError: a trial is not valid.
    """
    tested: dict[str, Any] = {
        name: one.choices if is_choice(one) else (one.low, one.high) for name, one in search_space(spec).items()
    }
    first = {name: values[0] for name, values in tested.items()}
    return [
        plan_trial(spec, {**first, name: value}, name="trial") for name, values in tested.items() for value in values
    ]


def _parse(field: str, text: str) -> "BaseDistribution":
    """Parse an expression such as ``loguniform(1e-4,3e-3)``. No code is evaluated.

    Raises:
        ArgumentError: the expression cannot be parsed.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match = re.fullmatch(r"(uniform|loguniform|randint|choice)\((.+)\)", str(text).strip())
    kind, parts = (match[1], [part.strip() for part in match[2].split(",")]) if match else ("", [])
    try:
        if kind == "choice" and all(parts):
            return CategoricalDistribution(parts)
        low, high = parts
        if kind == "randint" and int(low) <= int(high):
            return IntDistribution(int(low), int(high))
        lowest = 0.0 if kind == "loguniform" else -math.inf
        if kind in {"uniform", "loguniform"} and lowest < float(low) < float(high) < math.inf:
            return FloatDistribution(float(low), float(high), log=kind == "loguniform")
    except ValueError:
        pass
    raise ArgumentError(
        f"`search` cannot parse {text!r} for {field}. Use uniform(LOW,HIGH), loguniform(LOW,HIGH) with LOW above 0, "
        "randint(LOW,HIGH) or choice(VALUE,...)."
    )
