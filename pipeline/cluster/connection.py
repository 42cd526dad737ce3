"""Connect to Ray: the cluster at RAY_ADDRESS, or an embedded Ray on this machine."""

import logging
import os
import re
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from kac.util import files
from kac.util.errors import DistillKacError, one_line, without_secrets
from pipeline import progress
from pipeline.cluster import address_checks, ray_internals


class ClusterResources(NamedTuple):
    """The total resources of the cluster."""

    cpus: int
    gpus: int


NODE_GROUP_LABEL = "ray.io/node-group"
"""Ray adds this label to the nodes of a cluster with an autoscaler."""


class Machines(NamedTuple):
    """The number of live machines, and whether an autoscaler may add some."""

    number: int
    may_grow: bool

    @property
    def is_single(self) -> bool:
        """Whether there is only one machine, and no autoscaler."""
        return self.number == 1 and not self.may_grow

    def __str__(self) -> str:
        return f"{self.number} machine{'s' * (self.number > 1)}{' and an autoscaler' * self.may_grow}"


def machines() -> Machines:
    """The machines of the cluster. Several nodes may be on one machine.

    Raises:
        DistillKacError: as ``connect``.
    """
    connect()
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    may_grow = any(NODE_GROUP_LABEL in node.get("Labels", {}) for node in nodes)
    return Machines(len({node["NodeManagerAddress"] for node in nodes}), may_grow)


def is_connected() -> bool:
    """Whether this process is connected to Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def is_worker() -> bool:
    """Whether this process is a Ray worker, and not a driver."""
    return is_connected() and ray_internals.is_worker()


def connect() -> ClusterResources:
    """Connect to Ray, unless connected; start an embedded Ray if RAY_ADDRESS is not set.

    ``ray job submit`` sets RAY_ADDRESS, so that the same command works on a cluster and on a laptop.

    Raises:
        DistillKacError: this process cannot join the cluster at RAY_ADDRESS (see ``address_checks``), or the path of
            the temporary folder is too long for Ray.
    """
    from pipeline.cluster import environment  # imported here, because it imports this module

    environment.make_absolute()
    address = os.environ.get(address_checks.RAY_ADDRESS, "")
    if not address:
        ray_internals.keep_to_this_machine()
    import ray

    if not ray.is_initialized():
        # Without the dashboard, Ray Train's placement-group cleaner cannot query the state, and warns repeatedly.
        # Without an address, Ray would join the cluster that was last started on this machine.
        local = {} if address else {"address": "local", "include_dashboard": True}
        # By default, Ray keeps one idle worker per CPU and ends the others after a second. But a new worker takes four
        # seconds to start, and tasks that read ahead of a training loop are idle most of the time.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        # Otherwise Ray Train also logs each line that its workers print.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        if progress.on_terminal():
            os.environ[progress.TERMINAL_VARIABLE] = "1"
        else:
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        ray_internals.quiet_token_warnings()
        if address:
            address_checks.check_address(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(logging_level=logging.WARNING, **local)
        except (OSError, RuntimeError) as error:
            if too_long := SOCKET_PATH.search(str(error)):
                raise DistillKacError(_describe_long_folder(int(too_long[1]), too_long[2])) from None
            if not address:
                raise
            raise DistillKacError(
                f"Cannot join the cluster at {address_checks.RAY_ADDRESS}={one_line(address)}: {innermost(error)}. "
                "Run python -m jobs.cluster check."
            ) from error
        _restore_sigterm_handler(on_sigterm)
    import ray.data  # imported first, because it configures the loggers

    quiet("ray.data", "ray.train", "ray.tune")
    total = ray.cluster_resources()
    return ClusterResources(max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0)))


SOCKET_PATH = re.compile(r"AF_UNIX path length cannot exceed (\d+) bytes: (.*)", re.DOTALL)
"""The error of Ray (2.60) for a temporary folder whose path is too long for its sockets."""


def _describe_long_folder(limit: int, socket: str) -> str:
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder, excess = os.environ.get(variable, tempfile.gettempdir()), len(os.fsencode(socket)) - limit
    return (
        f"{variable}: the path {folder} is {excess} bytes too long: Ray creates sockets in it, and their paths have at "
        f"most {limit} bytes. Set {variable} to a folder with a shorter path, such as /tmp."
    )


def _restore_sigterm_handler(handler: Any) -> None:
    """Restore the handler of SIGTERM after ``ray.init``, whose own handler prints a stack and stops Ray first.

    Without an earlier handler, this reinstalls Ray's Python handler, in front of the C++ handler that prints the stack.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler if callable(handler) else signal.getsignal(signal.SIGTERM))


def quiet(*names: str) -> None:
    """Show only errors of these loggers of Ray; its log files keep all lines."""
    for name in names:
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        if not logger.handlers:
            logger.setLevel(logging.ERROR)


def innermost(error: BaseException) -> str:
    """The last line of an error, which has the cause below the layers that Ray wraps around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_secrets(lines[-1]) if lines else type(error).__name__


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
    """The options with these paths in their absolute form. Raises as ``absolute``.

    Args:
        names: fields with a path, several paths or None; ``data.root`` is a field of ``data``.
    """
    changed: dict[str, Any] = {}
    for name in names:
        field, _, nested = name.partition(".")
        value = getattr(options, field)
        if nested:
            changed[field] = absolute_paths(value, nested)
        elif value is not None:
            changed[field] = absolute(value) if isinstance(value, str) else tuple(map(absolute, value))
    return options.model_copy(update=changed)


def in_job_copy() -> bool:
    """Whether the current directory is Ray's copy of a submitted working directory."""
    return "runtime_resources/working_dir_files" in os.getcwd()
