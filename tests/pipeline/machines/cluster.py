"""A Ray cluster of two machines, a third with an S3 and an MLflow server, and a fourth from which jobs are submitted.

Everything as in daily use: `ray start` with a token, `ray job submit --working-dir .`, paths on ``s3://``.
"""

import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from mlflow import MlflowClient

from pipeline import tracking
from tests.pipeline.machines.network import ROOT, Machine, Network
from tests.pipeline.machines.serve import BUCKET, MLFLOW_PORT, READY, S3_PORT
from tests.pipeline.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

TOKEN_FILE = "/tmp/home/token"
JOB_SERVER_PORT, RAY_PORT = 8265, 6379
START_SECONDS, JOB_SECONDS = 300.0, 600.0


class Submission:
    """A job that was submitted, as its `ray job submit` sees it."""

    def __init__(self, cluster: "Cluster", words: tuple[str, ...]) -> None:
        self.cluster, self.words, self.id = cluster, words, f"job-{secrets.token_hex(4)}"
        self.started = time.time()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the job is known
        command = ["ray", "job", "submit", "--address", cluster.job_server, "--submission-id", self.id]
        command += ["--working-dir", ".", "--", "python", "-m", *words]
        self.process = cluster.client.start(*command, folder=ROOT, stdout=self.log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        """What it has printed so far."""
        self.log.seek(0)
        return self.log.read()

    def wait(self, seconds: float = JOB_SECONDS) -> int:
        """Wait for its end; returns the exit code of `ray job submit`."""
        return self.process.wait(seconds)

    def finish(self, seconds: float = JOB_SECONDS) -> str:
        """Wait for its end, which must be a good one; returns what it printed."""
        assert self.wait(seconds) == 0, self.output()
        return self.output()

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """`ray job stop`."""
        self.cluster.client.run("ray", "job", "stop", "--address", self.cluster.job_server, self.id)

    def kill_driver(self) -> None:
        """SIGKILL to the job's own process, on the head."""
        module = self.words[0]
        killed = self.cluster.head.kill(
            lambda name, line: "python" in line[0] and line[1:3] == ["-m", module] if line else False
        )
        assert killed == 1, f"{killed} drivers of {module}"


class Cluster:
    """Off until ``start``; ``close`` ends all of it."""

    def __init__(self) -> None:
        self.network = Network()
        python = Path(sys.prefix)
        self.head, self.worker = (self.network.add(name, [python]) for name in ("head", "worker"))
        self.servers, self.client = (self.network.add(name, [python, ROOT]) for name in ("servers", "client"))
        self.token = secrets.token_hex(32)
        self.s3_endpoint = f"http://{self.servers.address}:{S3_PORT}"
        self.tracking_uri = f"http://{self.servers.address}:{MLFLOW_PORT}"
        self.job_server = f"http://{self.head.address}:{JOB_SERVER_PORT}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN_FILE}
        self.client.environment |= token
        for node in (self.head, self.worker):
            node.environment |= {
                **token,
                "AWS_ENDPOINT_URL": self.s3_endpoint,
                "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
                "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
                "AWS_DEFAULT_REGION": REGION,
                "MLFLOW_TRACKING_URI": self.tracking_uri,
                "DISTILLKAC_CACHE": self.path("cache"),
            }

    def path(self, name: str) -> str:
        """A place in the bucket."""
        return f"s3://{BUCKET}/{name}"

    def start(self) -> None:
        """Switch everything on, and wait until it works together."""
        for machine in self.network.machines:
            machine.boot()
        self._give_token(self.client)
        with ThreadPoolExecutor(2) as threads:
            servers, nodes = threads.submit(self._serve), threads.submit(self._start_nodes)
            servers.result()
            nodes.result()

    def close(self) -> None:
        self.network.close()

    def start_head(self) -> None:
        """Ray on a head that is on."""
        self._give_token(self.head)
        address = ["--node-ip-address", self.head.address, "--port", str(RAY_PORT)]
        dashboard = ["--include-dashboard", "true", "--dashboard-host", self.head.address]
        node = _node("on-demand")
        self.head.run("ray", "start", "--head", *address, *dashboard, *node, seconds=START_SECONDS)

    def start_worker(self) -> None:
        """Ray on a worker that is on."""
        self._give_token(self.worker)
        address = ["--address", f"{self.head.address}:{RAY_PORT}", "--node-ip-address", self.worker.address]
        self.worker.run("ray", "start", *address, *_node("spot"), seconds=START_SECONDS)

    def lose_worker(self) -> None:
        """The worker's machine goes, without a word."""
        self.worker.lose()

    def replace_worker(self) -> None:
        """A fresh machine takes its place, as an autoscaler would bring one."""
        self.worker.lose()
        self.worker.boot()
        self.start_worker()

    def submit(self, *words: str) -> Submission:
        """`ray job submit --working-dir . -- python -m WORDS`."""
        return Submission(self, words)

    def s3(self) -> Any:
        """A client of the bucket; to be used in ``client.inside()``."""
        return boto3.client(
            "s3",
            endpoint_url=self.s3_endpoint,
            aws_access_key_id=ACCESS_KEY_ID,
            aws_secret_access_key=SECRET_ACCESS_KEY,
            region_name=REGION,
        )

    def objects(self, below: str) -> dict[str, float]:
        """Every object below a place in the bucket, by its path there, with the time at which it was written."""
        with self.client.inside():
            pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{below}/")
            found = [entry for page in pages for entry in page.get("Contents", [])]
        return {entry["Key"][len(below) + 1 :]: entry["LastModified"].timestamp() for entry in found}

    def download(self, below: str, to: Path) -> Path:
        """A copy of what lies below a place in the bucket."""
        names = self.objects(below)
        with self.client.inside():
            s3 = self.s3()
            for name in names:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                (to / name).write_bytes(s3.get_object(Bucket=BUCKET, Key=f"{below}/{name}")["Body"].read())
        return to

    def remove(self, below: str) -> None:
        """Remove what lies below a place in the bucket."""
        names = self.objects(below)
        with self.client.inside():
            s3 = self.s3()
            for name in names:
                s3.delete_object(Bucket=BUCKET, Key=f"{below}/{name}")

    def runs(self, out: str) -> list[Any]:
        """MLflow's runs of outputs at a place in the bucket, and below it."""
        with self.client.inside():
            client = MlflowClient(self.tracking_uri)
            experiment = client.get_experiment_by_name(tracking.experiment_name())
            found = [] if experiment is None else list(client.search_runs([experiment.experiment_id], max_results=1000))
        place = self.path(out)
        outputs = [(run, run.data.params.get("out") or run.data.params.get("store") or "") for run in found]
        return [run for run, output in outputs if output == place or output.startswith(f"{place}/")]

    def history(self, run_id: str, metric: str) -> list[Any]:
        """The points of a metric."""
        with self.client.inside():
            return list(MlflowClient(self.tracking_uri).get_metric_history(run_id, metric))

    def _serve(self) -> None:
        command = [sys.executable, "-m", "tests.pipeline.machines.serve", self.servers.address, "/tmp/servers"]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as they run
        process = self.servers.start(*command, folder=ROOT, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        if process.stdout.readline() != f"{READY}\n":
            log.seek(0)
            raise RuntimeError(f"the S3 and MLflow servers did not start: {log.read()}")

    def _start_nodes(self) -> None:
        self.start_head()
        self.start_worker()

    def _give_token(self, machine: Machine) -> None:
        process = machine.start("sh", "-c", f"umask 077 && cat > {TOKEN_FILE}", stdin=subprocess.PIPE)
        process.communicate(self.token)
        assert process.returncode == 0


def _node(market: str) -> list[str]:
    """One CPU a node, so that two workers are on two machines; labels as in ``cluster.yaml``."""
    size = ["--num-cpus", "1", "--object-store-memory", str(200 * 2**20)]
    return [*size, "--labels", f"market={market}", "--disable-usage-stats"]


@contextmanager
def cluster_of_machines() -> Iterator[Cluster]:
    """A cluster that works; all of it is gone after the block."""
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def wait_until(condition: Callable[[], object], job: Submission, seconds: float = JOB_SECONDS) -> None:
    """Wait for the moment of a fault; the job must not end before it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert not job.is_over(), f"the job ended before the fault:\n{job.output()}"
        assert time.monotonic() < deadline, f"the moment of the fault did not come:\n{job.output()}"
        time.sleep(0.1)
