"""All uses of Ray's private modules (Ray 2.60). A comment at each use says which public function is missing."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any


def is_worker() -> bool:
    """Whether this process is a Ray worker rather than a driver. Ray must be initialized."""
    import ray

    # The runtime context has no public attribute for the mode of a process.
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def is_embedded() -> bool:
    """Whether this process has started its own Ray cluster."""
    import ray

    # There is no public function that says whether ray.init() started a cluster or joined one.
    own = ray._private.worker._global_node
    return own is not None and bool(own.head)


def keep_to_this_machine() -> None:
    """Make an embedded Ray cluster listen only on 127.0.0.1, where other machines cannot reach it.

    Clusters that other processes started are not affected.
    """
    # ray.init() replaces a given address with the machine's public address if Ray's switch for Windows and macOS is on.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if (constants := sys.modules.get("ray._private.ray_constants")) is not None:
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]


def quiet_token_warnings() -> None:
    """Hide the warning that Ray prints at every start if tokens are enabled. Token errors are still reported."""
    # ray.init() has no option that hides this warning.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """The unused resources of each node, by node id."""
    import ray

    # ray.available_resources() returns only the sum over all nodes.
    available: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return available


def draining_nodes() -> set[str]:
    """The ids of draining nodes, which are about to leave the cluster. Ray starts no new work on them."""
    import ray

    # ray.nodes() does not say which nodes are draining.
    return set(ray._private.state.state.get_draining_nodes())


def autoscaling_state() -> Any:
    """The last state that the autoscaler reported (autoscaler version 2, which ``ray up`` and KubeRay use)."""
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    # ray.autoscaler.sdk can only request resources. It does not return the state of requests.
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    return reply.autoscaling_state


def label_selector_error(selector: Mapping[str, str]) -> str | None:
    """Ray's error message if it rejects a label selector, otherwise None."""
    # Public functions check a selector only when they submit work.
    from ray._private.label_utils import validate_label_selector

    error: str | None = validate_label_selector(dict(selector))
    return error


def ask_cluster(address: str, seconds: float) -> tuple[str, str, set[str]]:
    """Return the Ray and Python versions of the cluster at an address, and the ids of its live nodes.

    Raises:
        ray.exceptions.AuthenticationError: the token is missing or wrong.
        TimeoutError: a request took longer than ``seconds``.
        ConnectionError: the server is not a Ray cluster.
    """
    # The only public way to ask is ray.init(), which joins the cluster and retries for minutes after an error.
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services
    from ray.exceptions import AuthenticationError

    channel = create_gcs_channel(address)
    nodes, values = services.NodeInfoGcsServiceStub(channel), services.InternalKVGcsServiceStub(channel)
    try:
        cluster_id = nodes.GetClusterId(messages.GetClusterIdRequest(), timeout=seconds).cluster_id
        options = {"metadata": (("ray_cluster_id", cluster_id.hex()),), "timeout": seconds}
        request = messages.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
        metadata = json.loads(values.InternalKVGet(request, **options).value)
        every = nodes.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), **options).node_info_list
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise AuthenticationError("the cluster does not accept the token") from None
        kind = TimeoutError if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED else ConnectionError
        raise kind(error.details()) from None
    finally:
        channel.close()
    return metadata["ray_version"], metadata["python_version"], {n.node_id.hex() for n in every if n.state == 0}


def nodes_here() -> set[str]:
    """The ids of the Ray nodes that run on this machine."""
    # ray.nodes() needs a connection, but this check runs before ray.init().
    from ray._private.services import find_node_ids

    return set(find_node_ids())


def token_headers() -> dict[str, str]:
    """The HTTP headers with this machine's token, as ``ray job submit`` sends them.

    Raises:
        ray.exceptions.AuthenticationError: RAY_AUTH_MODE is token, but there is no token.
    """
    # There is no public function for these headers.
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    headers: dict[str, str] = get_auth_headers_if_auth_enabled({})
    return headers


def execution_callback() -> type:
    """The base class of callbacks that Ray Data calls after each round of its scheduling loop."""
    # DataContext has no public setting for the frequency of the loop.
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    return ExecutionCallback  # type: ignore[no-any-return]


def start_timeout_error() -> type[Exception]:
    """The error that Ray Train raises if its workers do not start in time."""
    # ray.train exports only the errors that wrap this error.
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return WorkerGroupStartupTimeoutError  # type: ignore[no-any-return]


def lost_worker_errors() -> tuple[type[Exception], ...]:
    """The errors of workers that Ray Train can no longer reach. Its other errors come from the training loop."""
    # ray.train exports only the error that wraps the errors of all workers.
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    return WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
