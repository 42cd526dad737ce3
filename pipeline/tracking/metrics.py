"""The table of all metrics."""

from collections.abc import Iterable

from kac.metrics import Metric

METRICS: dict[str, Metric] = {}
"""Every metric that is logged to MLflow, by name. The modules that compute metrics add them with ``declare``."""

PART_PREFIX = "loss/"
"""Prefix for the parts of a loss, ``loss/<part>``, which need no declaration."""

DIAGNOSTIC_PREFIX = "diagnostic/"
"""Prefix for an objective's diagnostics, ``diagnostic/<name>``, which need no declaration."""

SYSTEM_PREFIX = "system/"
"""Prefix for the measurements of MLflow's monitors, ``system/<name>``."""


def declare(*metrics: Metric) -> None:
    """Add metrics to the table."""
    METRICS.update({metric.name: metric for metric in metrics})


def declared(name: str) -> Metric | None:
    """A metric's declaration, or None. The metric's name may have prefixes, as in ``steps_4/guidance_1/<name>``."""
    while name not in METRICS and "/" in name:
        name = name.partition("/")[2]
    return METRICS.get(name)


def check_declared(names: Iterable[str]) -> None:
    """Raise a ``KeyError`` that lists the undeclared metrics, if any metric is undeclared."""
    undeclared = (PART_PREFIX, DIAGNOSTIC_PREFIX, SYSTEM_PREFIX)
    unknown = {name for name in names if not name.startswith(undeclared) and declared(name) is None}
    if unknown:
        raise KeyError(f"These metrics are not in METRICS: {sorted(unknown)}. Declare them with tracking.declare.")
