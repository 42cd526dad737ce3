"""The stages on Ray, the endpoint store, and tracking.

The names of the stages here are functions (``pipeline.api``), which replace the modules of the same name:
``from pipeline import teach``.
"""

import sys

from kac.util.log import show
from pipeline.api import (
    EvaluationResult,
    ModelResult,
    StoreResult,
    SweepResult,
    distill,
    evaluate,
    rollout,
    sweep,
    teach,
)
from pipeline.cluster.connection import is_worker

__all__ = [
    "EvaluationResult",
    "ModelResult",
    "StoreResult",
    "SweepResult",
    "distill",
    "evaluate",
    "rollout",
    "sweep",
    "teach",
]

if "ray" in sys.modules and is_worker():  # Ray carries the output of its workers to the driver
    show()
