"""The reward server: what it is asked, what it refuses, and `serve-reward` in a shell."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import IMAGES, remote, serving
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.commands.serve_reward import SEATS, Server, open_server, service_of
from scoreaction.errors import UserError
from scoreaction.recipes.build import build_reward
from scoreaction.rewards import ink


def post(server: Server, body: bytes, *, path: str = "/score", headers: dict[str, str] | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    said = json.loads(response.read())
    connection.close()
    return response.status, said.get("error", "")


def question(data: bytes, **more: Any) -> bytes:
    return json.dumps({"format": "npy", "samples": base64.b64encode(data).decode(), **more}).encode()


def npy(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


class Bomb:
    """Unpickled, it would leave a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Bomb.mark),)

    mark = Path()


def test_pickle_is_refused_everywhere(tmp_path: Path) -> None:
    """Twin: numpy told to trust it is fooled by the same bytes."""
    Bomb.mark = tmp_path / "unpickled"
    objects = npy(np.array([Bomb()], dtype=object), allow_pickle=True)
    with serving(ink.build(ink.Config())) as server:
        status, said = post(server, question(objects))
        assert (status, said.endswith("objects are refused")) == (400, True)
        assert post(server, question(pickle.dumps(Bomb()))) == (400, "samples are not npy of version 1.0")
        assert post(server, pickle.dumps(Bomb())) == (400, "not JSON")
        assert post(server, pickle.dumps(Bomb()), headers={"Content-Type": "application/octet-stream"})[0] == 415
    assert not Bomb.mark.exists()
    np.load(io.BytesIO(objects), allow_pickle=True)
    assert Bomb.mark.exists()


GOOD = npy(np.zeros((2, 1, 4, 4), np.float32))


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "a question is"),
        (question(GOOD, other=1), "got also other"),
        (question(GOOD, prompts=["a"]), "prompts must be null or 2 texts"),
        (question(GOOD, prompts=["a", 1]), "prompts must be null or 2 texts"),
        (question(GOOD, prompts=["a", "b"], metadata=[1, 2]), "metadata must be null or 2 objects"),
        (question(header("(10**12,)")), "samples are not npy"),
        (question(header("(1000000000000, 4)")), "which is not what follows it"),
        (question(header("(-1, -1)") + bytes(4)), "which is not what follows it"),
        (question(header("()") + bytes(4)), "which is not what follows it"),
        (question(header("(0, 3)")), "which is not what follows it"),
        (question(GOOD[:-1]), "which is not what follows it"),
        (question(npy(np.zeros((2, 2), np.float64))), "must be npy of type float32"),
        (question(npy(np.asfortranarray(np.zeros((2, 3), np.float32)))), "in C order"),
        (b'{"format": "npy", "samples": "?"}', "samples must be base64"),
        (b'{"format": "npy", "samples": 3}', "samples must be base64"),
        (b'{"format": "gif", "samples": "R0lG"}', "a question is"),
        (b'{"format": "png", "samples": "R0lG"}', "samples must be a list of PNG files"),
        (b'{"format": "png", "samples": ["R0lG"]}', "cannot be read as PNG"),
    ],
)  # fmt: skip
def test_a_question_that_is_none_is_refused(body: bytes, said: str) -> None:
    with serving(ink.build(ink.Config())) as server:
        assert post(server, question(GOOD)) == (200, "")
        status, error = post(server, body)
    assert status == 400
    assert said in error


@pytest.mark.slow
def test_pictures_that_unfold_too_far_or_differ_are_refused() -> None:
    from PIL import Image

    def png(*sizes: tuple[int, int], mode: str = "L") -> bytes:
        files = [io.BytesIO() for _ in sizes]
        for file, size in zip(files, sizes, strict=True):
            Image.new(mode, size).save(file, "PNG")
        return json.dumps({"format": "png", "samples": [base64.b64encode(f.getvalue()).decode() for f in files]}).encode()

    with serving(ink.build(ink.Config())) as server:
        assert post(server, png((4, 4), (4, 4))) == (200, "")
        assert "too large" in post(server, png((5000, 5000)))[1]
        assert "20 pictures of 4000 x 4000 at once are too large" in post(server, png(*[(4000, 4000)] * 20))[1]
        assert "of one size" in post(server, png((4, 4), (5, 4)))[1]
        assert "gray or RGB" in post(server, png((4, 4), mode="RGBA"))[1]


def test_addresses_health_and_lengths() -> None:
    """Truth: limits as they were set, and the number of samples that were scored; no token is needed to read them."""
    limits = {"status": "ok", "reward": "tested", "max_images": 64, "max_bytes": 2**20}
    with serving(ink.build(ink.Config()), token="t") as server:

        def health() -> Any:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
            connection.request("GET", "/health")
            report = json.loads(connection.getresponse().read())
            connection.close()
            return report

        right = {"Authorization": "Bearer t"}
        before = health()
        assert before == {**limits, "scored": 0}
        assert post(server, question(GOOD), headers=right) == (200, "")
        same(health(), {**limits, "scored": 2}, unchanged=before)
        assert post(server, question(GOOD), path="/../score", headers=right)[0] == 404
        assert post(server, question(GOOD), headers={"Authorization": "Bearer ü"})[0] == 401
        assert post(server, question(GOOD), headers={**right, "Content-Length": "-5"})[0] == 411


# Many questions at once


class Gate:
    """A reward that scores nothing before it is opened, and notes the first number of each question."""

    def __init__(self) -> None:
        self.opened, self.scored = threading.Event(), list[float]()
        self.differentiable = False

    def __call__(self, samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        self.opened.wait(10)
        self.scored.append(samples[0, 0].item())
        return samples[:, 0]


def there(server: Server) -> int:
    """Questions that have a seat or wait for one."""
    seats: Any = server.service.seats
    return seats._initial_value - seats._value + len(seats._cond._waiters)


def ask(server: Server, numbers: range, **headers: str) -> list[Future[tuple[int, str]]]:
    """Questions with these numbers, each when the one before has a seat or waits for one, whose answers are to come."""
    pool, asked = ThreadPoolExecutor(len(numbers)), list[Future[tuple[int, str]]]()
    for i in numbers:
        before = there(server)
        asked.append(pool.submit(post, server, question(npy(np.full((1, 2), i, np.float32))), headers=headers))
        end = time.monotonic() + 10
        while there(server) == before and not asked[-1].done() and time.monotonic() < end:
            time.sleep(0.005)
    pool.shutdown(wait=False)
    return asked


class Backwards(deque[Any]):
    """A queue whose last comer is next."""

    append = deque.appendleft


def test_questions_are_scored_in_turn() -> None:
    """Truth: the order in which they came, on average within those that are read at a time: a thread may be slow.

    Twin: who comes last is next.
    """

    def order(*, backwards: bool) -> list[float]:
        gate = Gate()
        with serving(gate) as server:
            if backwards:
                server.service.seats._cond._waiters = Backwards()  # type: ignore[attr-defined]
            asked = ask(server, range(24))
            gate.opened.set()
            assert [future.result() for future in asked] == [(200, "")] * 24
        return gate.scored

    def check(scored: list[float]) -> None:
        assert sorted(scored) == list(range(24))
        assert sum(abs(place - number) for place, number in enumerate(scored)) / len(scored) <= SEATS

    accepts(check, order(backwards=False), backwards=order(backwards=True))


def test_a_question_that_waits_costs_a_connection_and_not_its_bytes() -> None:
    """Truth: of 64 MiB the sender gets rid of what the system buffers. Twin: a server with seats for all reads at once."""

    def sent(seats: int) -> int:
        gate, body = Gate(), bytes(2**26)
        with serving(gate, max_bytes=2**26) as server:
            server.service.seats = threading.BoundedSemaphore(seats)
            asked = ask(server, range(SEATS))
            with socket.create_connection(server.server_address[:2], timeout=0.3) as line:
                line.sendall(b"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 67108864\r\n\r\n")
                count = 0
                with suppress(TimeoutError):
                    while count < len(body):
                        count += line.send(memoryview(body)[count:])
                gate.opened.set()
            assert [future.result() for future in asked] == [(200, "")] * SEATS
        return count

    def check(count: int) -> None:
        assert count < 2**25

    accepts(check, sent(SEATS), seats_for_all=sent(2 * SEATS))


@pytest.mark.parametrize("before", [1, SEATS], ids=["read", "unread"])
def test_a_question_waits_as_long_as_its_client_prefers(before: int) -> None:
    """Truth: the clock. Twin: without a preference it waits until its turn comes."""
    gate = Gate()
    with serving(gate) as server:
        first = ask(server, range(before))
        began = time.monotonic()
        (hasty,) = ask(server, range(9, 10), Prefer="respond-async, wait=0")
        assert hasty.result() == (503, "busy")
        assert time.monotonic() - began < 2
        (patient,) = ask(server, range(8, 9))
        time.sleep(0.1)
        assert not patient.done()
        gate.opened.set()
        assert [future.result() for future in (*first, patient)] == [(200, "")] * (before + 1)
    assert sorted(gate.scored) == [*range(before), 8]


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "example.org", "::"])
def test_other_machines_need_a_token(host: str) -> None:
    service = service_of("ink", ink.build(ink.Config()), device="cpu", token=None, max_images=1, max_bytes=1)
    with pytest.raises(UserError, match="--host: .* is reachable from other machines; give --token"):
        open_server(service, host, 0)
    open_server(service, "127.0.0.1", 0).server_close()


def test_a_port_that_is_taken() -> None:
    service = service_of("ink", ink.build(ink.Config()), device="cpu", token=None, max_images=1, max_bytes=1)
    first = open_server(service, "127.0.0.1", 0)
    with pytest.raises(UserError, match="--port: cannot listen"):
        open_server(service, "127.0.0.1", first.server_address[1])
    first.server_close()


@pytest.mark.slow
def test_serve_reward_from_a_shell() -> None:
    """Truth: the reward in process. Ctrl-C ends it with code 0."""
    command = [sys.executable, "-m", "scoreaction", "serve-reward", "ink", "unit=0.5", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split(" at ")[1].split()[0]
        try:
            truth = IMAGES.mean((1, 2, 3)) / 0.5
            close(remote(url)(IMAGES, None), truth, atol=1e-6, other_unit=truth * 0.5 / 0.03)
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, rest) == (0, "stopped\n")
    assert errors.startswith("stopping after")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ink", "--host", "0.0.0.0"], "--host: 0.0.0.0 is reachable from other machines"),
        (["inc"], "reward.name: unknown reward 'inc'; did you mean ink?"),
        (["ink", "unt=1"], "reward.unt: unknown key; did you mean unit?"),
        (["ink", "unit=0"], "reward.unit: must not be 0"),
        (["ink", "--device", "gpux"], "--device: 'gpux' cannot be used here"),
        (["ink", "--token", "a b", "--host", "0.0.0.0"], "--token: must be"),
    ],
)
def test_serve_reward_refuses_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from scoreaction.cli import main

    assert main(["serve-reward", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def test_a_users_module_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "second.py").write_text(
        "from pydantic import BaseModel\n"
        "class Config(BaseModel, extra='forbid'):\n    factor: float = 1.0\n"
        "def build(config): return lambda samples, prompts: config.factor * samples[:, 1]\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "second.py").rename(tmp_path / "mine" / "second.py")
    monkeypatch.chdir(tmp_path)
    with serving(build_reward("mine.second", ["factor=3"])) as server:
        tuner = sa.Finetuner(
            sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), reward=remote(server.url), algorithm=sa.DDPO(),
            sampler=sa.Sampler(steps=2), train=sa.Train(iterations=1, batch=8),
        )  # fmt: skip
        (metrics,) = list(tuner)
        close(remote(server.url)(torch.ones(2, 2), None), [3.0, 3.0], unset=[1.0, 1.0])
    assert metrics["reward_queries"] == 8
