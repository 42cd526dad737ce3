"""Where a rollout or an evaluation computes: in this process, or on Ray actors."""

import math
from typing import NamedTuple

import torch

from kac.util.errors import ArgumentError
from kac.util.options import Range, most
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement
from pipeline.cluster.placement import Resources
from pipeline.config import ActorOptions


class ActorGroup(NamedTuple):
    """The number of actors, and their resources."""

    actors: int | Range  # 0: in this process, without Ray
    resources: Resources = Resources(1.0)  # resources of each actor; without a GPU it computes on CPUs

    @property
    def on_gpu(self) -> bool:
        """Whether the work is computed on GPUs."""
        return self.resources.gpus > 0 if self.actors else torch.cuda.is_available()

    def __str__(self) -> str:
        if not self.actors:
            return f"in this process on the {'GPU' if self.on_gpu else 'CPU'}"
        number = str(self.actors).replace(":", " to ")
        return f"on {number} actor{'s' * (self.actors != 1)} with {self.resources} each"

    def for_work(self, parts: int) -> "ActorGroup":
        """The group with at most one actor per part of the work."""
        if isinstance(self.actors, Range) and self.actors.least < parts:
            return self._replace(actors=Range(self.actors.least, min(self.actors.most, parts)))
        return self._replace(actors=min(most(self.actors), parts))


def choose_actors(options: ActorOptions) -> ActorGroup:
    """The actors that the options ask for; by default as many as fit on the nodes, on GPUs if there are any.

    Raises:
        ArgumentError: without actors, labels were given, or a GPU that this machine does not have.
    """
    if options.actors == 0:
        if options.label_selector:
            raise ArgumentError("`label_selector` needs actors, but `actors` is 0. Leave out one of them.")
        if options.gpu and not ActorGroup(0).on_gpu:
            raise ArgumentError("`gpu` with `actors` 0 needs a GPU in this machine, which has none. Leave out `gpu`.")
        return ActorGroup(0)
    gpus = cluster.connect().gpus
    on_gpu = gpus > 0 if options.gpu is None else options.gpu
    cpus = options.cpus_per_actor if options.cpus_per_actor is not None else 0.0 if on_gpu else 1.0
    resources = Resources(cpus, options.gpus_per_actor if on_gpu else 0.0, options.label_selector)
    if options.actors is not None:
        return ActorGroup(options.actors, resources)
    fitting = placement.capacity(resources)
    return ActorGroup(max(1, int(fitting)) if math.isfinite(fitting) else 1, resources)
