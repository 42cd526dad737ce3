"""Measurements with their ratios and bars, and their table and JSON record."""

import dataclasses
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Measurement:
    """A quantity and optionally its reference, each measured once per turn."""

    what: str
    unit: str
    values: tuple[float, ...]
    against: tuple[float, ...] = ()
    bar: str | None = None  # limit for the median ratio, such as ">= 0.95"

    @property
    def ratios(self) -> tuple[float, ...]:
        """One ratio per turn; empty without a reference."""
        return tuple(a / b for a, b in zip(self.values, self.against, strict=True)) if self.against else ()

    @property
    def holds(self) -> bool | None:
        """Whether the median ratio meets the bar; None without a bar."""
        if self.bar is None:
            return None
        ratio, (sign, limit) = statistics.median(self.ratios), self.bar.split()
        return ratio >= float(limit) if sign == ">=" else ratio <= float(limit)

    def record(self) -> dict[str, Any]:
        """The measurement as plain values for JSON."""
        return {
            **dataclasses.asdict(self),
            "ratios": self.ratios,
            "median_ratio": statistics.median(self.ratios) if self.ratios else None,
            "min_ratio": min(self.ratios, default=None),
            "max_ratio": max(self.ratios, default=None),
            "holds": self.holds,
        }


def interleave(turns: int, *sides: Callable[[], Value]) -> list[tuple[Value, ...]]:
    """Call the sides alternately, A B A B ... Return one tuple of results per side."""
    rounds = [[side() for side in sides] for _ in range(turns)]
    return [tuple(values) for values in zip(*rounds, strict=True)]


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
    lines: list[tuple[object, ...]] = [HEAD]
    for part, measurements in results.items():
        for m in measurements:
            value, against = (_short(statistics.median(side)) if side else "" for side in (m.values, m.against))
            ratio = f"{statistics.median(m.ratios):.3f}" if m.ratios else ""
            low, high = (f"{end(m.ratios):.3f}" if m.ratios else _short(end(m.values)) for end in (min, max))
            verdict = {True: "holds", False: "missed", None: ""}[m.holds]
            line = (part, m.what, value, against, m.unit, ratio, f"{low}..{high}", len(m.values), m.bar or "", verdict)
            lines.append(line)
    return "\n".join(LINE.format(*line).rstrip() for line in lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
