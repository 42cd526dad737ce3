"""The servers that a Ray cluster uses: a real S3 server and a real MLflow server, in this process's network.

python -m tests.pipeline.machines.serve ADDRESS FOLDER
"""

import os
import sys
import threading
from pathlib import Path

from tests.pipeline.s3_server import FaultyS3
from tests.pipeline.tracking_servers import mlflow_server

BUCKET = "machines"
S3_PORT, MLFLOW_PORT = 9000, 5000
READY = "ready"


def serve(address: str, folder: Path) -> None:
    """Serve until this process is killed; print ``READY`` once both servers answer."""
    s3 = FaultyS3(address, S3_PORT)
    s3.start()
    s3.client().create_bucket(Bucket=BUCKET)
    folder.mkdir(parents=True)
    with mlflow_server(folder, f"sqlite:///{folder / 'mlflow.db'}", address, MLFLOW_PORT):
        print(READY, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    os.environ.pop("AWS_ENDPOINT_URL", None)
    serve(sys.argv[1], Path(sys.argv[2]))
