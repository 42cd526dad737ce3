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


def check_declared(names: Iterable[str]) -> None:
    """Refuse metrics that are not in the table; a name may have prefixes: ``steps_4/guidance_1/<name>``.

    Raises:
        KeyError: it names them.
    """
    unknown = {
        name
        for name in names
        if not name.startswith((PART_PREFIX, SYSTEM_PREFIX)) and not {name, name.rsplit("/", 1)[-1]} & set(METRICS)
    }
    if unknown:
        raise KeyError(f"not in METRICS: {sorted(unknown)}")
