"""Measurements with their ratios and bars, and their table and JSON record."""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch

Value = TypeVar("Value")


class Bar(NamedTuple):
    """A limit for the median ratio."""

    sign: Literal[">=", "<="]
    limit: float

    def holds(self, ratio: float) -> bool:
        """Whether the ratio is on the right side of the limit."""
        return ratio >= self.limit if self.sign == ">=" else ratio <= self.limit

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Measurement:
    """A quantity and optionally its reference, each measured once per turn."""

    what: str
    unit: str
    values: tuple[float, ...]
    against: tuple[float, ...] = ()
    bar: Bar | None = None

    def __post_init__(self) -> None:
        if not self.values or len(self.against) not in (0, len(self.values)):
            raise ValueError(f"{self.what}: both sides need the same number of values, at least one.")

    @property
    def ratios(self) -> tuple[float, ...]:
        """One ratio per turn; empty without a reference."""
        return tuple(a / b for a, b in zip(self.values, self.against, strict=False))

    @property
    def median_ratio(self) -> float | None:
        """The median of all turns; None without a reference."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def holds(self) -> bool | None:
        """Whether the median ratio meets the bar; None without a bar."""
        return self.bar.holds(self.median_ratio) if self.bar and self.median_ratio is not None else None

    def record(self) -> dict[str, Any]:
        """The measurement as plain values for JSON."""
        return {
            **dataclasses.asdict(self),
            "ratios": self.ratios,
            "median_ratio": self.median_ratio,
            "min_ratio": min(self.ratios, default=None),
            "max_ratio": max(self.ratios, default=None),
            "bar": str(self.bar) if self.bar else None,
            "holds": self.holds,
        }


def interleave(turns: int, *sides: Callable[[], Value]) -> list[tuple[Value, ...]]:
    """Call the sides alternately, A B A B ... Return one tuple of results per side."""
    rounds = [[side() for side in sides] for _ in range(turns)]
    return [tuple(values) for values in zip(*rounds, strict=True)]


def seconds_per_call(work: Callable[[], object], at_least: float = 0.1) -> float:
    """The mean seconds per call of ``work`` over ``at_least`` seconds, after one call to warm up."""
    work()
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < at_least or not calls:
        work()
        calls += 1
    return elapsed / calls


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, as in an actor or worker with one CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """The platform, cluster and package versions of the measurements."""
    import pyarrow
    import ray

    return {
        "platform": platform.platform(),
        "cpus_here": os.cpu_count(),
        "cluster": {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")},
        "nodes": len(ray.nodes()),
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, ray, pyarrow)},
    }


LINE = "{:14} {:54} {:>9} {:>9} {:14} {:>6} {:>16} {:>5} {:>7} {}"
HEAD = ("part", "what", "value", "against", "unit", "ratio", "min..max", "turns", "bar", "")


def table(results: Mapping[str, Sequence[Measurement]]) -> str:
    """The measurements as text, one line each, with medians over all turns."""
    rows = [HEAD, *(_row(part, measurement) for part in results for measurement in results[part])]
    return "\n".join(LINE.format(*row).rstrip() for row in rows)


def _row(part: str, m: Measurement) -> tuple[object, ...]:
    value, against = _short(statistics.median(m.values)), _short(statistics.median(m.against)) if m.against else ""
    ratio, spread = "", f"{_short(min(m.values))}..{_short(max(m.values))}"
    if m.ratios:
        ratio, spread = f"{m.median_ratio:.3f}", f"{min(m.ratios):.3f}..{max(m.ratios):.3f}"
    verdict = {True: "holds", False: "missed", None: ""}[m.holds]
    return part, m.what, value, against, m.unit, ratio, spread, len(m.values), str(m.bar or ""), verdict


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
