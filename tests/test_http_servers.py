"""Truth: sums, and counts of questions. Many clients wait for one server, and one client shares its questions among several."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from servers import IMAGES, failure, pretending, remote, scores, serving
from twins import accepts, close, same

from scoreaction.commands import serve_reward
from scoreaction.rewards import RewardError, _wire
from scoreaction.rewards import http as client


def crowd(reward: Callable[[], client.Http]) -> list[int]:
    """Which of 8 clients, each with 16 samples in 8 questions, 4 of them at a time, have the right scores."""
    samples = torch.rand(8, 16, 2, generator=torch.Generator().manual_seed(4))
    right: list[int] = []

    def ask(i: int) -> None:
        with suppress(RewardError):
            if torch.equal(reward()(samples[i], None), samples[i].sum(1)):
                right.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(right)


def slow_sum(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
    time.sleep(0.01)
    return samples.sum(1)


@pytest.mark.slow
def test_eight_clients_of_four_questions_each_wait_for_one_slow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: sums. Twins: a server that lets nobody wait, with clients to whom a busy server is a failed one."""

    def check(right: list[int]) -> None:
        assert right == list(range(8))

    with serving(slow_sum) as server:
        queue = crowd(lambda: remote(server.url, batch=2, retries=0))
        monkeypatch.setattr(serve_reward, "PATIENCE", 0)
        patient = crowd(lambda: remote(server.url, batch=2, retries=0))
        monkeypatch.setattr(client.Http, "_counts", lambda self, server, error: True)
        accepts(check, queue, neither=crowd(lambda: remote(server.url, batch=2)))
        check(patient)


@pytest.mark.slow
def test_a_busy_server_is_asked_again_as_long_as_it_scores() -> None:
    """Truth: who scores is alive; who scores nothing for longer than `timeout` is stuck, whatever it says of its health."""

    def outcome(scored: Iterator[int]) -> str:
        def report() -> tuple[int, bytes]:
            return 200, json.dumps({"status": "ok", "scored": next(scored)}).encode()

        with pretending(lambda i, body: (200, scores(body)) if i > 40 else (503, b""), report) as url:
            try:
                return str(remote(url, retries=1, timeout=0.15)(IMAGES, None).tolist())
            except RewardError as error:
                return str(error).removeprefix(f"{url}: ")

    same(outcome(itertools.count()), str([0.0] * 10), stuck=outcome(itertools.repeat(7)))
    assert outcome(itertools.repeat(7)) == "the server is busy (HTTP 503) after 2 tries; is its reward stuck?"


def test_who_gives_up_one_part_asks_no_more_for_the_others() -> None:
    """Truth: the count of questions stands still. Twin: parts that do not hear of one another."""

    def goes_on(*, deaf: bool) -> bool:
        asked, over = itertools.count(), [False]
        scored = itertools.count()

        def serve(i: int, body: bytes) -> tuple[int, bytes]:
            first = _wire.read_question(body, most=9)[0][0, 0] == 0
            next(asked)
            return (422, b"{}") if first and i > 2 else (200, scores(body)) if over[0] else (503, b"")

        with pretending(serve, lambda: (200, json.dumps({"scored": next(scored)}).encode())) as url:
            reward = remote(url, batch=1, in_flight=2)
            query = reward._query
            if deaf:
                reward._query = lambda samples, prompts, stop: query(samples, prompts, threading.Event())  # type: ignore[method-assign]
            assert "refused (HTTP 422)" in failure(reward, torch.tensor([[0.0], [1.0]]))
            time.sleep(0.1)
            before = next(asked)
            time.sleep(0.2)
            after, over[0] = next(asked), True
        return after > before + 1

    same(goes_on(deaf=False), False, deaf=goes_on(deaf=True))


@contextmanager
def two_servers(seen: dict[str, list[int]], down: set[str], most: list[int]) -> Iterator[list[str]]:
    """Two servers of sums, and how many questions were at each when one more came; those that are down cut every line.

    `most` holds the number of samples that they take at once.
    """

    def server(name: str) -> Any:
        at: list[int] = []

        def serve(i: int, body: bytes) -> tuple[int, bytes] | None:
            if name in down:
                return None
            at.append(i)
            seen[name].append(len(at))
            time.sleep(0.02)
            at.remove(i)
            samples = _wire.read_question(body, most=99)[0]
            return (200, _wire.answer(samples.sum(1))) if len(samples) <= most[0] else (413, b"{}")

        return pretending(serve, lambda: None if name in down else (200, json.dumps({"max_images": most[0]}).encode()))

    with server("a") as a, server("b") as b:
        yield [a, b]


def test_several_servers_share_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: sums; both work, and each has `in_flight` questions at most. Twin: the first is always taken."""
    x = torch.rand(40, 2, generator=torch.Generator().manual_seed(5))

    def shares() -> dict[str, list[int]]:
        seen: dict[str, list[int]] = {"a": [], "b": []}
        with two_servers(seen, set(), [9]) as urls:
            close(remote(urls, batch=2, in_flight=2)(x, None), x.sum(1), in_another_order=x.flip(0).sum(1))
        return seen

    def check(seen: dict[str, list[int]]) -> None:
        assert len(seen["a"]) + len(seen["b"]) == 20
        for most in seen.values():
            assert len(most) >= 5
            assert max(most) == 2

    right = shares()
    monkeypatch.setattr(client, "min", lambda servers, key: servers[0], raising=False)
    accepts(check, right, always_the_first=shares())


def test_a_server_that_is_down_is_left_out_with_a_note_and_taken_again(caplog: pytest.LogCaptureFixture) -> None:
    """Truth: sums, one note, and who answers: the server that is back only after its rest. Twin: before the rest is over."""
    x = torch.rand(16, 2, generator=torch.Generator().manual_seed(6))
    seen: dict[str, list[int]] = {"a": [], "b": []}
    down = {"a"}
    with two_servers(seen, down, [9]) as urls:
        reward = remote(urls, batch=2, in_flight=2, retries=0)

        def answers() -> int:
            close(reward(x, None), x.sum(1), in_another_order=x.flip(0).sum(1))
            return len(seen["a"])

        began = time.monotonic()
        assert answers() == 0
        (note,) = [record.getMessage() for record in caplog.records]
        assert note.startswith(f"reward http: {urls[0]}: no answer (remote end closed")
        assert note.endswith("left out for 300 seconds")
        rest = reward.servers[0].out_until
        assert began + 300 <= rest <= time.monotonic() + 300
        down.clear()
        before = answers()
        reward.servers[0].out_until = time.monotonic()  # as if the rest were over
        same(answers() > 0, True, before=before > 0)


def test_one_of_servers_that_were_all_down_is_back_and_takes_less() -> None:
    """Truth: sums; then nothing is asked twice. Twin: one that goes on with what it knew of the servers is refused."""
    x = torch.rand(16, 2, generator=torch.Generator().manual_seed(6))
    down, most = set[str](), [9]
    with two_servers({"a": [], "b": []}, down, most) as urls:
        reward, unaware = (remote(urls, batch=2, in_flight=2, retries=30, backoff=0.0) for _ in range(2))
        for each in (reward, unaware):
            each(x, None)
        down.update("ab")
        assert "no answer" in failure(reward, x)
        down.remove("b")
        most[0] = 1
        close(reward(x, None), x.sum(1), in_another_order=x.flip(0).sum(1))
        retried = reward.retried
        close(reward(x, None), x.sum(1), in_another_order=x.flip(0).sum(1))
        same(reward.retried, retried, still_asks_the_other=retried + 1)
        down.clear()
        assert "HTTP 413" in failure(unaware, x)


def test_a_server_says_that_it_is_busy_before_the_client_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: what the client hears where every place is taken. Twin: a server that does not heed what the client prefers."""

    def heard() -> str:
        with serving(slow_sum) as server:
            for _ in range(serve_reward.SEATS):
                server.service.seats.acquire()
            said = failure(remote(server.url, timeout=0.6, retries=0), torch.ones(1, 2))
            server.service.seats.release()
        return said.partition(f"{server.url}: ")[2]

    busy = heard()
    monkeypatch.setattr(serve_reward.re, "search", lambda pattern, text: None)
    same(busy, "the server is busy (HTTP 503); is its reward stuck?", deaf=heard())
