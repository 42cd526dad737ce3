"""The claims of the papers on Kac flows, measured on trained networks.

Each claim has one module, which measures it, states the result in a sentence and draws a picture. Quality is measured
on delivered images. Velocities and energies are measured on the network's raw output.
"""

from collections.abc import Callable

from kac.study import (
    compute,
    guidance_scales,
    marginals,
    memorisation,
    paths,
    plane,
    solver_steps,
    speed_limit,
    stability,
)
from kac.study.subject import ClaimResult, Inputs, StudyModel, Training, Trajectories

MEASURES: dict[str, Callable[[Inputs], ClaimResult | str]] = {
    "stability": stability.measure,
    "speed": speed_limit.measure,
    "solver": solver_steps.measure,
    "guidance": guidance_scales.measure,
    "memorisation": memorisation.measure,
    "marginals": marginals.measure,
    "plane": plane.measure,
    "paths": paths.measure,
    "compute": compute.measure,
}
"""Functions that measure the claims. Each function returns a result, or the reason why the claim is left out."""

__all__ = ["MEASURES", "ClaimResult", "Inputs", "StudyModel", "Training", "Trajectories"]
