"""Where the work runs: the cluster that RAY_ADDRESS names, or an embedded Ray on this machine."""

import logging
import os
import re
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

from kac.util import files
from kac.util.errors import DistillKacError, one_line, without_secrets
from pipeline import progress
from pipeline.cluster import joining


class Resources(NamedTuple):
    """What the cluster has now."""

    cpus: int
    gpus: int


NODE_GROUP_LABEL = "ray.io/node-group"
"""Ray puts it on the nodes of an autoscaler."""


class Machines(NamedTuple):
    """The machines of the cluster that are alive, and whether an autoscaler may add some."""

    number: int
    may_grow: bool

    @property
    def are_one(self) -> bool:
        """Whether there is one, for good."""
        return self.number == 1 and not self.may_grow

    def __str__(self) -> str:
        return f"{self.number} machine{'s' * (self.number > 1)}{' and an autoscaler' * self.may_grow}"


def machines() -> Machines:
    """What the work may be spread over; several nodes may be on one machine.

    Raises:
        DistillKacError: as ``connect``.
    """
    connect()
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    grows = any(NODE_GROUP_LABEL in node.get("Labels", {}) for node in nodes)
    return Machines(len({node["NodeManagerAddress"] for node in nodes}), grows)


def is_connected() -> bool:
    """Whether this process is part of a cluster already."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def is_worker() -> bool:
    """Whether this process is one of Ray's workers, which does a part of some driver's work."""
    if not is_connected():
        return False
    import ray

    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def connect() -> Resources:
    """Connect once; start an embedded Ray if RAY_ADDRESS is not set.

    Under ``ray job submit`` RAY_ADDRESS is set by Ray itself, so the same command runs in both places.

    Raises:
        DistillKacError: no cluster takes this process at RAY_ADDRESS (see ``joining``), or the name of the temporary
            folder is too long for Ray.
    """
    from pipeline.cluster import environment  # which imports this module

    environment.make_absolute()
    address = os.environ.get(joining.VARIABLE, "")
    if not address:
        keep_to_this_machine()
    import ray

    if not ray.is_initialized():
        # Without the dashboard Ray Train's placement-group cleaner warns again and again: it cannot query the state.
        # Without an address Ray would join whatever cluster was last started on this machine.
        local = {} if address else {"address": "local", "include_dashboard": True}
        # By default Ray keeps one idle worker per CPU and ends the others after a second; a new one takes four seconds
        # to start, and tasks that read ahead of a training loop are idle most of the time.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        # Ray Train would show what its workers print a second time, as a line of its log.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        if progress.on_terminal():
            os.environ[progress.TERMINAL_VARIABLE] = "1"
        else:
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        # It warns at every start that tokens are on; who needs to know is told by what fails without one.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        if address:
            joining.check_address(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(logging_level=logging.WARNING, **local)
        except (OSError, RuntimeError) as error:
            if too_long := SOCKET_PATH.search(str(error)):
                raise DistillKacError(_describe_long_folder(int(too_long[1]), too_long[2])) from None
            if not address:
                raise
            raise DistillKacError(
                f"{joining.VARIABLE}: expected a cluster at {one_line(address)}, found: {innermost(error)}: "
                "see python -m jobs.cluster check"
            ) from error
        keep_on_sigterm(on_sigterm)
    import ray.data  # it configures the loggers, which would undo what follows

    quiet("ray.data", "ray.train", "ray.tune")
    total = ray.cluster_resources()
    return Resources(max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0)))


SOCKET_PATH = re.compile(r"AF_UNIX path length cannot exceed (\d+) bytes: (.*)", re.DOTALL)
"""What Ray (2.60) says of a temporary folder whose name is too long for its sockets."""


def _describe_long_folder(limit: int, socket: str) -> str:
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder, excess = os.environ.get(variable, tempfile.gettempdir()), len(os.fsencode(socket)) - limit
    return (
        f"{variable}: the folder {folder} is {excess} bytes too long, since Ray keeps sockets below it, and the system "
        f"allows paths of {limit} bytes for them. Set {variable} to a shorter folder, such as /tmp."
    )


def keep_to_this_machine() -> None:
    """Let an embedded Ray listen on this machine's own address (127.0.0.1), not on those that others can reach.

    By Ray's switch for Windows and macOS, the only one there is (2.60): it takes whatever address is given to it for a
    machine's public one. What was started by others is left as it is.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if (constants := sys.modules.get("ray._private.ray_constants")) is not None:
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]


def keep_on_sigterm(handler: Any) -> None:
    """Put the handler of SIGTERM back that Ray has replaced by its own: that prints a stack, and takes Ray down first.

    A process that had none keeps Ray's, but for the stack: it comes from C++, which a handler of Python is put before.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler if callable(handler) else signal.getsignal(signal.SIGTERM))


def quiet(*names: str) -> None:
    """Let these loggers of Ray show errors only; its log files keep everything."""
    for name in names:
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        if not logger.handlers:
            logger.setLevel(logging.ERROR)


def innermost(error: BaseException) -> str:
    """The line of an error that says what went wrong, out of the layers that Ray wraps around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_secrets(lines[-1]) if lines else type(error).__name__


def absolute(path: str) -> str:
    """The path or URI under its one name (``files.normal``), as every process of the cluster sees it.

    Raises:
        DistillKacError: no name, or a relative path in a job's working directory, which Ray deletes after the job.
    """
    name = files.normal(path)
    if files.is_uri(name) or os.path.isabs(name):
        return name
    if in_job_copy():
        raise DistillKacError(
            f"{path}: expected an absolute path or s3:// URI under ray job submit, found a relative one: "
            "the job runs in a copy of the working directory that does not outlive it"
        )
    return str(Path(name).absolute())


def in_job_copy() -> bool:
    """Whether the current directory is Ray's copy of a submitted working directory."""
    return "runtime_resources/working_dir_files" in os.getcwd()
