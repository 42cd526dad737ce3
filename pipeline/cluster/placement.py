"""The resources that workers, actors and trials need, and whether the cluster has or can get them.

Ray waits silently for resources that no node can provide, so stages call ``wait_for_capacity`` first. It returns at
once if the live nodes have the resources, even if other jobs are using them, because Ray queues the work. Otherwise it
waits for nodes that may still join (``JOIN_SECONDS``) or that an autoscaler may start (``START_SECONDS``), and then
raises an error. During the wait, a pending placement group shows the autoscaler which resources are missing.
"""

import contextlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from kac.networks.cost import duration
from kac.util.errors import ArgumentError
from kac.util.log import log
from kac.util.options import Range, least, most
from pipeline.cluster import connection as cluster
from pipeline.cluster import ray_internals
from pipeline.config import ActorOptions

JOIN_SECONDS, JOIN_VARIABLE = 30.0, "DISTILLKAC_JOINING_SECONDS"
START_SECONDS, START_VARIABLE = 1200.0, "DISTILLKAC_STARTING_SECONDS"
"""How long to wait for nodes to join, and for an autoscaler to start nodes. The variables override the times."""

POLL_SECONDS = 1.0

HIDE_GPUS = "would still use the GPU of this machine. Set CUDA_VISIBLE_DEVICES to an empty value instead."

NODE_GROUP_LABEL = "ray.io/node-group"
"""Ray adds this label to the nodes of a cluster with an autoscaler."""


class Resources(NamedTuple):
    """The resources that one worker, actor or trial needs on a node."""

    cpus: float
    gpus: float = 0.0
    label_selector: Mapping[str, str] = {}

    @property
    def by_ray_name(self) -> dict[str, float]:
        """The resources above 0, by Ray's names."""
        return {name: value for name, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value}

    @property
    def remote_options(self) -> dict[str, Any]:
        """Options for a Ray task or actor."""
        labels = {"label_selector": dict(self.label_selector)} if self.label_selector else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **labels}

    def __str__(self) -> str:
        needed = ", ".join(f"{value:g} {name}" for name, value in self.by_ray_name.items()) or "no CPU"
        labels = ", ".join(f"{key}={value}" for key, value in self.label_selector.items())
        return f"{needed} on nodes with {labels}" if labels else needed


class Node(NamedTuple):
    """The resources, labels and machine of a node."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]
    address: str = ""

    def capacity(self, resources: Resources) -> float:
        """The number of workers with these resources that fit on the node, or infinity if they need no resources."""
        if not all(_matches(self.labels.get(key), wanted) for key, wanted in resources.label_selector.items()):
            return 0
        counts = [int(self.resources.get(name, 0) / needed + 1e-9) for name, needed in resources.by_ray_name.items()]
        if 0 < resources.gpus < 1:  # a worker cannot use parts of two GPUs
            counts.append(int(self.resources.get("GPU", 0)) * int(1 / resources.gpus + 1e-9))
        return min(counts, default=math.inf)

    def __str__(self) -> str:
        sizes = [f"{self.resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
        labels = [f"{key}={value}" for key, value in self.labels.items() if key != "ray.io/node-id"]
        return ", ".join(sizes + labels)


def _matches(value: str | None, wanted: str) -> bool:
    """Whether a node's label matches a Ray label selector: V, !V, in(V, W) or !in(V, W)."""
    inside = re.fullmatch(r"in\((.*)\)", wanted.removeprefix("!"))
    values = [part.strip() for part in inside[1].split(",")] if inside else [wanted.removeprefix("!")]
    return (value in values) != wanted.startswith("!")


class ActorGroup(NamedTuple):
    """The actors of a rollout or an evaluation, and the resources that each actor needs."""

    actors: int | Range  # 0: in this process, without Ray
    resources: Resources = Resources(1.0)

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
        """Return the group, limited to one actor per part of the work."""
        if isinstance(self.actors, Range) and self.actors.least < parts:
            return self._replace(actors=Range(self.actors.least, min(self.actors.most, parts)))
        return self._replace(actors=min(most(self.actors), parts))


def choose_actors(options: ActorOptions) -> ActorGroup:
    """Choose the actors from the options. By default, fill the nodes with actors, on GPUs if there are any.

    Raises:
        ArgumentError: ``actors`` is 0, but the options request labels, or a GPU that this machine does not have.
    """
    if options.actors == 0:
        if options.label_selector:
            raise ArgumentError("`label_selector` needs actors, but `actors` is 0. Leave out one of the two.")
        if options.gpu is False and ActorGroup(0).on_gpu:
            raise ArgumentError(f"`gpu` False with `actors` 0 {HIDE_GPUS}")
        if options.gpu and not ActorGroup(0).on_gpu:
            raise ArgumentError("`gpu` with `actors` 0 needs a GPU in this machine, which has none. Leave out `gpu`.")
        return ActorGroup(0)
    gpus = cluster.connect().gpus
    on_gpu = gpus > 0 if options.gpu is None else options.gpu
    cpus = options.cpus_per_actor if options.cpus_per_actor is not None else 0.0 if on_gpu else 1.0
    resources = Resources(cpus, options.gpus_per_actor if on_gpu else 0.0, options.label_selector)
    if options.actors is not None:
        return ActorGroup(options.actors, resources)
    fitting = capacity(resources)
    return ActorGroup(max(1, int(fitting)) if math.isfinite(fitting) else 1, resources)


def hide_unassigned_gpus() -> None:
    """Hide all GPUs from an actor or a trial that has none. Ray does not. Call this before the first use of a GPU."""
    import ray

    if cluster.is_worker() and not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def wait_for_capacity(stage: str, option: str, count: int | Range, resources: Resources) -> None:
    """Wait until the nodes can fit ``count`` workers, or the minimum of a range.

    Args:
        option: the argument that requests the workers, such as "`workers`".
        resources: resources of each worker.

    Raises:
        ArgumentError: no nodes can provide the resources, or Ray does not accept the labels.
    """
    if error := ray_internals.label_selector_error(resources.label_selector):
        labels = " ".join(f"{key}={value}" for key, value in resources.label_selector.items())
        raise ArgumentError(f"`label_selector` is {labels}, which Ray does not accept: {error.strip().rstrip('.')}.")
    wanted = least(count)
    if capacity(resources) >= wanted:
        if not ray_internals.is_embedded() and free_capacity(resources) < wanted:
            log.info(f"{stage}: waiting until other work on the cluster releases {wanted} x ({resources})")
        return
    join_seconds, start_seconds = _seconds(JOIN_VARIABLE, JOIN_SECONDS), _seconds(START_VARIABLE, START_SECONDS)
    reason = "An embedded Ray cluster uses only this machine. Request fewer resources, or set RAY_ADDRESS."
    if not ray_internals.is_embedded():
        log.info(
            f"{stage}: waiting for nodes that can fit {wanted} x ({resources}): at most {duration(join_seconds)}, or "
            f"{duration(start_seconds)} with an autoscaler"
        )
        started = time.monotonic()
        with requested_from_autoscaler(wanted, resources) as request:
            while True:
                may_grow, state = _autoscaler_state(resources, request)
                if capacity(resources) >= wanted:
                    return
                waited = time.monotonic() - started
                if waited >= (start_seconds if may_grow else join_seconds):
                    break
                time.sleep(POLL_SECONDS)
        reason = f"{state}. Waited {duration(waited)}. Start nodes, or request fewer resources."
    raise ArgumentError(
        f"{option}: the nodes cannot fit {wanted} x ({resources}). They have {describe_nodes(live_nodes())}, enough "
        f"for {capacity(resources):g}. {reason}"
    )


def _seconds(variable: str, default: float) -> float:
    given = os.environ.get(variable) or default
    try:
        return float(given)
    except ValueError:
        raise ArgumentError(f"{variable} is {given!r}. Set it to a number of seconds, or unset it.") from None


@contextlib.contextmanager
def requested_from_autoscaler(wanted: int, resources: Resources) -> Iterator[str]:
    """Request the resources from the autoscaler while the block runs. Yields the id of the request."""
    from ray.util import placement_group, remove_placement_group

    labels = [dict(resources.label_selector)] * wanted if resources.label_selector else None
    group = placement_group([resources.by_ray_name or {"CPU": 0.001}] * wanted, bundle_label_selector=labels)
    try:
        yield group.id.hex()
    finally:
        remove_placement_group(group)


def _autoscaler_state(resources: Resources, request: str) -> tuple[bool, str]:
    """Whether an autoscaler may still add the requested nodes, and a description of the autoscaler's state."""
    if not has_autoscaler(live_nodes()):
        return False, "There is no autoscaler to add nodes"
    state = ray_internals.autoscaling_state()
    if state.pending_instances or state.pending_instance_requests:
        return True, "The nodes that the autoscaler requested have not joined"
    if any(gang.details.startswith(request) for gang in state.infeasible_gang_resource_requests):
        # The request may become feasible when other jobs release nodes.
        return free_capacity(resources) < capacity(resources), "The autoscaler cannot add such nodes"
    return True, "The autoscaler has not added any nodes"


def capacity(resources: Resources) -> float:
    """The number of workers with these resources that fit on the live nodes."""
    return sum(node.capacity(resources) for node in live_nodes())


def free_capacity(resources: Resources) -> float:
    """The number of workers with these resources that fit on the live nodes alongside the work running there now."""
    return sum(node.capacity(resources) for node in free_resources())


def live_nodes() -> list[Node]:
    """The live nodes of the cluster that are not draining, with their total resources."""
    nodes = _listed_nodes()
    return [Node(node["Resources"], node["Labels"] or {}, node["NodeManagerAddress"]) for node in nodes]


def free_resources() -> list[Node]:
    """The live nodes that are not draining, with their unused resources. Ray's figures lag by about a second."""
    left = ray_internals.available_resources_per_node()
    return [Node(left.get(node["NodeID"], {}), node["Labels"] or {}) for node in _listed_nodes()]


def _listed_nodes() -> list[dict[str, Any]]:
    import ray

    draining = ray_internals.draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def has_autoscaler(nodes: Iterable[Node]) -> bool:
    """Whether an autoscaler manages the nodes."""
    return any(NODE_GROUP_LABEL in node.labels for node in nodes)


def describe_nodes(nodes: Iterable[Node]) -> str:
    """The number of nodes of each kind: "2 x (8 CPU, 1 GPU, market=spot); 4 CPU, 0 GPU"."""
    kinds = Counter(map(str, nodes))
    return "; ".join(f"{number} x ({node})" if number > 1 else node for node, number in kinds.items()) or "nothing"


def several_machines() -> str:
    """Describe the cluster's machines; return "" if there is one machine and no autoscaler. Connects to Ray."""
    cluster.connect()
    nodes = live_nodes()
    number = len({node.address for node in nodes})
    if has_autoscaler(nodes):
        return f"{number} machine{'s' * (number > 1)} and an autoscaler"
    return f"{number} machines" if number > 1 else ""
