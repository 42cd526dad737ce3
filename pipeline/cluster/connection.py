"""Connect to Ray: the cluster at RAY_ADDRESS, or an embedded Ray cluster on this machine.

Ray waits for minutes if nothing answers at an address or this machine is not a node of the cluster, aborts the process
if the token is wrong, and reports errors as long tracebacks. ``check_address`` finds these problems before Ray starts.
"""

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from kac.util import files
from kac.util.errors import DistillKacError, one_line, without_secrets
from pipeline import progress
from pipeline.cluster import ray_internals

RAY_ADDRESS = "RAY_ADDRESS"

CHECK_SECONDS = 10.0
"""Time limit of each check: whether the address answers, and whether a cluster there accepts this process."""

JOB_PORT = 8265
"""Default port of a cluster's job server (``ray job submit``)."""

TOKEN_ADVICE = (
    "the token is missing or wrong. Set RAY_AUTH_MODE=token. Run `ray get-auth-token` on the cluster's head node. "
    "Save the printed token to ~/.ray/auth_token or to the file that RAY_AUTH_TOKEN_PATH names, or set RAY_AUTH_TOKEN "
    "to the token."
)


class ClusterResources(NamedTuple):
    """The total resources of the cluster."""

    cpus: int
    gpus: int


def is_connected() -> bool:
    """Whether this process is connected to Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def is_worker() -> bool:
    """Whether this process is a Ray worker rather than a driver."""
    return is_connected() and ray_internals.is_worker()


def connect() -> ClusterResources:
    """Connect to Ray if necessary. If RAY_ADDRESS is not set, start an embedded Ray cluster.

    Raises:
        DistillKacError: this process cannot join the cluster at RAY_ADDRESS (see ``check_address``), or the path of the
            temporary folder is too long for Ray.
    """
    from pipeline.cluster import environment  # imported here, because ``environment`` imports this module

    environment.make_absolute()
    address = os.environ.get(RAY_ADDRESS, "")
    if not address:
        ray_internals.keep_to_this_machine()
    import ray

    if not ray.is_initialized():
        _start(address)
    import ray.data  # imported first, because it configures the loggers

    quiet("ray.data", "ray.train", "ray.tune")
    total = ray.cluster_resources()
    return ClusterResources(max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0)))


def _start(address: str) -> None:
    import ray

    # Without the dashboard, Ray Train's placement-group cleaner cannot query Ray's state, and warns repeatedly.
    # Without an address, Ray would join the cluster that was last started on this machine.
    local: dict[str, Any] = {} if address else {"address": "local", "include_dashboard": True}
    # By default, Ray keeps one idle worker per CPU and ends other idle workers after a second. But a new worker takes
    # four seconds to start.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # Without this setting, Ray Train also logs each line that its workers print.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if progress.on_terminal():
        os.environ[progress.TERMINAL_VARIABLE] = "1"
    else:
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    ray_internals.quiet_token_warnings()
    if address:
        check_address(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.WARNING, **local)
    except (OSError, RuntimeError) as error:
        if "AF_UNIX path length" in str(error):
            variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
            folder = os.environ.get(variable, tempfile.gettempdir())
            raise DistillKacError(
                f"{variable}: the path {folder} is too long for the sockets that Ray creates in it. Set {variable} to "
                "a folder with a shorter path, such as /tmp."
            ) from None
        if not address:
            raise
        raise DistillKacError(
            f"Cannot join the cluster at {RAY_ADDRESS}={one_line(address)}: {innermost(error)}. Run python -m "
            "jobs.cluster check."
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's handler prints a stack trace and stops Ray before anything else. Restore the earlier handler. If there
        # was none, reinstall Ray's Python handler in front of the C++ handler that prints the stack trace.
        signal.signal(signal.SIGTERM, on_sigterm if callable(on_sigterm) else signal.getsignal(signal.SIGTERM))


def check_address(address: str) -> None:
    """Check that this process can join the cluster at ``address``.

    Raises:
        DistillKacError: the address is not HOST:PORT, no cluster answers, the token is missing or wrong, the cluster
            has different versions of Ray or Python, or this machine is not a node of the cluster.
    """
    if address in {"auto", "local"}:
        return
    authority = address.rpartition("://")[2].partition("/")[0]
    host, _, port = authority.rpartition(":")
    submit = f"ray job submit --address http://{host or authority}:{JOB_PORT} --working-dir . -- python -m jobs..."
    if "/" in address or not host or not port.isdigit():
        raise DistillKacError(
            f"{RAY_ADDRESS} is {one_line(address)}, but must be the HOST:PORT of a cluster on this machine (the usual "
            f"port is 6379). To run a job on a different machine, unset the variable and run {submit}."
        )
    from ray.exceptions import AuthenticationError

    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CHECK_SECONDS).close()
        ray_version, python_version, alive = ray_internals.ask_cluster(address, CHECK_SECONDS)
    except AuthenticationError:
        raise DistillKacError(f"The cluster at {RAY_ADDRESS}={address} refuses this process: {TOKEN_ADVICE}") from None
    except OSError as error:
        is_late = isinstance(error, TimeoutError)
        reason = f"no answer in {CHECK_SECONDS:.0f} s" if is_late else one_line(error.strerror or error)
        raise DistillKacError(
            f"{RAY_ADDRESS} is {address}, but no Ray cluster answers there ({reason}). Correct the address, start a "
            "cluster (ray start --head, by default on port 6379), or unset the variable to work only on this machine."
        ) from None
    check_versions(f"{RAY_ADDRESS} {address}", ray_version, python_version)
    # A driver needs a node of the cluster on its own machine.
    if not alive & ray_internals.nodes_here():
        raise DistillKacError(
            f"{RAY_ADDRESS} is {address}, but none of the cluster's {len(alive)} nodes runs on this machine. Submit "
            f"the job ({submit}), or let this machine join (ray start --address {address})."
        )


def check_versions(where: str, ray_version: str, python_version: str) -> str:
    """Describe a cluster's versions. Raise ``DistillKacError`` unless this process has the same versions.

    Ray's protocols and pickles require the same versions of Ray and Python, including the patch level.
    """
    import ray

    there = f"Ray {ray_version} with Python {python_version}"
    here = f"Ray {ray.__version__} with Python {'.'.join(map(str, sys.version_info[:3]))}"
    if there != here:
        raise DistillKacError(
            f"{where} has {there}, but this process has {here}. Install the same versions on both (requirements.lock "
            "pins Ray's version)."
        )
    return there


def quiet(*names: str) -> None:
    """Show only errors of these Ray loggers. Ray's log files keep all lines."""
    for name in names:
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        if not logger.handlers:
            logger.setLevel(logging.ERROR)


def innermost(error: BaseException) -> str:
    """The last line of an error. It states the cause, below the layers that Ray adds."""
    lines = re.findall(r"\S.*", str(error))
    return without_secrets(lines[-1].rstrip()) if lines else type(error).__name__


def in_job_copy() -> bool:
    """Whether the current directory is Ray's copy of a submitted working directory."""
    return "runtime_resources/working_dir_files" in os.getcwd()


def absolute(path: str) -> str:
    """The path or URI in its absolute and normal form (``files.normal``), which is valid in every process.

    Raises:
        DistillKacError: the path is empty, or relative in a submitted job, whose working directory Ray deletes.
    """
    name = files.normal(path)
    if files.is_uri(name) or os.path.isabs(name):
        return name
    if in_job_copy():
        raise DistillKacError(
            f"{path} is a relative path, but a submitted job runs in a copy of the working directory, which Ray "
            "deletes after the job. Use an absolute path or an s3:// URI."
        )
    return str(Path(name).absolute())


Options = TypeVar("Options", bound=BaseModel)


def absolute_paths(options: Options, *names: str) -> Options:
    """The options with the named paths made absolute. The name ``data.root`` refers to a field of ``data``."""
    changed: dict[str, Any] = {}
    for name in names:
        field, _, nested = name.partition(".")
        value = changed.get(field, getattr(options, field))
        if nested:
            changed[field] = absolute_paths(value, nested)
        elif value is not None:
            changed[field] = absolute(value) if isinstance(value, str) else tuple(map(absolute, value))
    return options.model_copy(update=changed)
