"""Four machines: a Ray cluster of two, one with an S3 server and an MLflow server, and one that submits jobs.

The cluster is used like a real one: `ray start` with a token, `ray job submit --working-dir .`, paths on ``s3://``.
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
    """A submitted job, and its `ray job submit` process."""

    def __init__(self, cluster: "Cluster", command: tuple[str, ...]) -> None:
        self.cluster, self.command, self.id = cluster, command, f"job-{secrets.token_hex(4)}"
        self.started = time.time()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - stays open as long as this object
        submit = ["ray", "job", "submit", "--address", cluster.job_server, "--submission-id", self.id]
        submit += ["--working-dir", ".", "--", "python", "-m", *command]
        self.process = cluster.client.start(*submit, folder=ROOT, stdout=self.log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        """Return the output of the job so far."""
        self.log.seek(0)
        return self.log.read()

    def wait(self, seconds: float = JOB_SECONDS) -> int:
        """Wait for the job to end, and return the exit code of `ray job submit`."""
        return self.process.wait(seconds)

    def finish(self, seconds: float = JOB_SECONDS) -> str:
        """Wait until the job succeeds, and return its output."""
        assert self.wait(seconds) == 0, self.output()
        return self.output()

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Stop the job with `ray job stop`."""
        self.cluster.client.run("ray", "job", "stop", "--address", self.cluster.job_server, self.id)

    def kill_driver(self) -> None:
        """Send SIGKILL to the driver, which runs on the head."""
        module = self.command[0]
        killed = self.cluster.head.kill(
            lambda name, line: "python" in line[0] and line[1:3] == ["-m", module] if line else False
        )
        assert killed == 1, f"{killed} drivers of {module}"


class Cluster:
    """The cluster, its servers and its client. All machines are off until ``start``."""

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
        """Return the URI of a path in the bucket."""
        return f"s3://{BUCKET}/{name}"

    def start(self) -> None:
        """Boot all machines, and wait until all servers and nodes run."""
        for machine in self.network.machines:
            machine.boot()
        self._give_token(self.client)
        with ThreadPoolExecutor(2) as threads:
            servers, nodes = threads.submit(self._serve), threads.submit(self._start_nodes)
            servers.result()
            nodes.result()

    def close(self) -> None:
        """Stop all machines."""
        self.network.close()

    def start_head(self) -> None:
        """Start Ray on the head, which must already be booted."""
        self._give_token(self.head)
        address = ["--node-ip-address", self.head.address, "--port", str(RAY_PORT)]
        dashboard = ["--include-dashboard", "true", "--dashboard-host", self.head.address]
        node = _node("on-demand")
        self.head.run("ray", "start", "--head", *address, *dashboard, *node, seconds=START_SECONDS)

    def start_worker(self) -> None:
        """Start Ray on the worker, which must already be booted."""
        self._give_token(self.worker)
        address = ["--address", f"{self.head.address}:{RAY_PORT}", "--node-ip-address", self.worker.address]
        self.worker.run("ray", "start", *address, *_node("spot"), seconds=START_SECONDS)

    def lose_worker(self) -> None:
        """Stop the worker's machine without notice."""
        self.worker.lose()

    def drain_worker(self, seconds: int) -> None:
        """Announce to Ray that the worker's machine will be taken away after some seconds, as a cloud would."""
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        self.worker.run("ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds))

    def replace_worker(self) -> None:
        """Replace the worker with a fresh machine, as an autoscaler would."""
        self.worker.lose()
        self.worker.boot()
        self.start_worker()

    def submit(self, *command: str) -> Submission:
        """Run `ray job submit --working-dir . -- python -m COMMAND`."""
        return Submission(self, command)

    def s3(self) -> Any:
        """Return a client of the S3 server, for use within ``client.inside()``."""
        return boto3.client(
            "s3",
            endpoint_url=self.s3_endpoint,
            aws_access_key_id=ACCESS_KEY_ID,
            aws_secret_access_key=SECRET_ACCESS_KEY,
            region_name=REGION,
        )

    def objects(self, below: str) -> dict[str, float]:
        """Return the modification times of all objects below a path in the bucket, by their relative paths."""
        with self.client.inside():
            pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{below}/")
            entries = [entry for page in pages for entry in page.get("Contents", [])]
        return {entry["Key"][len(below) + 1 :]: entry["LastModified"].timestamp() for entry in entries}

    def download(self, below: str, to: Path) -> Path:
        """Download all objects below a path in the bucket, and return the local folder."""
        names = self.objects(below)
        with self.client.inside():
            s3 = self.s3()
            for name in names:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                (to / name).write_bytes(s3.get_object(Bucket=BUCKET, Key=f"{below}/{name}")["Body"].read())
        return to

    def remove(self, below: str) -> None:
        """Remove all objects below a path in the bucket."""
        names = self.objects(below)
        with self.client.inside():
            s3 = self.s3()
            for name in names:
                s3.delete_object(Bucket=BUCKET, Key=f"{below}/{name}")

    def runs(self, out: str) -> list[Any]:
        """Return MLflow's runs whose output is at or below a path in the bucket."""
        with self.client.inside():
            client = MlflowClient(self.tracking_uri)
            experiment = client.get_experiment_by_name(tracking.experiment_name())
            runs = [] if experiment is None else list(client.search_runs([experiment.experiment_id], max_results=1000))
        path = self.path(out)
        outputs = [(run, run.data.params.get("out") or run.data.params.get("store") or "") for run in runs]
        return [run for run, output in outputs if output == path or output.startswith(f"{path}/")]

    def history(self, run_id: str, metric: str) -> list[Any]:
        """Return the logged points of a metric."""
        with self.client.inside():
            return list(MlflowClient(self.tracking_uri).get_metric_history(run_id, metric))

    def _serve(self) -> None:
        command = [sys.executable, "-m", "tests.pipeline.machines.serve", self.servers.address, "/tmp/servers"]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - stays open as long as the servers run
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
    """Return node options: one CPU, so that two workers use two machines, and a label as in ``cluster.yaml``."""
    size = ["--num-cpus", "1", "--object-store-memory", str(200 * 2**20)]
    return [*size, "--labels", f"market={market}", "--disable-usage-stats"]


@contextmanager
def cluster_of_machines() -> Iterator[Cluster]:
    """Run a cluster until the end of the block."""
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def wait_until(condition: Callable[[], object], job: Submission, seconds: float = JOB_SECONDS) -> None:
    """Wait for the time to inject a fault. Fail if the job ends earlier."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert not job.is_over(), f"the job ended before the fault:\n{job.output()}"
        assert time.monotonic() < deadline, f"the condition for the fault was not reached:\n{job.output()}"
        time.sleep(0.1)
