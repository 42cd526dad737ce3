"""The change of variables that turns a diffusion model into a velocity field of the Gaussian path.

A diffusion model is trained on z = alpha x_0 + sigma eps. The point x = z / (alpha + sigma) is on the Gaussian path
x = (1 - t) x_0 + t eps at the time t = sigma / (alpha + sigma), and the velocity there is u = eps - x_0. Every
prediction of the model (eps, x_0, v, F of EDM, or a flow's velocity) determines u exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kac.util.errors import CheckpointError, one_line

STUDENT_GAP = 0.05
"""A student that predicts eps divides by at least this value instead of 1 - t, which would amplify its output."""

EDM, FLOW = "edm", "flow"
LEAST_SIGNAL = 2.0**-24  # alpha^2 of a schedule that ends in pure noise
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
VP_PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels that a diffusion model was trained on, and what the model predicts.

    Attributes:
        prediction: epsilon, sample, v_prediction, edm or flow.
        log_ratio: [levels], log(sigma / alpha), increasing.
        timestep: [levels], the model's time input at these levels. Between levels, it is linear in ``log_ratio``.
        start: standard deviation of z from which samplers start, at the noisiest level.
        sigma_data, sign: EDM's constants of preconditioning.
    """

    prediction: str
    log_ratio: Tensor
    timestep: Tensor
    start: float = 1.0
    sigma_data: float = 0.5
    sign: float = 1.0

    @property
    def t_range(self) -> tuple[float, float]:
        """The first and the last trained time t."""
        low, high = torch.sigmoid(self.log_ratio[[0, -1]]).tolist()
        return low, high

    @property
    def slope(self) -> float:
        """Above the last trained time, x = eps (1 - slope (1 - t)) moves straight to the start of the samplers."""
        last = self.t_range[1]
        if last == 1:
            return 0.0
        alpha, sigma = (level.item() for level in self.levels(torch.tensor(last, dtype=torch.float64)))
        return float((alpha + sigma - self.start) / alpha)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at the times ``t``."""
        if self.prediction == FLOW:
            return 1 - t, t
        if self.prediction == EDM:
            return torch.ones_like(t), t / (1 - t)
        norm = ((1 - t) ** 2 + t**2).sqrt()
        return (1 - t) / norm, t / norm


def read_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the schedule of a diffusers scheduler's config. Raises ``CheckpointError`` if it cannot be represented."""
    import diffusers

    name = str(config.get("_class_name"))
    known = (*diffusers.DDPMScheduler._compatibles, *EDM_SCHEDULERS, *FLOW_SCHEDULERS)
    if name not in known:
        raise CheckpointError(
            f"the scheduler {name} is not supported. Supported are schedulers with betas (such as DDPMScheduler), EDM "
            f"({', '.join(EDM_SCHEDULERS)}) and flow matching ({', '.join(FLOW_SCHEDULERS)})."
        )
    try:
        scheduler: Any = getattr(diffusers, name).from_config(dict(config))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise CheckpointError(f"diffusers cannot build the scheduler {name}: {one_line(error)}") from None
    options = scheduler.config
    prediction = options.get("prediction_type", FLOW)
    unsupported = {
        "thresholding": options.get("thresholding"),
        "invert_sigmas": options.get("invert_sigmas"),
        "timestep_type continuous": options.get("timestep_type") == "continuous",
    }
    for option, is_set in unsupported.items():
        if is_set:
            raise CheckpointError(f"the scheduler {name} uses {option}, which is not supported. Train a teacher here.")
    if name in EDM_SCHEDULERS:
        low, high = options.sigma_min, options.sigma_max
        log_ratio = torch.tensor([low, high], dtype=torch.float64).log()
        sign = -1.0 if prediction == "v_prediction" else 1.0
        return NoiseSchedule(EDM, log_ratio, log_ratio / 4, scheduler.init_noise_sigma, options.sigma_data, sign)
    if name in FLOW_SCHEDULERS or prediction == "flow_prediction":
        ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
        return NoiseSchedule(FLOW, ends, torch.tensor([0.0, options.num_train_timesteps], dtype=torch.float64))
    signal = scheduler.alphas_cumprod.double().clamp(min=LEAST_SIGNAL)
    if prediction not in VP_PREDICTIONS or len(signal) < 2 or not bool((signal.diff() < 0).all()):
        problem = f"prediction_type {prediction}" if prediction not in VP_PREDICTIONS else "fewer than 2 positive betas"
        raise CheckpointError(f"the scheduler {name} has {problem}. Supported are {', '.join(VP_PREDICTIONS)}.")
    log_ratio = ((1 - signal).log() - signal.log()) / 2
    return NoiseSchedule(prediction, log_ratio, torch.arange(len(signal), dtype=torch.float64))
