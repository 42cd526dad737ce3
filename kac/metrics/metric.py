"""The name and description of a metric."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A metric that is logged, and how it is displayed."""

    name: str  # in MLflow and in stored records
    meaning: str
    heading: str = ""  # of its column in the table; empty: no column
    format: str = ".4f"
    better: Literal["lower", "higher", ""] = ""
    is_plotted: bool = False  # against network evaluations; only for metrics of both teachers and students
