"""Refinement: training that moves a student's images towards the training images of the same class.

A student that only imitates its teacher cannot become better than the teacher. Refinement generates student images in a
few steps, clips and rounds them, and compares them with training images by a distance in one or several feature
spaces. The compared points include the classes, so images are compared class by class. The student's objective remains
in the loss as an anchor, because precision drops without it.
"""

from kac.losses.refinement.config import DataRefinementConfig, NoRefinementConfig, RefinementConfig
from kac.losses.refinement.loss import refinement_loss, straight_through
from kac.losses.refinement.spaces import RefinementSpace, check_spaces, open_spaces

__all__ = [
    "DataRefinementConfig",
    "NoRefinementConfig",
    "RefinementConfig",
    "RefinementSpace",
    "check_spaces",
    "open_spaces",
    "refinement_loss",
    "straight_through",
]
