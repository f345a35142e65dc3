"""Truth: counts of questions, a clock that only notes, and the one line that says what went wrong between client and server."""

from __future__ import annotations

import json
import pickle
import socket
import threading
import time
from typing import Any

import pytest
import torch
from servers import IMAGES, failure, pretending, remote, scores, serving
from twins import accepts, same

from scoreaction.errors import UserError
from scoreaction.recipes.build import build_reward
from scoreaction.rewards import CountedReward, RewardError, _wire, ink, legibility


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


class Recorder(threading.Event):
    """A clock that notes what is waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout or 0.0)
        return False


def test_back_off_doubles_and_clients_do_not_come_again_together() -> None:
    """Truth: 0.5, 1 and 2 seconds, each by at most half of it more or less, and no two clients alike."""

    def waits() -> list[float]:
        clock = Recorder()
        with pretending(lambda i, body: (503, b"")) as url, pytest.raises(RewardError, match="after 4 tries"):
            remote(url, retries=3, backoff=0.5)._query(IMAGES, None, clock)
        return clock.waited

    def check(clients: list[list[float]]) -> None:
        for waited in clients:
            assert [0.5 <= seconds / mean <= 1.5 for seconds, mean in zip(waited, (0.5, 1.0, 2.0), strict=True)] == [True] * 3
        assert clients[0] != clients[1]

    accepts(check, [waits(), waits()], constant=[[0.5] * 3, [0.6] * 3], together=[[0.5, 1.0, 2.0]] * 2)


@pytest.mark.parametrize("report", [b"[]", b"{", b'{"max_bytes": null}', b'{"max_bytes": "5 MB", "max_images": true}'])
def test_a_report_without_numbers_limits_nothing(report: bytes) -> None:
    """Twin: one with a number."""
    seen: list[int] = []

    def serve(i: int, body: bytes) -> tuple[int, bytes]:
        seen.append(len(_wire.read_question(body, most=99)[0]))
        return 200, scores(body)

    with pretending(serve, lambda: (200, report)) as url:
        remote(url)(IMAGES, None)
    with pretending(serve, lambda: (200, b'{"max_images": 5}')) as url:
        remote(url)(IMAGES, None)
    same(seen, [10, 5, 5], unread=[10, 10])


def test_one_sample_that_is_too_large_names_the_key() -> None:
    """Truth: its size in a question. Twin: as png it is small enough."""
    picture = torch.zeros(2, 3, 64, 64)
    size = len(_wire.question(picture[:1], None, form="npy"))
    with serving(ink.build(ink.Config()), max_bytes=size - 1) as server:
        why = f"reward: format: as npy one sample is {size:,} bytes, {server.url} takes {size - 1:,} at most; png is smaller"
        assert why in failure(remote(server.url), picture)
        assert remote(server.url, format="png")(picture, None).shape == (2,)


# Answers


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
    with serving(legibility.build(legibility.Config())) as server:
        why = "tested: raised ValueError: reward legibility: expected floating images (batch, 1,"
        assert why in failure(remote(server.url))


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


@pytest.mark.parametrize("url", [[], [3], ["http://127.0.0.1:1", "ftp://a"], 3, {"a": 1}])
def test_a_list_of_urls_is_checked_like_one(url: Any) -> None:
    """Twin: a list of two."""
    assert len(build_reward("http", ["url=[http://127.0.0.1:1/a, http://127.0.0.1:2]"]).servers) == 2  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^reward\.url: must "):
        build_reward("http", [f"url={json.dumps(url)}"])


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "127.0.0.1:8765", "http://", "http://a:99999", "http://user:pw@a", "http://a?b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    remote("http://127.0.0.1:1/under/a/path")
    with pytest.raises(ValueError, match="url: must"):
        remote(url)
