"""Rewards over HTTP: what comes back is what the reward says in process, and whatever goes wrong is one clear line."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from twins import accepts, close

import scoreaction as sa
from scoreaction.config import build_reward, load_recipe
from scoreaction.rewards import CountedReward, Reward, RewardError, _wire, ink
from scoreaction.rewards import http as client
from scoreaction.serving import Server, open_server, service_of
from scoreaction.shelf import UserError
from scoreaction.training import Failed, run
from scoreaction.types import Prompt

IMAGES = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@contextmanager
def serving(
    reward: Any, *, host: str = "127.0.0.1", token: str | None = None, max_images: int = 64, max_bytes: int = 2**20
) -> Iterator[Server]:
    """A server on a port that the system chose."""
    service = service_of("tested", reward, device="cpu", token=token, max_images=max_images, max_bytes=max_bytes)
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
def pretending(answer: Callable[[int, bytes], tuple[int, bytes] | None]) -> Iterator[str]:
    """A server that answers its i-th question by `answer(i, body)`, None cuts the line; gives its address."""
    asked: list[int] = []

    class Pretender(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(1)
            said = answer(len(asked), self.rfile.read(int(self.headers["Content-Length"])))
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


def remote(url: str, **settings: Any) -> client.Http:
    return client.build(client.Config(**{"url": url, "backoff": 0.01, "timeout": 5.0, **settings}))


def failure(reward: client.Http, samples: torch.Tensor = IMAGES) -> str:
    """The one line that a run would stop with."""
    with pytest.raises(RewardError) as caught:
        CountedReward(reward)(samples, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scores(body: bytes) -> bytes:
    return _wire.answer(torch.zeros(len(_wire.asked(body, most=1000)[0])))


# The way there and back


@pytest.mark.parametrize("batch", [3, 10, 64])
def test_npy_is_exact_and_png_is_to_8_bits(batch: int) -> None:
    """Truth: the same reward in process. Mean brightness in 8 bits is off by at most half a step."""
    local = ink.build(ink.Config(unit=1.0))
    with serving(local) as server:
        exact = remote(server.url, batch=batch)(IMAGES, None)
        rounded = remote(server.url, batch=batch, format="png")(IMAGES, None)
        gray = remote(server.url, batch=batch, format="png")(IMAGES[:, :1], None)
    truth = local(IMAGES, None)
    close(exact, truth, atol=0.0, order=exact.flip(0), eight_bits=local((IMAGES * 255).round() / 255, None))
    close(rounded, truth, atol=0.5 / 255, order=rounded.flip(0), seven_bits=local((IMAGES * 127).floor() / 127, None))
    close(gray, local(IMAGES[:, :1], None), atol=0.5 / 255, colour=rounded)


def test_any_samples_prompts_and_metadata_reach_the_reward() -> None:
    """Truth: what a reward here is given."""
    seen: list[Any] = []

    def reward(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.append([(str(p), p.metadata if isinstance(p, Prompt) else None) for p in prompts] if prompts else prompts)
        return samples.double().sum(1)

    vectors = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    prompts = ["a cat", Prompt("zwei Hünde", metadata={"count": 2}), "a cat", "x"]
    with serving(reward) as server:
        close(remote(server.url)(vectors, prompts), vectors.sum(1), atol=1e-5, halved=vectors.sum(1) / 2)
        remote(server.url)(vectors, ["a", "b", "c", "d"])
        remote(server.url)(vectors, None)
    assert seen == [[("a cat", {}), ("zwei Hünde", {"count": 2}), ("a cat", {}), ("x", {})], [(p, None) for p in "abcd"], None]


def test_questions_are_in_flight_while_later_samples_are_decoded() -> None:
    """Truth: a clock. Six parts, each decoded and then scored for 0.1 s, take half as long as one after the other."""

    def slow(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        time.sleep(0.1)
        return samples.sum(1)

    def decode(x0: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return 2 * x0

    def took(reward: Any) -> float:
        began = time.perf_counter()
        close(CountedReward(reward).begin_decoded(x, decode, None)(), 2 * x.sum(1), undecoded=x.sum(1) + 1)
        return time.perf_counter() - began

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    with serving(slow) as server:
        background = remote(server.url, batch=2)
        apart = took(Reward(lambda s, c: torch.cat([background(decode(part) / 2, None) for part in s.split(2)])))
        assert apart > 1.2

        def check(seconds: float) -> None:
            assert seconds < 0.75 * apart

        accepts(check, took(background), in_a_row=apart)


def test_questions_are_in_flight_while_later_trajectories_are_drawn() -> None:
    """Truth: the order of events, and the scores of the same samples in process. Four pieces of two trajectories."""
    events: list[str] = []

    def score(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        events.append("asked")
        return samples.sum(1)

    def collected(reward: Any) -> tuple[list[str], Any]:
        events.clear()
        model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
        predict = model.predict

        def slowly(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.1)
            events.append("predicted")
            return predict(*args, **kwargs)

        model.predict = slowly  # type: ignore[method-assign]
        tuner = sa.Finetuner(
            model, reward=reward, algorithm=sa.DDPO(), sampler=sa.Sampler(steps=3), train=sa.Train(iterations=1, batch=8)
        )
        experience, _ = tuner._collect()
        return list(events), experience

    with serving(score) as server:
        background = remote(server.url, batch=2)
        afterwards, _ = collected(lambda samples, prompts: background(samples, None))
        meanwhile, experience = collected(background)
    x0 = experience.rollout.x0
    close(experience.rewards, x0.sum(1), atol=1e-5, in_another_order=x0.flip(0).sum(1))
    assert experience.rollout.x.shape == (4, 8, 2)
    assert x0.unique(dim=0).shape == (8, 2), "each piece has noise of its own"

    def check(found: list[str]) -> None:
        last = max(i for i, event in enumerate(found) if event == "predicted")
        assert found[:last].count("asked") == 3

    accepts(check, meanwhile, afterwards=afterwards)


def test_every_row_is_counted_once() -> None:
    with serving(ink.build(ink.Config())) as server:
        counted = CountedReward(remote(server.url, batch=3))
        counted.begin_decoded(IMAGES, lambda x: x, None)()
    assert counted.queries == 10


# What can go wrong


def test_a_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = failure(remote(url, retries=2))
    assert said == f"reward: {url}: no answer (connection refused) after 3 tries; is it running, and is url right?"


def test_a_server_that_is_slow() -> None:
    """Twin: with patience the same server answers."""

    def late(i: int, body: bytes) -> tuple[int, bytes]:
        time.sleep(0.4)
        return 200, scores(body)

    with pretending(late) as url:
        assert "no answer within 0.1 seconds after 2 tries" in failure(remote(url, timeout=0.1, retries=1))
        assert CountedReward(remote(url, timeout=5.0, retries=0))(IMAGES, None).shape == (10,)


@pytest.mark.parametrize("how", ["busy", "cut"])
def test_a_flaky_server_is_asked_again(how: str) -> None:
    """Truth: the count. Twin: one retry fewer is an error."""
    fails: dict[str, tuple[int, bytes] | None] = {"busy": (503, b""), "cut": None}
    for retries in (2, 1):
        with pretending(lambda i, body: (200, scores(body)) if i == 3 else fails[how]) as url:
            reward = remote(url, retries=retries, in_flight=1)
            if retries == 2:
                reward(IMAGES, None)
                assert reward.retried == 2
            else:
                assert "after 2 tries" in failure(reward)


def test_back_off_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    with pretending(lambda i, body: (503, b"")) as url:
        failure(remote(url, retries=3, backoff=0.5))
    close(waited, [0.5, 1.0, 2.0], constant=[0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"scores": [1, 2]}', "the answer has 2 scores for 10 samples"),
        (b'{"scores": 3}', "the answer must be {scores: a list of numbers}"),
        (json.dumps({"scores": ["a"] * 10}).encode(), "the answer must be {scores: a list of numbers}"),
        (json.dumps({"scores": [float("nan")] * 10}).encode(), "10 of 10 values are NaN or infinite"),
        (b"<html>hello</html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (pickle.dumps([1.0] * 10), "not JSON"),
    ],
)
def test_a_wrong_answer(answer: bytes, said: str) -> None:
    with pretending(lambda i, body: (200, answer)) as url:
        assert said in failure(remote(url))


def test_a_refusal_says_the_servers_reason_and_is_not_asked_again() -> None:
    asked: list[int] = []

    def refuse(i: int, body: bytes) -> tuple[int, bytes]:
        asked.append(i)
        return 422, b'{"error": "the scorer\\nis out of memory"}'

    with pretending(refuse) as url:
        assert "the scorer is out of memory (HTTP 422)" in failure(remote(url))
    assert asked == [1]
    with serving(ink.build(ink.Config())) as server:
        assert "tested: raised ValueError: reward ink: images must have values in [0, 1]" in failure(
            remote(server.url), 2 * IMAGES
        )


def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ink.build(ink.Config()), token="right-token") as server:
        monkeypatch.delenv("SCOREACTION_TOKEN", raising=False)
        assert failure(remote(server.url)).endswith("not authorised (HTTP 401); set SCOREACTION_TOKEN to the server's token")
        monkeypatch.setenv("SCOREACTION_TOKEN", "right-toke")
        assert failure(remote(server.url)).endswith("the token in SCOREACTION_TOKEN is not the server's")
        monkeypatch.setenv("SCOREACTION_TOKEN", "right-token")
        assert remote(server.url)(IMAGES, None).shape == (10,)
        monkeypatch.setenv("SCOREACTION_TOKEN", "right-token\r\nX: y")
        with pytest.raises(ValueError, match="token_variable"):
            remote(server.url)


def test_too_much_at_once() -> None:
    """Twin: smaller parts pass."""
    with serving(ink.build(ink.Config()), max_images=4) as server:
        assert "10 samples at once are too many, 4 at most" in failure(remote(server.url))
        assert remote(server.url, batch=4)(IMAGES, None).shape == (10,)
    large = torch.rand(8, 3, 192, 192)
    with serving(ink.build(ink.Config()), max_bytes=2**20) as server:
        assert "bytes are too many, 1048576 at most; ask for fewer samples at once (HTTP 413)" in failure(
            remote(server.url), large
        )
        assert remote(server.url, batch=1)(large, None).shape == (8,)


# What the server is asked


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
        assert post(server, question(pickle.dumps(Bomb()))) == (400, "samples are not npy")
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
        assert "of one size" in post(server, png((4, 4), (5, 4)))[1]
        assert "gray or RGB" in post(server, png((4, 4), mode="RGBA"))[1]


def test_addresses_health_and_lengths() -> None:
    with serving(ink.build(ink.Config()), token="t") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {
            "status": "ok", "reward": "tested", "max_images": 64, "max_bytes": 2**20
        }  # fmt: skip
        connection.close()
        right = {"Authorization": "Bearer t"}
        assert post(server, question(GOOD), headers=right) == (200, "")
        assert post(server, question(GOOD), path="/../score", headers=right)[0] == 404
        assert post(server, question(GOOD), headers={"Authorization": "Bearer ü"})[0] == 401
        assert post(server, question(GOOD), headers={**right, "Content-Length": "-5"})[0] == 411


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


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "127.0.0.1:8765", "http://", "http://a:99999", "http://user:pw@a", "http://a?b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    remote("http://127.0.0.1:1/under/a/path")
    with pytest.raises(ValueError, match="url: must"):
        remote(url)


# As a user has it


@pytest.mark.slow
def test_a_run_whose_server_goes_away_saves_its_state_and_goes_on(tmp_path: Path) -> None:
    """Truth: the run that was never cut off, line for line."""
    sizes = ["train.iterations=4", "train.batch=8", "evaluation.n=8", "evaluation.steps=2", "sampler.steps=3"]
    local = build_reward("linear", ["direction=[1, 0.5]"])
    dies: dict[str, int | None] = {"after": 2}

    def serve(i: int, body: bytes) -> tuple[int, bytes]:
        if dies["after"] is not None and i > dies["after"]:
            return 500, b'{"error": "the machine is gone"}'
        return 200, _wire.answer(local(*_wire.asked(body, most=100)))

    def trained(folder: Path, *, resume: bool = False) -> list[dict[str, Any]]:
        with pretending(serve) as url:
            recipe = load_recipe("mixture", ["algorithm.name=ddpo", *sizes, f"reward={{name: http, url: '{url}', retries: 0}}"])
            _move(folder, url)
            run(recipe, folder, resume=resume)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    with pytest.raises(Failed, match=r"the machine is gone \(HTTP 500\); the state after iteration 2 is saved"):
        trained(tmp_path / "cut")
    dies["after"] = None
    went_on, whole = trained(tmp_path / "cut", resume=True), trained(tmp_path / "whole")
    for metrics in (*went_on, *whole):
        del metrics["seconds"]
    assert went_on == whole
    assert went_on[2] != whole[3]


def test_a_reward_over_http_is_held_out_and_measured_like_any_other() -> None:
    """Truth: the same reward in process; measuring in parts, drawn while the ones before are scored, changes nothing."""
    from scoreaction.evaluation import measure

    model, local = sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), build_reward("linear", ["direction=[1, 0.5]"])
    with serving(local) as server:
        far = remote(server.url, batch=7)

        def measured(judge: Any, chunk: int, seed: int = 0) -> list[float]:
            held_out = {"same": CountedReward(judge)}
            sampler = sa.Sampler(steps=3)
            found, _ = measure(model, sampler, CountedReward(judge), held_out, n=20, prompts=None, seed=seed, chunk=chunk)
            return [found[key] for key in ("reward", "reward_se", "held_out.same", "held_out.same_se")]

        truth = measured(local, 6)
        close(measured(far, 6), truth, atol=1e-5, other_samples=measured(far, 6, seed=1))
        close(measured(far, 20), measured(local, 20), atol=1e-5, other_samples=measured(far, 6, seed=1))


def _move(folder: Path, url: str) -> None:
    """The server has another port now: a recipe that is resumed is otherwise unchanged."""
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        recipe.write_text(re.sub(r"http://127.0.0.1:\d+", url, recipe.read_text()))


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
    assert (process.returncode, rest, errors) == (0, "stopped\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ink", "--host", "0.0.0.0"], "--host: 0.0.0.0 is reachable from other machines"),
        (["inc"], "reward.name: unknown reward 'inc'; did you mean ink?"),
        (["ink", "unt=1"], "reward.unt: unknown key; did you mean unit?"),
        (["ink", "unit=0"], "reward ink: unit must not be 0"),
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
        "def build(config): return lambda samples, conditions: config.factor * samples[:, 1]\n"
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
