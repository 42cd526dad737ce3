"""What is known of a number before it is computed."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A number that is logged, and how it is shown."""

    name: str  # in MLflow and in records
    meaning: str
    heading: str = ""  # of its column in the table; empty: it has none
    format: str = ".4f"
    better: Literal["lower", "higher", ""] = ""
    is_plotted: bool = False  # against network evaluations; then it must apply to teachers and students
