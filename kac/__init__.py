"""Kac flows and their distillation in plain PyTorch, independent of Ray and MLflow.

import torch
from kac import KacPath, guide, knot_times, load_model, solve

point = KacPath().sample(images, t)                     # noised images and the velocity to learn
teacher = load_model("runs/teacher")
velocity = guide(teacher.network, w=1.0, label=labels)
solution = solve(velocity, noise, knot_times(100))      # solution.x: images
samples = load_model("runs/student").sample(16, steps=1)
"""

import os

# Set this variable before torch loads OpenMP. By default, waiting OpenMP threads spin, which on a busy machine slows a
# training update from 25 ms to 800 ms. If the threads sleep instead, the update takes 32 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from kac.guidance import guide
from kac.losses.flow_matching import flow_matching_loss
from kac.losses.objectives import endpoint_loss
from kac.losses.refinement import energy_distance
from kac.metrics.distances import frechet_distance, kernel_distance, sliced_wasserstein
from kac.metrics.statistics import Moments
from kac.model import Model, ModelConfig, load_config, load_model
from kac.path import GaussianPath, KacPath
from kac.process import KacProcess
from kac.solvers import knot_times, solve

__all__ = [
    "GaussianPath",
    "KacPath",
    "KacProcess",
    "Model",
    "ModelConfig",
    "Moments",
    "endpoint_loss",
    "energy_distance",
    "flow_matching_loss",
    "frechet_distance",
    "guide",
    "kernel_distance",
    "knot_times",
    "load_config",
    "load_model",
    "sliced_wasserstein",
    "solve",
]
