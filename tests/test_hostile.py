"""Truth: the clock and honest clients. Whoever drips, hangs, or speaks for a web page costs nobody else the reward."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from parameters import with_long
from servers import IMAGES, remote, serving
from test_serve_reward import GOOD, post, question
from twins import accepts, same

from scoreaction.commands import serve_reward
from scoreaction.errors import UserError
from scoreaction.rewards import RewardError, ink
from scoreaction.rewards.http import Config


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "127.0.0.2"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8765"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_web_pages_are_not_answered(headers: dict[str, str], status: int) -> None:
    """Twins: hosts of this machine, and, with a token, any host."""
    with serving(ink.build(ink.Config())) as server:
        assert post(server, question(GOOD), headers=headers)[0] == status
    if "Origin" not in headers:
        with serving(ink.build(ink.Config()), token="t") as server:
            with_token = {**headers, "Authorization": "Bearer t"}
            same(
                post(server, question(GOOD), headers=with_token)[0],
                200,
                without=post(server, question(GOOD), headers=headers)[0],
            )


def test_a_length_of_many_digits_is_answered() -> None:
    with serving(ink.build(ink.Config())) as server:
        head = {"Content-Type": "application/json", "Content-Length": "9" * 5000}
        line = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
        line.request("POST", "/score", b"", head)
        said = json.loads(line.getresponse().read())["error"]
        line.close()
        same("bytes are too many" in said, True, of_few="bytes are too many" in post(server, b"[1]")[1])


@contextmanager
def dripping(server: serve_reward.Server, count: int) -> Iterator[None]:
    """Clients that send a letter of a long body now and then."""
    lines = [socket.create_connection(server.server_address[:2]) for _ in range(count)]
    head = b"POST /score HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    for line in lines:
        line.sendall(head)
    done = threading.Event()

    def drip() -> None:
        while not done.wait(0.05):
            for line in lines:
                with suppress(OSError):
                    line.send(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for line in lines:
            line.close()


@pytest.mark.slow
def test_bodies_that_drip_lock_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: a server with patience for them."""

    def waited(grace: float) -> float:
        monkeypatch.setattr(serve_reward, "GRACE", grace)
        with serving(ink.build(ink.Config())) as server, dripping(server, 2 * serve_reward.SEATS):
            time.sleep(0.2)
            began = time.monotonic()
            status, _ = post(server, question(GOOD), headers={"Prefer": "wait=3"})
            return time.monotonic() - began if status == 200 else 100.0

    def soon(seconds: float) -> None:
        assert seconds < 3

    accepts(soon, waited(0.3), with_patience=waited(60.0))


def test_a_body_is_read_whole_where_it_comes_in_pieces() -> None:
    body = question(GOOD)
    with serving(ink.build(ink.Config())) as server, socket.create_connection(server.server_address[:2]) as line:
        head = b"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        line.sendall(head % len(body))
        for i in range(0, len(body), 37):
            line.sendall(body[i : i + 37])
            time.sleep(0.001)
        found = line.makefile("rb").read()
        same(found.split(b"\r\n")[0].split()[1], b"200", refused=b"400")


@contextmanager
def answering(act: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads a question's head and then does as it likes."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                line, _ = listener.accept()
            except TimeoutError:
                continue
            line.settimeout(2)
            try:
                line.recv(65536)
                act(line)
            except OSError:
                pass
            line.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        done.set()
        thread.join()
        listener.close()


def drip(line: socket.socket, head: bytes, rest: bytes) -> None:
    line.sendall(head)
    for _ in range(40):
        line.sendall(rest)
        time.sleep(0.1)


ENDLESS = {
    "head": lambda line: drip(line, b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "headers": lambda line: drip(line, b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
    "body": lambda line: drip(line, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
    "body without length": lambda line: drip(line, b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "chunks": lambda line: drip(line, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "continue": lambda line: drip(line, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("how", with_long(ENDLESS, "body", "continue"))
@pytest.mark.slow
def test_an_answer_without_end_is_cut_off(how: str) -> None:
    """Within the timeout of an answer; twin: the same server with as much time as it takes."""

    def asked(timeout: float) -> float:
        with answering(ENDLESS[how]) as url:
            reward = remote(url, timeout=timeout, retries=0)
            reward.servers[0].report = {}
            began = time.monotonic()
            with pytest.raises(RewardError, match="no answer|not JSON|is it running"):
                reward(IMAGES[:1], None)
            return time.monotonic() - began

    def in_time(seconds: float) -> None:
        assert seconds < 1.5

    accepts(in_time, asked(0.5), with_more_time=asked(2.5))


def test_an_answer_cut_in_the_middle_is_asked_for_again() -> None:
    """Twin: a whole answer that is no JSON is not."""
    whole, asked = b'{"scores": [2.0]}', []

    def act(line: socket.socket) -> None:
        asked.append(1)
        sent = whole if len(asked) > 1 else whole[:9]
        line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole) + sent)

    with answering(act) as url:
        reward = remote(url, retries=1)
        reward.servers[0].report = {}
        same(reward(IMAGES[:1], None).tolist(), [2.0], nothing=[])
    with answering(lambda line: line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]")) as url:
        reward = remote(url, retries=1)
        reward.servers[0].report = {}
        with pytest.raises(RewardError, match="not JSON"):
            reward(IMAGES[:1], None)


def test_rubbish_is_a_short_line() -> None:
    """Without its control characters; twin: the rubbish."""
    rubbish = bytes(range(256)) * 10
    with answering(lambda line: line.sendall(rubbish)) as url:
        reward = remote(url, retries=0)
        reward.servers[0].report = {}
        with pytest.raises(RewardError, match="no answer") as caught:
            reward(IMAGES[:1], None)

    def fine(text: str) -> None:
        assert text.isprintable()
        assert len(text) < 300

    accepts(fine, str(caught.value), rubbish=rubbish.decode("latin-1"))


def test_a_recipe_names_no_other_secret() -> None:
    assert Config(token_variable="SCOREACTION_TOKEN_2").token_variable == "SCOREACTION_TOKEN_2"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "scoreaction_token", "SCOREACTION_", "X_SCOREACTION_TOKEN"):
        with pytest.raises(UserError, match="^Config.token_variable: "):
            Config(token_variable=name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_a_signal_ends_a_server_whose_scorer_hangs(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth: the clock; twin: the scorer, which never ends."""
    (tmp_path / "hanging").mkdir()
    (tmp_path / "hanging" / "now.py").write_text(
        "import time\nfrom pydantic import BaseModel\nclass Config(BaseModel):\n    pass\n"
        "def build(config): return lambda samples, prompts: time.sleep(1000)\n"
    )
    command = [sys.executable, "-m", "scoreaction", "serve-reward", "hanging.now", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert server.stdout is not None
    url = server.stdout.readline().split(" at ")[1].split()[0]
    reward = remote(url, timeout=1.0, retries=0)
    with pytest.raises(RewardError, match="no answer|busy"):
        reward(torch.zeros(1, 2), None)
    began = time.monotonic()
    os.kill(server.pid, number)
    assert server.wait(timeout=60) == 0
    assert "stopping after what is being answered" in (server.stderr.read() if server.stderr else "")
    assert time.monotonic() - began < serve_reward.LAST_ANSWERS + 15
