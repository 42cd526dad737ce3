"""Refinement: a student's images are brought to the training images, class by class; the data are what it learns now.

A student that follows its teacher can be no better than the teacher. Here images are drawn from the student in a few
steps, delivered, and compared with real ones by an energy distance (G. J. Szekely and M. L. Rizzo, J. Stat. Plan.
Inference 143, 2013) in one or several spaces:

    D = 2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0, and 0 only where X and Y have one law.

X and Y are joined with their classes, so that each class is matched with itself. The objective of the student stays as
the anchor: without it precision is lost.
"""

from kac.losses.refinement.config import DataRefinementConfig, NoRefinementConfig, RefinementConfig
from kac.losses.refinement.energy import refinement_loss, straight_through
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
