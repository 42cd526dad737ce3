"""Feature spaces: what samples are compared in. Each takes delivered samples and gives rows of numbers."""

from kac.metrics.features.space import FeatureSpace, check_names, open_space, space_identity, space_name

__all__ = ["FeatureSpace", "check_names", "open_space", "space_identity", "space_name"]
