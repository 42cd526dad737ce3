"""Where a rollout or an evaluation computes: in this process, or on Ray actors."""

import math
from typing import NamedTuple

import torch

from kac.util.errors import ArgumentError
from kac.util.options import Range, most
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement
from pipeline.cluster.placement import Share
from pipeline.config import EvaluateSpec, RolloutSpec


class Place(NamedTuple):
    """The number of actors, and their resources."""

    actors: int | Range  # 0: in this process, without Ray
    share: Share = Share(1.0)  # resources of each actor; without a GPU it computes on CPUs

    @property
    def on_gpu(self) -> bool:
        """Whether the work is computed on GPUs."""
        return self.share.gpus > 0 if self.actors else torch.cuda.is_available()

    def __str__(self) -> str:
        if not self.actors:
            return f"in this process on the {'GPU' if self.on_gpu else 'CPU'}"
        number = str(self.actors).replace(":", " to ")
        return f"on {number} actor{'s' * (self.actors != 1)} with {self.share} each"

    def for_work(self, parts: int) -> "Place":
        """The same place with at most one actor per part of the work."""
        if isinstance(self.actors, Range) and self.actors.least < parts:
            return self._replace(actors=Range(self.actors.least, min(self.actors.most, parts)))
        return self._replace(actors=min(most(self.actors), parts))


def choose_place(spec: RolloutSpec | EvaluateSpec) -> Place:
    """The place that the spec asks for; by default as many actors as fit on the nodes, on GPUs if there are any.

    Raises:
        ArgumentError: without actors, labels were given, or a GPU that this machine does not have.
    """
    if spec.actors == 0:
        if spec.label_selector:
            raise ArgumentError("`label_selector` needs actors, but `actors` is 0. Leave out one of them.")
        if spec.gpu and not Place(0).on_gpu:
            raise ArgumentError("`gpu` with `actors` 0 needs a GPU in this machine, which has none. Leave out `gpu`.")
        return Place(0)
    gpus = cluster.connect().gpus
    on_gpu = gpus > 0 if spec.gpu is None else spec.gpu
    cpus = spec.cpus_per_actor if spec.cpus_per_actor is not None else 0.0 if on_gpu else 1.0
    share = Share(cpus, spec.gpus_per_actor if on_gpu else 0.0, spec.label_selector)
    if spec.actors is not None:
        return Place(spec.actors, share)
    room = placement.room(placement.alive(), share)
    return Place(max(1, int(room)) if math.isfinite(room) else 1, share)
