"""Check a cluster, the storage and the tracking server before a job is submitted."""

import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import requests

from kac.util import probes
from kac.util.errors import ArgumentError, DistillKacError, one_line, without_secrets
from kac.util.fingerprint import unhashed
from kac.util.log import log
from pipeline import tracking
from pipeline.cluster import connection as cluster
from pipeline.cluster import environment, placement, ray_internals, storage
from pipeline.config import Spec
from pipeline.tracking.server import client_of

REQUEST_SECONDS = 10.0
"""Time limit of an HTTP request. The limit for S3 is ``probes.PROBE_SECONDS``."""

MAX_SECONDS = 30.0
"""Time limit for all checks together. They run at the same time."""

DEFAULT_ADDRESS = f"http://127.0.0.1:{cluster.JOB_PORT}"


class CheckSpec(Spec):
    """Check within 30 seconds whether a job that you submit to a cluster will work."""

    stage = "check"
    is_probed = False
    address: str | None = unhashed(
        None, f"job server, as for ray job submit; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or {DEFAULT_ADDRESS}"
    )
    paths: tuple[str, ...] = unhashed((), "paths or s3:// URIs that the job will use; checked from this machine")
    gpus: int = unhashed(0, "GPUs that the job will need", ge=0)


def check(spec: CheckSpec) -> None:
    """Run all checks, and log a line for each: ``ok``, or what is wrong and what to do.

    Raises:
        DistillKacError: a check failed.
    """
    address = job_server(spec.address)
    checks: dict[str, Callable[[], str]] = {
        f"cluster {without_secrets(address)}": functools.partial(_check_cluster, address, spec.gpus),
        **{path: functools.partial(_check_path, path) for path in spec.paths},
        "mlflow": _check_tracking,
    }
    results = {name: _run_in_thread(run_check) for name, run_check in checks.items()}
    deadline = time.monotonic() + MAX_SECONDS
    failed = 0
    for name, result in results.items():
        try:
            log.info(f"ok     {name}: {result.result(timeout=max(0.0, deadline - time.monotonic()))}")
        except Exception as error:  # noqa: BLE001 - reported as the result of this check
            problem = f"no answer in {MAX_SECONDS:.0f} s." if isinstance(error, TimeoutError) else str(error)
            log.info(f"error  {one_line(problem if problem.startswith(name) else f'{name}: {problem}', most=1000)}")
            failed += 1
    if failed:
        raise DistillKacError(f"{failed} of {len(checks)} checks failed. See the lines above.")


def _run_in_thread(run_check: Callable[[], str]) -> "Future[str]":
    """Run a check in a thread that does not keep the process alive, unlike the threads of an executor."""
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(run_check())
        except Exception as error:  # noqa: BLE001 - reported as the result of this check
            result.set_exception(DistillKacError(one_line(error)))

    threading.Thread(target=run, daemon=True).start()
    return result


def job_server(given: str | None) -> str:
    """The address of the job server, as ``ray job submit`` finds it: environment variables override ``given``."""
    for variable in ("RAY_API_SERVER_ADDRESS", cluster.RAY_ADDRESS):
        if address := os.environ.get(variable):
            if given and _as_http(given) != _as_http(address):
                raise ArgumentError(
                    f"`address` is {one_line(given)}, but {variable} is set to {one_line(_as_http(address))}, and ray "
                    f"job submit would use {variable}. Unset it."
                )
            return _as_http(address)
    return _as_http(given or DEFAULT_ADDRESS)


def _as_http(address: str) -> str:
    scheme, _, rest = address.rstrip("/").rpartition("://")
    if scheme in {"http", "https"}:
        return f"{scheme}://{rest}"
    # This address belongs to a cluster or to Ray Client. The job server listens on a different port of that machine.
    return f"http://{rest.rpartition(':')[0] or rest}:{cluster.JOB_PORT}"


def _check_cluster(address: str, gpus: int) -> str:
    metadata = _get(address, "/api/v0/cluster_metadata")
    where = f"cluster {without_secrets(address)}"
    versions = cluster.check_versions(where, metadata["rayVersion"], metadata["pythonVersion"])
    states = _get(address, "/api/v0/nodes?detail=1&limit=10000")["result"]["result"]
    nodes = [placement.Node(node["resources_total"], node["labels"]) for node in states if node["state"] == "ALIVE"]
    total, may_grow = sum(node.resources.get("GPU", 0) for node in nodes), placement.has_autoscaler(nodes)
    described = placement.describe_nodes(nodes) + "; an autoscaler may add nodes" * may_grow
    if gpus > total and not may_grow:
        raise DistillKacError(
            f"the nodes have {total:g} of {gpus} GPUs: {described}. Start nodes with GPUs (ray start --address ...)."
        )
    return f"{versions}, as here; {described}"


def _get(address: str, path: str) -> Any:
    """Send a request with the headers that ``ray job submit`` sends. Return the data in the job server's answer."""
    from ray.exceptions import AuthenticationError

    try:
        headers = ray_internals.token_headers()
        answer = requests.get(address + path, headers=headers, timeout=REQUEST_SECONDS, allow_redirects=False)
        if answer.status_code in {401, 403}:
            raise AuthenticationError("the server does not accept the token")
        return answer.json()["data"]
    except AuthenticationError:
        raise DistillKacError(f"access is denied: {cluster.TOKEN_ADVICE}") from None
    except (requests.RequestException, KeyError, TypeError) as error:
        raise DistillKacError(
            f"no Ray job server answers at {without_secrets(address)} ({type(error).__name__}). Start the cluster, or "
            "correct the address; the usual port is 8265. By default, Ray's dashboard listens only on the head node: "
            "ssh -L 8265:127.0.0.1:8265 HEAD forwards its port to this machine."
        ) from None


def _check_path(path: str) -> str:
    path = cluster.absolute(path)
    probes.check_answers(path)
    probes.check_writable(path)
    if storage.is_shared(path):
        return "readable and writable from here"
    return f"readable and writable here; for several machines, use s3:// or set {storage.SHARED_VARIABLE}"


def _check_tracking() -> str:
    uri = environment.mlflow_address()
    if not uri or environment.database_file(uri):
        return "no server (MLFLOW_TRACKING_URI does not name a server); a SQLite file works only on one machine"
    where = tracking.without_password(uri)
    try:
        client_of(uri).search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 - MLflow raises errors of any type
        raise DistillKacError(
            f"no tracking server answers at {where} ({one_line(error, 200)}). Start it, or correct the address. A "
            "server whose host name is not localhost needs mlflow server --allowed-hosts."
        ) from None
    return f"{where} answers; the nodes also need MLFLOW_TRACKING_URI in their environment"
