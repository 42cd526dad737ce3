"""Feature spaces, which map delivered samples to rows of numbers for the metrics."""

from kac.metrics.features.space import (
    OWN,
    TORCHSCRIPT,
    FeatureSpace,
    check_features,
    check_fits,
    check_names,
    check_widths,
    open_space,
    space_identity,
    space_name,
    try_space,
)

__all__ = [
    "OWN",
    "TORCHSCRIPT",
    "FeatureSpace",
    "check_features",
    "check_fits",
    "check_names",
    "check_widths",
    "open_space",
    "space_identity",
    "space_name",
    "try_space",
]
