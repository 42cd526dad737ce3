"""Metrics of sample quality.

To add a metric, write a function and add a line to ``quality.QUALITY``. To add a feature space, write a function and
register it in ``features.open_space``. The table, MLflow, the report and the plots then show it.
"""

from kac.metrics.quality import QUALITY, Evaluated, Metric, QualityMetric, Reference, quality_metrics
from kac.metrics.statistics import Moments, Statistics

__all__ = ["QUALITY", "Evaluated", "Metric", "Moments", "QualityMetric", "Reference", "Statistics", "quality_metrics"]
