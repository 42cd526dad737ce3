"""What a part of a stage's work takes of a node, and whether the cluster has room for it, or can get some.

Ray itself waits for ever, without a word, for what no node can give. ``await_room`` is asked before the work begins.
What fits on the nodes that are alive may go, even if other jobs hold them now: Ray queues it. What does not fit is
waited for as long as nodes may be joining (``JOINING``) or, where an autoscaler can add them, starting (``STARTING``),
and then refused. While it waits, a pending placement group tells the autoscaler what is missing.

How a driver learns what the autoscaler can add (Ray 2.60): the head that ``ray up`` starts has its configuration in
``CONFIG_FILE``; elsewhere (KubeRay) the autoscaler's state in Ray's control store says which requests are infeasible
and which nodes are on their way. ``get_max_resources_from_cluster_config``, which Ray Train asks, knows of none outside
of Anyscale's platform.
"""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kac.networks.cost import duration
from kac.util.errors import ArgumentError
from kac.util.log import log
from kac.util.options import Range, least
from pipeline.cluster import connection as cluster

JOINING = "DISTILLKAC_JOINING_SECONDS"
"""For so long (default 30 s) nodes that nobody has announced may join the cluster."""

STARTING = "DISTILLKAC_STARTING_SECONDS"
"""For so long (default 20 minutes) nodes of the autoscaler may take to come."""

CONFIG_FILE = "~/ray_bootstrap_config.yaml"
POLL_SECONDS = 1.0
BUSY_SECONDS = 2.0
"""What an earlier stage held is free soon after its end."""


class Share(NamedTuple):
    """What a worker, an actor or a trial takes of a node."""

    cpus: float
    gpus: float = 0.0
    label_selector: Mapping[str, str] = {}

    @property
    def resources(self) -> dict[str, float]:
        """As Ray names them, those above 0."""
        return {name: value for name, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value}

    @property
    def remote_options(self) -> dict[str, Any]:
        """As Ray's tasks and actors take them."""
        labels = {"label_selector": dict(self.label_selector)} if self.label_selector else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **labels}

    def __str__(self) -> str:
        labels = ", ".join(f"{key}={value}" for key, value in self.label_selector.items())
        return (_told(self.resources) or "no CPU") + f" of a node with {labels}" * bool(labels)


class Node(NamedTuple):
    """A node, or one that may be started."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def room(self, share: Share) -> float:
        """How many such shares it has room for; infinite for nothing."""
        if not all(_matches(self.labels.get(key), wanted) for key, wanted in share.label_selector.items()):
            return 0
        has = {name: self.resources.get(name, 0) for name in share.resources}
        rooms = [int(has[name] / asked + 1e-9) for name, asked in share.resources.items()]
        if 0 < share.gpus < 1:  # a share lies on one GPU
            rooms.append(int(has["GPU"]) * int(1 / share.gpus + 1e-9))
        return min(rooms, default=float("inf"))

    def __str__(self) -> str:
        labels = [f"{key}={value}" for key, value in self.labels.items() if key != "ray.io/node-id"]
        return ", ".join([_told({name: self.resources.get(name, 0) for name in ("CPU", "GPU")}), *labels])


def await_room(stage: str, option: str, count: int | Range, share: Share) -> None:
    """Return once the nodes have room for ``count`` shares, or for the least of a range.

    Args:
        option: what asks for them: "`workers`".

    Raises:
        ArgumentError: no such room, and none in sight; or labels that Ray does not take.
    """
    _check_labels(share)
    wanted = least(count)
    if room(alive(), share) >= wanted:
        _say_if_busy(stage, wanted, share)
        return
    if is_embedded():
        raise _refusal(option, wanted, share, "this Ray is one machine: ask for less, or set RAY_ADDRESS")
    joining, starting = _seconds(JOINING, 30.0), _seconds(STARTING, 1200.0)
    log.info(
        f"{stage}: waits for nodes with room for {wanted} x ({share}): {duration(joining)}, or {duration(starting)} if "
        "an autoscaler can start some"
    )
    started = time.monotonic()
    with asking(wanted, share) as request:
        while room(alive(), share) < wanted:
            waited, growth = time.monotonic() - started, _growth(wanted, share, request)
            if waited >= (starting if growth.is_possible else joining):
                why = f"{growth.told}; waited {duration(waited)}: start nodes, or ask for less"
                raise _refusal(option, wanted, share, why)
            time.sleep(POLL_SECONDS)


def room(nodes: Sequence[Node], share: Share) -> float:
    """How many such shares the nodes have room for."""
    return sum(node.room(share) for node in nodes)


def alive() -> list[Node]:
    """The nodes of the cluster."""
    import ray

    return [Node(node["Resources"], node["Labels"] or {}) for node in ray.nodes() if node["Alive"]]


def free() -> list[Node]:
    """The nodes with what nothing holds of them now; Ray is told of it with a delay of about a second."""
    import ray

    left = ray._private.state.available_resources_per_node()
    return [Node(left.get(node["NodeID"], {}), node["Labels"] or {}) for node in ray.nodes() if node["Alive"]]


def is_embedded() -> bool:
    """Whether this process has started its Ray for itself."""
    import ray

    own = ray._private.worker._global_node
    return own is not None and bool(own.head)


class _Growth(NamedTuple):
    """What may be expected of the autoscaler."""

    is_possible: bool
    told: str


def _growth(wanted: int, share: Share, request: str) -> _Growth:
    """Whether the autoscaler may make the room, as far as that can be known here."""
    nodes = alive()
    if not any(cluster.NODE_GROUP_LABEL in node.labels for node in nodes):
        return _Growth(False, "there is no autoscaler to start some")
    config = Path(CONFIG_FILE).expanduser()
    if config.exists():
        types = _node_types(yaml.safe_load(config.read_text()))
        told = "; ".join(f"{number} x ({node})" for node, number in types) or "nothing"
        grown = sum(node.room(share) * number for node, number in types)
        return _Growth(room(nodes, share) + grown >= wanted, f"the autoscaler may have {told}")
    state = _autoscaling_state()
    if state.pending_instances or state.pending_instance_requests:
        return _Growth(True, "nodes that the autoscaler has begun to start have not come")
    if any(gang.details.startswith(request) for gang in state.infeasible_gang_resource_requests):
        # Either for ever, or as long as other jobs hold the nodes that it has.
        return _Growth(room(free(), share) < room(nodes, share), "the autoscaler cannot start any for this")
    return _Growth(True, "the autoscaler has not started any")


def _node_types(config: Mapping[str, Any]) -> list[tuple[Node, int]]:
    """The nodes that a cluster's configuration allows, and at most how many of each; not the head, which is there."""
    most = int(config.get("max_workers", 0))
    kinds = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    return [
        (Node(kind.get("resources", {}), kind.get("labels", {})), min(most, int(kind.get("max_workers", most))))
        for kind in kinds.values()
    ]


def _autoscaling_state() -> Any:
    """What the autoscaler has last said of itself (its version 2, that of ``ray up`` and KubeRay)."""
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    return reply.autoscaling_state


@contextlib.contextmanager
def asking(wanted: int, share: Share) -> Iterator[str]:
    """Show the autoscaler what is missing; gives the request's id."""
    from ray.util import placement_group, remove_placement_group

    labels = [dict(share.label_selector)] * wanted if share.label_selector else None
    group = placement_group([share.resources or {"CPU": 0.001}] * wanted, bundle_label_selector=labels)
    try:
        yield group.id.hex()
    finally:
        remove_placement_group(group)


def _say_if_busy(stage: str, wanted: int, share: Share) -> None:
    """Tell people when it is other work that this waits for."""
    until = time.monotonic() + BUSY_SECONDS
    while room(free(), share) < wanted:
        if time.monotonic() > until:
            log.info(f"{stage}: waits until other work on the cluster leaves room for {wanted} x ({share})")
            return
        time.sleep(BUSY_SECONDS / 10)


def _check_labels(share: Share) -> None:
    from ray._private.label_utils import validate_label_selector

    if error := validate_label_selector(dict(share.label_selector)):
        given = " ".join(f"{key}={value}" for key, value in share.label_selector.items())
        raise ArgumentError(f"`label_selector`: expected labels as Ray takes them, found {given}: {error}")


def _matches(value: str | None, wanted: str) -> bool:
    """Whether a node's label is what a selector of Ray asks for: V, !V, in(V, W), !in(V, W)."""
    inside = re.fullmatch(r"in\((.*)\)", wanted.removeprefix("!"))
    values = [part.strip() for part in inside[1].split(",")] if inside else [wanted.removeprefix("!")]
    return (value in values) != wanted.startswith("!")


def _refusal(option: str, wanted: int, share: Share, why: str) -> ArgumentError:
    nodes = alive()
    kinds = Counter(str(node) for node in nodes)
    there = "; ".join(f"{number} x ({node})" if number > 1 else node for node, number in kinds.items())
    found = f"room for {room(nodes, share):g} on the nodes that there are ({there})"
    return ArgumentError(f"{option}: expected room for {wanted} x ({share}), found {found}; {why}")


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {name}" for name, value in resources.items())


def _seconds(variable: str, default: float) -> float:
    """A time that an environment variable names.

    Raises:
        ArgumentError: it is no number.
    """
    given = os.environ.get(variable, "")
    try:
        return float(given) if given else default
    except ValueError:
        raise ArgumentError(f"{variable}: expected seconds, found {given!r}") from None
