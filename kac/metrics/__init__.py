"""Metrics of sample quality.

To add a metric, write a function and add a line to ``quality.QUALITY``. To add a feature space, write a function and
register it in ``features.open_space``. The new metric or space then appears in the table, MLflow, the
report and the plots.
"""

from kac.metrics.quality import QUALITY, Evaluated, Metric, QualityMetric, Reference, quality_metrics
from kac.metrics.statistics import Moments, Statistics

__all__ = ["QUALITY", "Evaluated", "Metric", "Moments", "QualityMetric", "Reference", "Statistics", "quality_metrics"]
