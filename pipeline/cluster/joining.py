"""What must hold before this process joins the cluster that RAY_ADDRESS names.

Ray itself waits for minutes where nobody answers or this machine is no node of the cluster, aborts the process over a
wrong token, and says what it found in a page of traceback. Here each is asked beforehand, within ``SECONDS`` in all.
"""

import json
import os
import socket
import sys
from typing import NamedTuple

from kac.util.errors import DistillKacError, one_line

VARIABLE = "RAY_ADDRESS"

SECONDS = 10.0
"""For each of two questions: whether anybody answers at the address, and whether that is a cluster that takes us."""

JOB_PORT = 8265
"""Where a cluster takes jobs (``ray job submit``), by default."""


class Versions(NamedTuple):
    """What must be equal here and there: Ray's own protocols and pickles depend on both."""

    ray: str
    python: str  # of the patch level

    def __str__(self) -> str:
        return f"Ray {self.ray} with Python {self.python}"


def versions_here() -> Versions:
    """Those of this process."""
    import ray

    return Versions(ray.__version__, ".".join(map(str, sys.version_info[:3])))


def check_address(address: str) -> None:
    """Refuse an address at which no cluster takes this process.

    Raises:
        DistillKacError: it is of another kind, nobody answers, the token is missing or wrong, Ray or Python are of
            other versions there, or this machine is no node of the cluster.
    """
    if address in {"auto", "local"}:
        return
    host, port = _host_and_port(address)
    _check_anybody(address, host, port)
    _check_cluster(address)


def _host_and_port(address: str) -> tuple[str, int]:
    scheme, _, rest = address.rpartition("://")
    submission = _submission(_host_of(rest))
    if scheme == "ray":
        raise DistillKacError(
            f"{VARIABLE}: expected HOST:PORT of a cluster that this machine is a node of, found ray://, Ray Client, "
            f"under which Ray Train does not run: submit the job: {submission}"
        )
    if scheme:
        raise DistillKacError(
            f"{VARIABLE}: expected HOST:PORT of a cluster that this machine is a node of, found {scheme}://, the "
            f"address of its job server: submit the job there: {submission}"
        )
    host, _, port = rest.rpartition(":")
    if not host or not port.isdigit():
        raise DistillKacError(
            f"{VARIABLE}: expected HOST:PORT, found {one_line(address)}: give the port too, often 6379"
        )
    return host.strip("[]"), int(port)


def _host_of(rest: str) -> str:
    return rest.partition("/")[0].rpartition(":")[0] or rest.partition("/")[0]


def _submission(host: str) -> str:
    return f"ray job submit --address http://{host}:{JOB_PORT} --working-dir . -- python -m jobs..."


def _check_anybody(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        raise DistillKacError(
            f"{VARIABLE}: expected a cluster at {address}, found that nobody answers there "
            f"({_why(error)}): correct it, start one (ray start --head), or unset it to work on this machine alone"
        ) from None


def _why(error: OSError) -> str:
    return f"no answer in {SECONDS:.0f} s" if isinstance(error, TimeoutError) else one_line(error.strerror or error)


def _check_cluster(address: str) -> None:
    """Ask by plain gRPC: Ray's own client tries again and again, whatever the answer."""
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services
    from ray.exceptions import AuthenticationError

    channel = create_gcs_channel(address)
    nodes, values = services.NodeInfoGcsServiceStub(channel), services.InternalKVGcsServiceStub(channel)
    try:
        cluster_id = nodes.GetClusterId(messages.GetClusterIdRequest(), timeout=SECONDS).cluster_id
        to = {"metadata": (("ray_cluster_id", cluster_id.hex()),), "timeout": SECONDS}
        asked = messages.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
        there = json.loads(values.InternalKVGet(asked, **to).value)
        alive = nodes.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), **to).node_info_list
    except AuthenticationError:
        raise DistillKacError(_refused(address)) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise DistillKacError(_refused(address)) from None
        is_late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        found = f"no answer in {SECONDS:.0f} s" if is_late else one_line(error.details())
        raise DistillKacError(
            f"{VARIABLE}: expected a Ray cluster at {address}, found {found}: give the port of ray start --head, "
            "which is 6379 unless told otherwise"
        ) from None
    finally:
        channel.close()
    check_versions(f"{VARIABLE} {address}", Versions(there["ray_version"], there["python_version"]))
    _check_is_node(address, {node.node_id.hex() for node in alive if node.state == 0})


def _refused(address: str) -> str:
    return f"{VARIABLE}: expected to be let into the cluster at {address}, found {token_trouble()}"


def token_trouble() -> str:
    """Why a cluster that wants a token does not let this process in, and what to do; never the token."""
    from ray._raylet import (  # type: ignore[attr-defined]
        AuthenticationMode,
        AuthenticationTokenLoader,
        get_authentication_mode,
    )

    places = "in ~/.ray/auth_token, in a file that RAY_AUTH_TOKEN_PATH names, or in RAY_AUTH_TOKEN"
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        return (
            "that it wants a token, and none is sent without RAY_AUTH_MODE=token: set it, and put the cluster's token "
            f"{places}"
        )
    if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        return f"no token here: put the cluster's {places}"
    used = next(
        (name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "~/.ray/auth_token"
    )
    return f"that it refuses the token of {used}: put there what ray get-auth-token says on the cluster's head"


def check_versions(where: str, there: Versions) -> None:
    """Refuse a cluster of other versions.

    Raises:
        DistillKacError: Ray differs, or Python's minor version or patch level.
    """
    here = versions_here()
    if there != here:
        raise DistillKacError(
            f"{where}: expected {there} as the cluster has, found {here} here: install the same versions on both "
            "(requirements.lock has Ray's)"
        )


def _check_is_node(address: str, alive: set[str]) -> None:
    """A driver works through the Ray node of its own machine."""
    from ray._private.services import find_node_ids

    if not alive & set(find_node_ids()):
        host = _host_of(address)
        raise DistillKacError(
            f"{VARIABLE}: expected a cluster that this machine is a node of, found {address}, of whose {len(alive)} "
            f"nodes none runs here: submit the job ({_submission(host)}), or let this machine join "
            f"(ray start --address {address})"
        )
