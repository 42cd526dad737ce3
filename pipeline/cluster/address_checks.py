"""Checks before this process joins the cluster at RAY_ADDRESS.

Ray waits for minutes if nothing answers or this machine is not a node of the cluster, aborts the process if the token
is wrong, and reports errors as long tracebacks. These checks take at most ``CHECK_SECONDS`` each.
"""

import os
import socket
import sys
from typing import NamedTuple

from kac.util.errors import DistillKacError, one_line
from pipeline.cluster import ray_internals

RAY_ADDRESS = "RAY_ADDRESS"

CHECK_SECONDS = 10.0
"""Time limit of each of two checks: whether the address answers, and whether it is a cluster that accepts us."""

JOB_PORT = 8265
"""Default port of a cluster's job server (``ray job submit``)."""


class Versions(NamedTuple):
    """The versions that a cluster and its drivers must share, because of Ray's protocols and pickles."""

    ray: str
    python: str  # with the patch level

    def __str__(self) -> str:
        return f"Ray {self.ray} with Python {self.python}"


def versions_here() -> Versions:
    """The versions of this process."""
    import ray

    return Versions(ray.__version__, ".".join(map(str, sys.version_info[:3])))


def check_address(address: str) -> None:
    """Check that this process can join the cluster at ``address``.

    Raises:
        DistillKacError: the address is not HOST:PORT, nothing answers, the token is missing or wrong, the cluster has
            other versions of Ray or Python, or this machine is not a node of the cluster.
    """
    if address in {"auto", "local"}:
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=CHECK_SECONDS).close()
    except OSError as error:
        is_late = isinstance(error, TimeoutError)
        reason = f"no answer in {CHECK_SECONDS:.0f} s" if is_late else one_line(error.strerror or error)
        raise DistillKacError(
            f"{RAY_ADDRESS} is {address}, but nothing answers there ({reason}). Correct the address, start a cluster "
            "(ray start --head), or unset the variable to work only on this machine."
        ) from None
    _check_cluster(address)


def _host_and_port(address: str) -> tuple[str, int]:
    scheme, _, rest = address.rpartition("://")
    if scheme:
        problem = (
            "an address of Ray Client, which Ray Train does not support"
            if scheme == "ray"
            else "the address of a job server, but should be HOST:PORT of a cluster"
        )
        raise DistillKacError(
            f"{RAY_ADDRESS} is {one_line(address)}, {problem}. Unset it and submit the job: "
            f"{_submission(_host_of(rest))}."
        )
    host, _, port = rest.rpartition(":")
    if not host or not port.isdigit():
        raise DistillKacError(
            f"{RAY_ADDRESS} is {one_line(address)}, but should be HOST:PORT. Add the port, often 6379."
        )
    return host.strip("[]"), int(port)


def _host_of(rest: str) -> str:
    return rest.partition("/")[0].rpartition(":")[0] or rest.partition("/")[0]


def _submission(host: str) -> str:
    return f"ray job submit --address http://{host}:{JOB_PORT} --working-dir . -- python -m jobs..."


def _check_cluster(address: str) -> None:
    """Check the token, the versions, and that a node of the cluster runs on this machine."""
    import grpc
    from ray.exceptions import AuthenticationError

    try:
        versions, alive = ray_internals.ask_cluster(address, CHECK_SECONDS)
    except AuthenticationError:
        raise DistillKacError(_refused(address)) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise DistillKacError(_refused(address)) from None
        is_late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        reason = f"no answer in {CHECK_SECONDS:.0f} s" if is_late else one_line(error.details())
        raise DistillKacError(
            f"{RAY_ADDRESS} is {address}, which is not a Ray cluster ({reason}). Use the port of ray start --head, by "
            "default 6379."
        ) from None
    check_versions(f"{RAY_ADDRESS} {address}", Versions(*versions))
    # A driver needs a node of the cluster on its machine.
    if not alive & ray_internals.nodes_here():
        raise DistillKacError(
            f"{RAY_ADDRESS} is {address}, but none of the cluster's {len(alive)} nodes runs on this machine. Submit "
            f"the job ({_submission(_host_of(address))}), or let this machine join (ray start --address {address})."
        )


def _refused(address: str) -> str:
    return f"The cluster at {RAY_ADDRESS}={address} refuses this process: {describe_token_problem()}"


def describe_token_problem() -> str:
    """Why a cluster with tokens refuses this process, and what to do. It never shows the token."""
    places = "in ~/.ray/auth_token, in a file that RAY_AUTH_TOKEN_PATH names, or in RAY_AUTH_TOKEN"
    if not ray_internals.sends_token():
        return (
            "it requires a token, which Ray sends only with RAY_AUTH_MODE=token. Set the variable, and put the "
            f"cluster's token {places}."
        )
    if not ray_internals.has_token():
        return f"it requires a token, and this machine has none. Put the cluster's token {places}."
    used = next(
        (name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "~/.ray/auth_token"
    )
    return f"the token of {used} is wrong. Use the token that ray get-auth-token prints on the cluster's head."


def check_versions(where: str, there: Versions) -> None:
    """Check that a cluster has the versions of this process.

    Args:
        where: description of the cluster, for the message.
        there: versions of the cluster.

    Raises:
        DistillKacError: Ray, or Python's minor version or patch level, differs.
    """
    here = versions_here()
    if there != here:
        raise DistillKacError(
            f"{where} has {there}, but this process has {here}. Install the same versions on both (requirements.lock "
            "has Ray's)."
        )
