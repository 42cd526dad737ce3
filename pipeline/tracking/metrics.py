"""The one table of metrics."""

from collections.abc import Iterable

from kac.metrics import Metric

METRICS: dict[str, Metric] = {}
"""Every metric in MLflow by its name; ``declare`` adds them where they are computed."""

PART_PREFIX = "loss/"
"""``loss/<part>``: the parts of a loss, which need no declaration."""

SYSTEM_PREFIX = "system/"
"""``system/<name>``: what MLflow's own monitors measure."""


def declare(*metrics: Metric) -> None:
    """Add metrics to the table."""
    METRICS.update({metric.name: metric for metric in metrics})


def declared(name: str) -> Metric | None:
    """What is known of a metric, whose name may have prefixes: ``steps_4/guidance_1/<name>``; None: nothing."""
    while name not in METRICS and "/" in name:
        name = name.partition("/")[2]
    return METRICS.get(name)


def check_declared(names: Iterable[str]) -> None:
    """Refuse metrics that are not in the table.

    Raises:
        KeyError: it names them.
    """
    free = (PART_PREFIX, SYSTEM_PREFIX)
    unknown = {name for name in names if not name.startswith(free) and declared(name) is None}
    if unknown:
        raise KeyError(f"not in METRICS: {sorted(unknown)}")
