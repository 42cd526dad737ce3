"""How good samples are. A new metric is one function and its line in ``quality.QUALITY``; a new feature space is one
function and its line in ``features.space.KINDS``. Table, MLflow, report and plots take both from there.
"""

from kac.metrics.metric import Metric
from kac.metrics.quality import QUALITY, Judged, QualityMetric, Reference, quality_metrics
from kac.metrics.statistics import Moments, Statistics

__all__ = ["QUALITY", "Judged", "Metric", "Moments", "QualityMetric", "Reference", "Statistics", "quality_metrics"]
