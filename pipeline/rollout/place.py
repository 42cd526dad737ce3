"""Where a rollout runs: in this process, or on actors of Ray Data."""

from typing import NamedTuple

import torch

from pipeline import cluster
from pipeline.config import RolloutSpec


class Place(NamedTuple):
    """Where a rollout runs."""

    actors: int  # 0: in this process, without Ray
    gpus_per_actor: float  # 0: they compute on CPUs

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on GPUs."""
        return self.gpus_per_actor > 0 if self.actors else torch.cuda.is_available()

    def __str__(self) -> str:
        if not self.actors:
            return f"in this process on the {'GPU' if self.on_gpu else 'CPU'}"
        share = f"{self.gpus_per_actor:g} GPU" if self.on_gpu else "1 CPU"
        return f"on {self.actors} actor{'s' * (self.actors > 1)} with {share} each"


def choose_place(spec: RolloutSpec) -> Place:
    """As the spec says; by default as many actors as the cluster's GPUs have room for, or one a CPU without GPUs."""
    if spec.actors == 0:
        return Place(0, 0)
    resources = cluster.connect()
    if not (resources.gpus > 0 if spec.gpu is None else spec.gpu):
        return Place(spec.actors or resources.cpus, 0)
    room = int(resources.gpus / spec.gpus_per_actor + 1e-9)
    return Place(spec.actors or max(1, room), spec.gpus_per_actor)
