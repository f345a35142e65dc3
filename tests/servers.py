"""Servers for tests: a reward's, a writer's, one that answers as it is told; a client, and the line that it fails with."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from scoreaction.commands.serve_reward import Server, Service, open_server, service_of, serviced
from scoreaction.commands.served import Texts
from scoreaction.rewards import CountedReward, RewardError, _wire
from scoreaction.rewards import http as client

IMAGES = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@contextmanager
def serving(
    reward: Any, *, host: str = "127.0.0.1", token: str | None = None, max_images: int = 64, max_bytes: int = 2**20
) -> Iterator[Server]:
    """A reward's server on a port that the system chose."""
    with running(
        service_of("tested", reward, device="cpu", token=token, max_images=max_images, max_bytes=max_bytes), host
    ) as s:
        yield s


@contextmanager
def writing(writer: Any, *, token: str | None = None, max_images: int = 64, max_bytes: int = 2**20) -> Iterator[Server]:
    """A writer's server on a port that the system chose."""
    served = Texts("tested", writer)
    with running(serviced(served, device="cpu", token=token, max_images=max_images, max_bytes=max_bytes)) as server:
        yield server


@contextmanager
def running(service: Service, host: str = "127.0.0.1") -> Iterator[Server]:
    """A server in a thread."""
    server = open_server(service, host, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def pretending(
    answer: Callable[[int, bytes], tuple[int, bytes] | None],
    health: Callable[[], tuple[int, bytes] | None] = lambda: (404, b""),
) -> Iterator[str]:
    """A server that answers its i-th question by `answer(i, body)`, None cuts the line; gives its address."""
    asked: list[int] = []

    class Pretender(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(health())

        def do_POST(self) -> None:
            asked.append(1)
            self.respond(answer(len(asked), self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, said: tuple[int, bytes] | None) -> None:
            if said is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(said[0])
            self.send_header("Content-Length", str(len(said[1])))
            self.end_headers()
            self.wfile.write(said[1])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pretender)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def remote(url: str | list[str], **settings: Any) -> client.Http:
    return client.build(client.Config(**{"url": url, "backoff": 0.01, "timeout": 5.0, **settings}))


def failure(reward: client.Http, samples: torch.Tensor = IMAGES) -> str:
    """The one line that a run would stop with."""
    with pytest.raises(RewardError) as caught:
        CountedReward(reward)(samples, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scores(body: bytes) -> bytes:
    return _wire.answer(torch.zeros(len(_wire.read_question(body, most=1000)[0])))
