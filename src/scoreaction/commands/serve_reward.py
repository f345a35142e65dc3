"""`scoreaction serve-reward` and `serve-writer`: either behind HTTP, so that it can live in an environment of its own.

The standard library's server: two addresses need no framework, and one more package would be one more pin to quarrel
with in the environment of a scorer.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from scoreaction.catalog import TOKEN_VARIABLE
from scoreaction.commands.served import Scores, Served
from scoreaction.commands.signals import answer as say
from scoreaction.commands.signals import heard
from scoreaction.errors import UserError
from scoreaction.rewards import RewardError
from scoreaction.rewards._wire import WireError, sendable
from scoreaction.training.checks import check_device
from scoreaction.types import RewardFunction

SEATS = 4
"""Questions that are read or answered at a time; the next wait unread, so that they cost a connection and not their bytes."""
PATIENCE = 30.0
"""Seconds that a silent client is waited for, and that a question waits for its turn unless its client prefers less."""
GRACE, SLOWEST = 5.0, 2**16
"""Seconds that a body may take to begin, and the bytes a second that it must then keep up: a seat is not for dawdlers."""
LAST_ANSWERS = 5.0
"""Seconds for which what is being answered is waited for when the server ends."""


@dataclass
class Service:
    """Work that is served, with its limits and its token; it is asked by one thread at a time."""

    served: Served
    device: torch.device
    token: str | None
    max_images: int
    max_bytes: int
    one: threading.Semaphore = field(default_factory=threading.Semaphore)  # fairer than a lock: the first to wait is the next
    seats: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(SEATS))

    def health(self) -> dict[str, Any]:
        """The answer to GET /health."""
        limits = {"max_images": self.max_images, "max_bytes": self.max_bytes}
        return {"status": "ok", self.served.kind: self.served.name, **limits, "scored": self.served.rows}

    def allows(self, authorization: str | None) -> bool:
        """True where the header holds the token; takes the same time for every wrong one."""
        if self.token is None:
            return True
        return hmac.compare_digest((authorization or "").encode("utf-8", "replace"), f"Bearer {self.token}".encode())

    @property
    def addresses(self) -> str:
        """The line that says what may be asked where."""
        return f"GET /health, or POST {self.served.path}"

    def answer(self, body: bytes, *, wait: float) -> bytes:
        """The answer, empty where the turn does not come in time. WireError where the question cannot be read, RewardError."""
        work = self.served.read(body, most=self.max_images)
        if not self.one.acquire(timeout=wait):
            return b""
        try:
            with torch.no_grad():
                return work(self.device)
        finally:
            self.one.release()


class Handler(BaseHTTPRequestHandler):
    """Answers one question a connection, and speaks only JSON."""

    server: Server
    timeout = PATIENCE
    server_version, sys_version = "scoreaction", ""

    def do_GET(self) -> None:
        if not self._comes_from_a_program():
            return None
        if self.path != "/health":
            return self._respond(404, {"error": self.server.service.addresses})
        return self._respond(200, self.server.service.health())

    def do_POST(self) -> None:
        service = self.server.service
        if not self._comes_from_a_program():
            return None
        if self.path != service.served.path:
            return self._respond(404, {"error": service.addresses})
        if not service.allows(self.headers.get("Authorization")):
            return self._refuse(401, "the token is missing or wrong")
        if self.headers.get_content_type() != "application/json":  # a web page cannot send this to us unasked
            return self._refuse(415, "the content type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            return self._refuse(411, "Content-Length must be given")
        if len(length) > 18 or int(length) > service.max_bytes:
            return self._refuse(
                413, f"{length[:18]} bytes are too many, {service.max_bytes} at most; ask for fewer samples at once"
            )
        patience = re.search(r"\bwait=(\d{1,6})\b", self.headers.get("Prefer", ""))
        wait = min(PATIENCE, int(patience[1])) if patience else PATIENCE
        if not service.seats.acquire(timeout=wait):
            return self._refuse(503, "busy")
        try:
            return self._answer(int(length), wait)
        finally:
            service.seats.release()

    def _comes_from_a_program(self) -> bool:
        """False, with an answer, for a question that a web page made a browser ask.

        A browser names the page in Origin; one whose name was turned to 127.0.0.1 (DNS rebinding) stands in Host.
        """
        if self.headers.get("Origin") is not None:
            self._refuse(403, "questions from web pages are not answered")
        elif self.server.service.token is None and not _loopback(_host_of(self.headers.get("Host", "localhost"))):
            self._refuse(403, "the host must be localhost or a loopback address; from elsewhere with --token")
        else:
            return True
        return False

    def _read(self, length: int) -> bytes:
        """The body; cut short where the client goes away, or sends less than `SLOWEST` bytes a second."""
        body, began = bytearray(), time.monotonic()
        with suppress(OSError):
            while len(body) < length:
                left = began + GRACE + len(body) / SLOWEST - time.monotonic()
                self.connection.settimeout(max(left, 0.001))
                part = self.rfile.read1(min(length - len(body), 2**16))
                if not part or left <= 0:
                    break
                body += part
        self.connection.settimeout(PATIENCE)
        return bytes(body)

    def _answer(self, length: int, wait: float) -> None:
        body = self._read(length)
        if len(body) < length:
            return None  # the client went away
        try:
            answer = self.server.service.answer(body, wait=wait)
        except WireError as error:
            return self._respond(400, {"error": str(error)})
        except RewardError as error:
            return self._respond(422, {"error": str(error)})
        return self._respond(200, answer) if answer else self._refuse(503, "busy")

    def _refuse(self, status: int, why: str) -> None:
        """Answers before the question was read; reads on a little, so that the client sees the answer and not a cut line."""
        self._respond(status, {"error": why})
        self.wfile.flush()
        end, left = time.monotonic() + 2.0, 2**26
        self.connection.settimeout(0.5)
        with suppress(OSError):
            while left > 0 and time.monotonic() < end and (read := len(self.rfile.read1(65536))):
                left -= read

    def _respond(self, status: int, body: dict[str, Any] | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log of a run is the run's."""


class Server(ThreadingHTTPServer):
    """Serves a `Service` at (host, port); port 0 lets the system choose."""

    request_queue_size = 1024
    daemon_threads = True  # a scorer that hangs is not waited for: see `drain`

    def __init__(self, service: Service, host: str, port: int) -> None:
        self.service = service
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """The address of the server."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def drain(self, seconds: float) -> None:
        """Waits until nothing is being read or answered any more, this long at most."""
        end = time.monotonic() + seconds
        for _ in range(SEATS):
            if not self.service.seats.acquire(timeout=max(end - time.monotonic(), 0)):
                return

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""


def service_of(
    name: str, reward: RewardFunction, *, device: str, token: str | None, max_images: int, max_bytes: int
) -> Service:
    """The service of a reward; UserError for a device that is not there."""
    return serviced(Scores(name, reward), device=device, token=token, max_images=max_images, max_bytes=max_bytes)


def serviced(served: Served, *, device: str, token: str | None, max_images: int, max_bytes: int) -> Service:
    """The service of a reward or a writer; UserError for a device that is not there."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device(chosen, key="--device")
    return Service(served, torch.device(chosen), token or None, max_images, max_bytes)


def open_server(service: Service, host: str, port: int) -> Server:
    """A server that listens; UserError where it may not or cannot.

    Whatever is reachable from other machines must have a token.
    """
    if service.token is not None and not sendable(service.token):
        raise UserError("--token: must be letters, digits and signs without spaces")
    if service.token is None and not _loopback(host):
        raise UserError(f"--host: {host} is reachable from other machines; give --token (or {TOKEN_VARIABLE}), or 127.0.0.1")
    try:
        return Server(service, host, port)
    except OSError as error:
        raise UserError(f"--port: cannot listen at {host} port {port} ({error.strerror or error}); choose another") from error


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_of(header: str) -> str:
    """The name in a Host header, without its port.

    >>> _host_of("localhost:8765"), _host_of("[::1]:80"), _host_of("127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
    """
    name = header.strip()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].rstrip(".").lower()


def serve_at(host: str, port: int, service: Service) -> None:
    """Opens a server, says where it is, and serves until it is ended."""
    server, served = open_server(service, host, port), service.served
    print(f"serving {served.name} at {server.url} (POST {served.path}, GET /health)", flush=True)
    serve(server)
    print("stopped")


def serve(server: Server) -> None:
    """Serves until Ctrl-C, SIGTERM or a closed terminal, the first two even if the shell had them ignored.

    What was begun is still answered, for a few seconds; a second signal, or work that hangs, ends without it.
    """
    for number in heard():
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.2)
    server.server_close()
    say(f"stopping after what is being answered, {LAST_ANSWERS:g} seconds at most; Ctrl-C stops at once")
    with suppress(KeyboardInterrupt):
        server.drain(LAST_ANSWERS)
