"""An S3 server with injected faults: moto behind a small proxy that fails requests as a real network does.

Importing this module reserves the port, so ``environment`` can be set before Ray starts its workers. The server answers
only after ``start``.
"""

import logging
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import boto3
from moto.server import ThreadedMotoServer

ACCESS_KEY_ID = "KACTESTKEYID4711RECOGNISE"
SECRET_ACCESS_KEY = "kac-test-secret-0815-recognise/me+anywhere"
REGION = "us-east-1"
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "host"}

FaultKind = Literal["slow_down", "reset", "lose_reply", "truncate", "refuse_key", "deny"]
"""The kinds of faults.

slow_down: 503 before S3 receives the request.
reset: the connection breaks before S3 receives the request.
lose_reply: S3 handles the request, but the reply is lost.
truncate: only half of the body arrives.
refuse_key: 403 that names the access key, as S3 does.
deny: 403 for a missing permission.
"""

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
INVALID_KEY = (
    "<Error><Code>InvalidAccessKeyId</Code><Message>The AWS Access Key Id you provided does not exist in our records."
    f"</Message><AWSAccessKeyId>{ACCESS_KEY_ID}</AWSAccessKeyId></Error>"
).encode()


@dataclass
class Fault:
    """A rule for failing requests.

    Attributes:
        methods: HTTP methods that match; empty matches all.
        path: text that the path of the request must contain.
        probability: probability that a matching request fails.
        count: maximum number of failures; None for no limit.
        injected: number of failures so far.
    """

    kind: FaultKind
    methods: tuple[str, ...] = ()
    path: str = ""
    probability: float = 1.0
    count: int | None = None
    injected: int = field(default=0, init=False)


class FaultyS3:
    """The server behind ``environment()``. Inject faults with ``failing``."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._random = random.Random(0)
        self.requests: list[tuple[str, str]] = []  # method and path, in order of arrival
        self._proxy = _Proxy(self, host, port)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def start(self) -> None:
        """Serve until ``stop``."""
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise werkzeug logs every request
        self._moto.start()
        self.moto_address = self._moto.get_host_and_port()
        self._proxy.server_activate()
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    @property
    def endpoint(self) -> str:
        host, port = self._proxy.server_address[:2]
        return f"http://{host}:{port}"

    def client(self) -> "boto3.client":
        """Return a client that bypasses the proxy and its faults."""
        host, port = self.moto_address
        return boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="outside",
            aws_secret_access_key="outside",
            region_name=REGION,
        )

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        """Inject the faults inside the block. The first fault that matches a request applies."""
        with self._lock:
            self._faults = list(faults)
        try:
            yield
        finally:
            with self._lock:
                self._faults = []

    def draw(self, method: str, path: str) -> FaultKind | None:
        """Record a request, and return the fault to inject, or None."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                is_meant = (not fault.methods or method in fault.methods) and fault.path in path
                is_left = fault.count is None or fault.injected < fault.count
                if is_meant and is_left and self._random.random() < fault.probability:
                    fault.injected += 1
                    return fault.kind
        return None


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: FaultyS3, host: str, port: int) -> None:
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self.owner = owner
        self.server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore broken connections of killed clients."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing, because tests check the recorded requests."""

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.server.owner.draw(self.command, self.path)
        if kind == "reset":
            return self._reset()
        if kind == "slow_down":
            return self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
        if kind == "refuse_key":
            return self._answer(403, {"Content-Type": "application/xml"}, INVALID_KEY)
        if kind == "deny":
            return self._answer(403, {"Content-Type": "application/xml"}, DENIED)
        reply, data = self._forward(body)
        if kind == "lose_reply":
            return self._reset()
        headers = {name: value for name, value in reply.getheaders() if name.lower() not in HOP_HEADERS}
        if self.command == "HEAD":
            headers["Content-Length"] = reply.getheader("Content-Length", "0")
        return self._answer(reply.status, headers, data, cut=kind == "truncate")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

    def _forward(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection(*self.server.owner.moto_address)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
        # The path contains the bucket. Keep the host, because signatures and redirects include it.
        headers["Host"] = self.headers["Host"]
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        return reply, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Close the connection with RST, as a failing machine or router does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


SERVER = FaultyS3()


def environment() -> dict[str, str]:
    """Return the AWS variables that point the processes of a test at ``SERVER``."""
    return {
        "AWS_ENDPOINT_URL": SERVER.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_DEFAULT_REGION": REGION,
    }
