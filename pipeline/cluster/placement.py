"""The resources that a worker needs on a node, and whether the cluster has or can get them.

Ray waits silently for resources that no node can provide. Stages call ``wait_for_capacity`` first. It accepts
resources that fit on the live nodes, even if other jobs use them now, since Ray queues such work. Otherwise it waits
for nodes that may still join (``JOIN_SECONDS``), or that an autoscaler may start (``START_SECONDS``), and then raises.
While it waits, a pending placement group shows the autoscaler which resources are missing.

How a driver learns what the autoscaler can add (Ray 2.60): on the head that ``ray up`` starts, the configuration is in
``CONFIG_FILE``. Elsewhere (KubeRay), the autoscaler's state in Ray's control store lists infeasible requests and nodes
that are starting. ``get_max_resources_from_cluster_config``, which Ray Train uses, works only on Anyscale's platform.
"""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kac.networks.cost import duration
from kac.util.errors import ArgumentError
from kac.util.log import log
from kac.util.options import Range, least
from pipeline.cluster import connection as cluster
from pipeline.cluster import ray_internals

JOIN_SECONDS, JOIN_VARIABLE = 30.0, "DISTILLKAC_JOINING_SECONDS"
"""How long to wait for nodes to join if there is no autoscaler, and the variable that replaces this number."""

START_SECONDS, START_VARIABLE = 1200.0, "DISTILLKAC_STARTING_SECONDS"
"""How long to wait for an autoscaler to start nodes, and the variable that replaces this number."""

CONFIG_FILE = "~/ray_bootstrap_config.yaml"
POLL_SECONDS = 1.0
BUSY_SECONDS = 2.0
"""Resources of an earlier stage are free this long after its end."""


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
        """Options for a task or an actor of Ray."""
        labels = {"label_selector": dict(self.label_selector)} if self.label_selector else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **labels}

    def __str__(self) -> str:
        labels = ", ".join(f"{key}={value}" for key, value in self.label_selector.items())
        return (_format_resources(self.by_ray_name) or "no CPU") + f" on nodes with {labels}" * bool(labels)


class Node(NamedTuple):
    """The resources and labels of a node, or of one that an autoscaler may start."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def capacity(self, resources: Resources) -> float:
        """How many workers with these resources fit on the node; infinity if they need none."""
        if not all(_matches(self.labels.get(key), wanted) for key, wanted in resources.label_selector.items()):
            return 0
        counts = [int(self.resources.get(name, 0) / needed + 1e-9) for name, needed in resources.by_ray_name.items()]
        if 0 < resources.gpus < 1:  # a worker cannot use parts of two GPUs
            counts.append(int(self.resources.get("GPU", 0)) * int(1 / resources.gpus + 1e-9))
        return min(counts, default=float("inf"))

    def __str__(self) -> str:
        labels = [f"{key}={value}" for key, value in self.labels.items() if key != "ray.io/node-id"]
        return ", ".join([_format_resources({name: self.resources.get(name, 0) for name in ("CPU", "GPU")}), *labels])


def wait_for_capacity(stage: str, option: str, count: int | Range, resources: Resources) -> None:
    """Wait until the nodes can fit ``count`` workers, or the minimum of a range.

    Args:
        stage: name of the stage, for log lines.
        option: the argument that asks for the workers, such as "`workers`".
        count: number of workers.
        resources: resources of each worker.

    Raises:
        ArgumentError: no nodes can provide the resources, or Ray does not accept the labels.
    """
    _check_labels(resources)
    wanted = least(count)
    if capacity(resources) >= wanted:
        _log_if_busy(stage, wanted, resources)
        return
    if ray_internals.is_embedded():
        raise _too_small(
            option, wanted, resources, "An embedded Ray uses only this machine. Ask for less, or set RAY_ADDRESS."
        )
    join_seconds, start_seconds = _seconds(JOIN_VARIABLE, JOIN_SECONDS), _seconds(START_VARIABLE, START_SECONDS)
    log.info(
        f"{stage}: waiting for nodes that can fit {wanted} x ({resources}): at most {duration(join_seconds)}, or "
        f"{duration(start_seconds)} with an autoscaler"
    )
    started = time.monotonic()
    with requested_from_autoscaler(wanted, resources) as request:
        while capacity(resources) < wanted:
            waited, growth = time.monotonic() - started, _growth(wanted, resources, request)
            if waited >= (start_seconds if growth.is_possible else join_seconds):
                reason = f"{growth.description}. Waited {duration(waited)}. Start nodes, or ask for less."
                raise _too_small(option, wanted, resources, reason)
            time.sleep(POLL_SECONDS)


def capacity(resources: Resources) -> float:
    """How many workers with these resources fit on the live nodes."""
    return sum(node.capacity(resources) for node in live_nodes())


def free_capacity(resources: Resources) -> float:
    """How many workers with these resources fit on the live nodes beside the work that runs there now."""
    return sum(node.capacity(resources) for node in free_resources())


def live_nodes() -> list[Node]:
    """The live nodes of the cluster, with their total resources."""
    import ray

    return [Node(node["Resources"], node["Labels"] or {}) for node in ray.nodes() if node["Alive"]]


def free_resources() -> list[Node]:
    """The live nodes of the cluster, with their unused resources, which Ray reports about a second late."""
    import ray

    left = ray_internals.available_resources_per_node()
    return [Node(left.get(node["NodeID"], {}), node["Labels"] or {}) for node in ray.nodes() if node["Alive"]]


class _Growth(NamedTuple):
    """Whether an autoscaler may add the missing nodes, and a description of what it does."""

    is_possible: bool
    description: str


def _growth(wanted: int, resources: Resources, request: str) -> _Growth:
    if not any(cluster.NODE_GROUP_LABEL in node.labels for node in live_nodes()):
        return _Growth(False, "There is no autoscaler to add nodes")
    config = Path(CONFIG_FILE).expanduser()
    if config.exists():
        types = _node_types(yaml.safe_load(config.read_text()))
        limits = "; ".join(f"{number} x ({node})" for node, number in types) or "no nodes"
        grown = sum(node.capacity(resources) * number for node, number in types)
        return _Growth(capacity(resources) + grown >= wanted, f"The autoscaler can add at most {limits}")
    state = ray_internals.autoscaling_state()
    if state.pending_instances or state.pending_instance_requests:
        return _Growth(True, "The nodes that the autoscaler requested have not joined")
    if any(gang.details.startswith(request) for gang in state.infeasible_gang_resource_requests):
        # The request may become feasible when other jobs release nodes.
        return _Growth(free_capacity(resources) < capacity(resources), "The autoscaler cannot add such nodes")
    return _Growth(True, "The autoscaler has not added any nodes")


def _node_types(config: Mapping[str, Any]) -> list[tuple[Node, int]]:
    """The nodes that a cluster configuration can add, without the head, and the maximum number of each."""
    most = int(config.get("max_workers", 0))
    kinds = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    return [
        (Node(kind.get("resources", {}), kind.get("labels", {})), min(most, int(kind.get("max_workers", most))))
        for kind in kinds.values()
    ]


@contextlib.contextmanager
def requested_from_autoscaler(wanted: int, resources: Resources) -> Iterator[str]:
    """Request the resources from the autoscaler during the block; gives the id of the request."""
    from ray.util import placement_group, remove_placement_group

    labels = [dict(resources.label_selector)] * wanted if resources.label_selector else None
    group = placement_group([resources.by_ray_name or {"CPU": 0.001}] * wanted, bundle_label_selector=labels)
    try:
        yield group.id.hex()
    finally:
        remove_placement_group(group)


def _log_if_busy(stage: str, wanted: int, resources: Resources) -> None:
    """Log a line if the stage has to wait for other jobs."""
    until = time.monotonic() + BUSY_SECONDS
    while free_capacity(resources) < wanted:
        if time.monotonic() > until:
            log.info(f"{stage}: waiting for other jobs on the cluster to release {wanted} x ({resources})")
            return
        time.sleep(BUSY_SECONDS / 10)


def _check_labels(resources: Resources) -> None:
    if error := ray_internals.label_selector_error(resources.label_selector):
        given = " ".join(f"{key}={value}" for key, value in resources.label_selector.items())
        raise ArgumentError(f"`label_selector` is {given}, which Ray does not accept: {error.strip().rstrip('.')}.")


def _matches(value: str | None, wanted: str) -> bool:
    """Whether a node's label matches a selector of Ray: V, !V, in(V, W) or !in(V, W)."""
    inside = re.fullmatch(r"in\((.*)\)", wanted.removeprefix("!"))
    values = [part.strip() for part in inside[1].split(",")] if inside else [wanted.removeprefix("!")]
    return (value in values) != wanted.startswith("!")


def _too_small(option: str, wanted: int, resources: Resources, reason: str) -> ArgumentError:
    kinds = Counter(str(node) for node in live_nodes())
    total = "; ".join(f"{number} x ({node})" if number > 1 else node for node, number in kinds.items()) or "nothing"
    return ArgumentError(
        f"{option}: the nodes cannot fit {wanted} x ({resources}). They have {total}, enough for "
        f"{capacity(resources):g}. {reason}"
    )


def _format_resources(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {name}" for name, value in resources.items())


def _seconds(variable: str, default: float) -> float:
    """The number of seconds in an environment variable.

    Raises:
        ArgumentError: it is not a number.
    """
    given = os.environ.get(variable, "")
    try:
        return float(given) if given else default
    except ValueError:
        raise ArgumentError(f"{variable} is {given!r}. Set it to a number of seconds, or unset it.") from None
