"""A real MLflow server for tests, on PostgreSQL if installed, and a TCP line to the server that can be cut."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgresql_programs() -> Path | None:
    """Return the folder of initdb and postgres, which Debian does not add to PATH."""
    initdb = shutil.which("initdb")
    folders = [Path(initdb).parent] if initdb else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


@contextmanager
def postgresql(programs: Path) -> Iterator[str]:
    """Run a new PostgreSQL server and yield its address. Root must run the server as user postgres."""
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="distillkac-postgresql-"))
    data = folder / "data"
    as_user: dict[str, str | int] = {}
    if os.getuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid}
    options = {"fsync": "off", "listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": ""}
    settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        create = [programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync"]
        subprocess.run(create, check=True, stdout=log, stderr=log, cwd=folder, **as_user)  # type: ignore[call-overload]
        process = subprocess.Popen(  # type: ignore[call-overload]
            [programs / "postgres", "-D", data, *settings], stdout=log, stderr=log, cwd=folder, **as_user
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGQUIT)  # stops without waiting for clients or the disk
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_server(folder: Path, backend: str, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Run `mlflow server` and yield its address."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "files")]
    command += ["--allowed-hosts", "*"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            uri = f"http://{host}:{port}"
            _wait_until_healthy(uri, process)
            yield uri
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # kills its workers too, at once
            process.wait()


def _wait_until_healthy(uri: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server at {uri} did not become healthy")


class Line:
    """A TCP proxy for a server. While the line is cut, connections break and new connections are refused."""

    def __init__(self, port: int) -> None:
        self.port, self.own_port = port, free_port()
        self.uri = f"http://127.0.0.1:{self.own_port}"
        self._open: set[socket.socket] = set()
        self._listening: socketserver.ThreadingTCPServer | None = None
        self.join()

    def join(self) -> None:
        """Forward connections to the server."""
        line = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", line.port)) as server:
                    line._open |= {self.request, server}
                    answers = threading.Thread(target=_forward, args=(server, self.request), daemon=True)
                    answers.start()
                    _forward(self.request, server)
                    answers.join()
                    line._open -= {self.request, server}

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, block_on_close = True, True, False

        self._listening = Server(("127.0.0.1", self.own_port), Connection)
        threading.Thread(target=self._listening.serve_forever, args=(0.05,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and refuse new connections."""
        assert self._listening is not None
        self._listening.shutdown()
        self._listening.server_close()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
