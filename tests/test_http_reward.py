"""Rewards over HTTP: what comes back is what the reward says in process, and whatever goes wrong is one clear line."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import IMAGES, pretending, remote, serving
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.commands import serve_reward
from scoreaction.commands.train import run
from scoreaction.errors import Failed, UserError
from scoreaction.recipes.build import build_reward
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import CountedReward, Reward, RewardError, _wire, ink, legibility
from scoreaction.rewards import http as client
from scoreaction.types import Prompt


def failure(reward: client.Http, samples: torch.Tensor = IMAGES) -> str:
    """The one line that a run would stop with."""
    with pytest.raises(RewardError) as caught:
        CountedReward(reward)(samples, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scores(body: bytes) -> bytes:
    return _wire.answer(torch.zeros(len(_wire.read_question(body, most=1000)[0])))


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


@pytest.mark.slow
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
        rollout, _ = tuner._collect()
        return list(events), rollout

    with serving(score) as server:
        background = remote(server.url, batch=2)
        afterwards, _ = collected(lambda samples, prompts: background(samples, None))
        meanwhile, rollout = collected(background)
    x0 = rollout.x0
    close(rollout.rewards, x0.sum(1), atol=1e-5, in_another_order=x0.flip(0).sum(1))
    assert rollout.x.shape == (4, 8, 2)
    assert x0.unique(dim=0).shape == (8, 2), "each piece has noise of its own"

    def check(found: list[str]) -> None:
        last = max(i for i, event in enumerate(found) if event == "predicted")
        assert found[:last].count("asked") == 3

    accepts(check, meanwhile, afterwards=afterwards)


def test_every_row_is_counted_once() -> None:
    with serving(ink.build(ink.Config())) as server:
        counted = CountedReward(remote(server.url, batch=3))
        counted.begin_decoded(IMAGES, lambda x: x, None)()
    close(counted.queries, 10, atol=0, questions=4, padded=12, twice=20)


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


# Many clients, several servers


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


def test_parts_are_cut_to_what_the_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: the scores in process, and the sizes that arrive. Twin: a server that does not tell what it takes."""
    pictures = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    prompts = ["a" * (i % 5) for i in range(16)]
    size = len(_wire.question(pictures, prompts, form="npy"))
    truth = pictures.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])

    def sizes(url: str, seen: list[int], **settings: Any) -> list[int]:
        seen.clear()
        close(remote(url, **settings)(pictures, prompts), truth, order=truth.flip(0))
        return sorted(seen)

    seen: list[int] = []

    def bright(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.append(len(samples))
        return samples.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])

    with serving(bright, max_bytes=size) as server:
        same(sizes(server.url, seen), [16], halves=[8, 8])
    with serving(bright, max_bytes=size - 1) as server:
        same(sizes(server.url, seen), [8, 8], whole=[16], single=[1] * 16)
        same(sizes(server.url, seen, batch=3), [1, 3, 3, 3, 3, 3], halves=[1] * 6 + [2] * 5)
        reward = remote(server.url)
        reward.servers[0].report = {}
        with pytest.raises(RewardError, match=r"bytes are too many, .* \(HTTP 413\)"):
            reward(pictures, prompts)
    with serving(bright, max_images=5) as server:
        same(sizes(server.url, seen), [4, 4, 4, 4], largest=[1, 5, 5, 5])
    monkeypatch.setattr(_wire, "LARGEST_QUESTION", pictures[:8].numel() - 1)
    with serving(ink.build(ink.Config())) as server:
        with pytest.raises(RewardError, match="16 pictures of 16 x 16 at once are too large"):
            remote(server.url, format="png")(pictures, None)
        monkeypatch.setattr(client, "LARGEST_QUESTION", pictures[:8].numel() - 1)
        assert remote(server.url, format="png")(pictures, None).shape == (16,)


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
        return 200, _wire.answer(local(*_wire.read_question(body, most=100)))

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
    from scoreaction.training.evaluation import measure

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
