"""Before a job is submitted: whether the cluster, its storage and the tracking server will take it, a line each."""

import functools
import os
import threading
import time
from collections import Counter
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
from pipeline.cluster import environment, joining, storage
from pipeline.config.specs import Spec
from pipeline.tracking.server import client_of

SECONDS = 10.0
"""For a request of HTTP; S3 has ``probes.PROBE_SECONDS``."""

LONGEST_SECONDS = 30.0
"""All that is asked is asked at once: no check takes longer."""

DEFAULT_ADDRESS = f"http://127.0.0.1:{joining.JOB_PORT}"


class CheckSpec(Spec):
    """Say in a few lines, within half a minute, whether a job that is submitted to a cluster will work."""

    stage = "check"
    is_probed = False
    address: str | None = unhashed(
        None, f"the job server, as of ray job submit; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or {DEFAULT_ADDRESS}"
    )
    paths: tuple[str, ...] = unhashed((), "paths or s3:// URIs that the job will read and write; tried from here")
    gpus: int = unhashed(0, "GPUs that the job will need", ge=0)


def check(spec: CheckSpec) -> None:
    """Print a line for each thing that was looked at: ``ok``, or what is wrong and what to do.

    Raises:
        DistillKacError: something is wrong.
    """
    address = job_server(spec.address)
    looks: dict[str, Callable[[], str]] = {
        f"cluster {without_secrets(address)}": lambda: f"{_told_versions(address)}; {_told_nodes(address, spec.gpus)}",
        **{path: functools.partial(_told_path, path) for path in spec.paths},
        "mlflow": _told_tracking,
    }
    asked = {name: _ask(look) for name, look in looks.items()}
    until = time.monotonic() + LONGEST_SECONDS
    failed = 0
    for name, answer in asked.items():
        try:
            log.info(f"ok     {name}: {answer.result(timeout=max(0.0, until - time.monotonic()))}")
            continue
        except TimeoutError:
            wrong: object = f"{name}: expected an answer within {LONGEST_SECONDS:.0f} s, found none"
        except DistillKacError as error:
            wrong = error if str(error).startswith(name) else f"{name}: {error}"
        failed += 1
        log.info(f"error  {one_line(wrong, most=1000)}")
    if failed:
        raise DistillKacError(f"{failed} of {len(looks)} checks failed: see above")


def job_server(given: str | None) -> str:
    """The address of the job server, found as ``ray job submit`` does: the environment comes before what is given.

    Raises:
        ArgumentError: both are there and differ, or there is one of Ray Client.
    """
    names = ("RAY_API_SERVER_ADDRESS", joining.VARIABLE)
    variable = next((name for name in names if os.environ.get(name)), "")
    address = _as_http(os.environ[variable]) if variable else _as_http(given or DEFAULT_ADDRESS)
    if variable and given and address != _as_http(given):
        raise ArgumentError(
            f"--address: expected that {variable} is not set, which ray job submit goes by, found {one_line(address)} "
            "there: unset it"
        )
    return address


def _as_http(address: str) -> str:
    scheme, separator, rest = address.rstrip("/").rpartition("://")
    if scheme in {"http", "https"}:
        return f"{scheme}{separator}{rest}"
    # That of a cluster, or of Ray Client: the job server has a port of its own on the same machine.
    return f"http://{rest.rpartition(':')[0] or rest}:{joining.JOB_PORT}"


def _ask(look: Callable[[], str]) -> "Future[str]":
    """What it says, by a thread that does not hold up the end of the process."""
    answer: Future[str] = Future()

    def run() -> None:
        try:
            answer.set_result(look())
        except Exception as error:  # noqa: BLE001 - the line of this look says it
            told = error if isinstance(error, DistillKacError) else DistillKacError(f"found {one_line(error)}")
            answer.set_exception(told)

    threading.Thread(target=run, daemon=True).start()
    return answer


def _told_versions(address: str) -> str:
    found = _get(address, "/api/v0/cluster_metadata")
    there = joining.Versions(found["rayVersion"], found["pythonVersion"])
    joining.check_versions(f"cluster {without_secrets(address)}", there)
    return f"{there}, as here"


def _told_nodes(address: str, gpus: int) -> str:
    listed = _get(address, "/api/v0/nodes?detail=1&limit=10000")["result"]["result"]
    alive = [node for node in listed if node["state"] == "ALIVE"]
    total = {kind: sum(node["resources_total"].get(kind, 0) for node in alive) for kind in ("CPU", "GPU")}
    grows = any(cluster.NODE_GROUP_LABEL in node["labels"] for node in alive)
    told = [f"{number} x ({node})" for node, number in Counter(_told_node(node) for node in alive).items()]
    there = f"{'; '.join(told)}{'; an autoscaler may add some' * grows}"
    if gpus > total["GPU"] and not grows:
        raise DistillKacError(
            f"expected {gpus} GPUs, found {there}: start nodes that have some (ray start --address ... on them)"
        )
    return there


def _told_node(node: dict[str, Any]) -> str:
    resources = [f"{node['resources_total'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")]
    labels = [
        f"{name}={value}" for name, value in sorted(node["labels"].items()) if not name.startswith("ray.io/node-id")
    ]
    return ", ".join([*(told for told in resources if not told.startswith("0 ")), *labels])


def _get(address: str, path: str) -> Any:
    """What the job server says, as ``ray job submit`` would hear it.

    Raises:
        DistillKacError: nobody answers in time, something else than Ray, or it does not let us in.
    """
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError

    where = without_secrets(address)
    try:
        headers = get_auth_headers_if_auth_enabled({})
    except AuthenticationError:
        headers = {}
    try:
        answer = requests.get(address + path, headers=headers, timeout=SECONDS, allow_redirects=False)
    except requests.Timeout:
        raise DistillKacError(
            f"expected a job server at {where}, found no answer in {SECONDS:.0f} s: mend the address, or let this "
            "machine through to its port, for example by ssh -L"
        ) from None
    except requests.RequestException:
        raise DistillKacError(
            f"expected a job server at {where}, found that nobody answers: start the cluster, or mend the address; "
            "its dashboard listens on the head alone unless told otherwise: ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from None
    if answer.status_code in {401, 403}:
        raise DistillKacError(f"expected to be let in, found {joining.token_trouble()}")
    try:
        return answer.json()["data"]
    except (ValueError, KeyError, TypeError):
        raise DistillKacError(
            f"expected the job server of Ray at {where}, found status {answer.status_code} of something else: "
            "give the port of Ray's dashboard, often 8265"
        ) from None


def _told_path(path: str) -> str:
    path = cluster.absolute(path)
    probes.check_answers(path)
    probes.check_writable(path)
    if storage.is_shared(path):
        return "written and read from here"
    return f"written and read here; where there are more machines it needs s3://, or {storage.SHARED_VARIABLE}"


def _told_tracking() -> str:
    uri = environment.mlflow_address()
    if not uri or environment.local_path(uri):
        return "no server (MLFLOW_TRACKING_URI): runs go into a file of SQLite, which works on one machine only"
    where = tracking.without_password(uri)
    try:
        client_of(uri).search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 - MLflow raises what it likes
        raise DistillKacError(
            f"expected a tracking server at {where}, found: {one_line(error, 200)}: start it, or "
            "mend the address; names other than localhost want mlflow server --allowed-hosts"
        ) from None
    return f"{where} answers; jobs need MLFLOW_TRACKING_URI in their own environment, that of the nodes"
