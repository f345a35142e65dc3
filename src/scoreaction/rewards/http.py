"""A reward behind HTTP: a server answers, started with `scoreaction serve-reward` or your own, over HTTP."""

from __future__ import annotations

import http.client
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import SplitResult, urlsplit

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.catalog import TOKEN_VARIABLE
from scoreaction.errors import one_line
from scoreaction.rewards import RewardError
from scoreaction.rewards._wire import LARGEST_QUESTION, Format, WireError, question, read_answer, read_report, sendable
from scoreaction.settings import Settings
from scoreaction.types import Prompts

BUSY = (429, 502, 503, 504)
"""HTTP statuses after which a query is repeated."""
LONGEST_ANSWER = 2**24
REST = 300.0
"""Seconds for which a server that does not answer is left out while others do."""
CHANCE = random.SystemRandom()
PROBE = False
"""A server's answers may cost money or time."""


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c)` is what the server at `url` answers, or one of several; a black box. docs/rewards.md has the protocol.

    Samples go in parts of `batch`, or smaller ones if the server takes less, `in_flight` of them at a time, while later ones
    are still drawn. A server that is down or slow is asked `retries` times more, after about `backoff`, 2 `backoff`, 4
    `backoff` ... seconds; one that is busy, as long as it scores others. The token is read from an environment variable, so
    that no recipe holds it; the name of the variable begins with SCOREACTION_, so that no recipe can ask for another secret.
    """

    name: Literal["http"] = "http"
    url: str | Annotated[list[str], Field(min_length=1)] = Field(
        "http://127.0.0.1:8765", description="of the server, or of several; https where it is not this machine"
    )
    batch: int = Field(16, ge=1, description="samples of one question")
    in_flight: int = Field(4, ge=1, le=64, description="questions at a time, to each server")
    timeout: float = Field(60.0, gt=0, description="seconds to wait for an answer")
    retries: int = Field(3, ge=0, description="how often a question is asked again")
    backoff: float = Field(0.5, ge=0, description="seconds before the first time")
    format: Format = Field("npy", description="npy: exact float32; png: pictures in 8 bits, a few times smaller")
    token_variable: str = Field(
        TOKEN_VARIABLE, pattern=r"^SCOREACTION_[A-Z0-9_]+$", description="environment variable with the token: SCOREACTION_..."
    )


class Exchange(NamedTuple):
    """Questions and answers of one kind: the path, the body of a question, and what its answer holds, one a sample.

    kind: what it is that they serve; question: of samples and prompts, with `form`; read: of an answer's bytes and the prompts,
    or the samples without any.
    """

    kind: str
    path: str
    question: Callable[..., bytes]
    read: Callable[[bytes, Any], list[Any]]


SCORES = Exchange("reward", "/score", question, lambda data, rows: read_answer(data, len(rows)))


class NoAnswer(Exception):
    """The server could not be reached, or did not answer in time: worth asking again."""


class Busy(NoAnswer):
    """The server asks to come again."""


@dataclass(eq=False)
class Server:
    """A server with its open questions, its last report, and when that last showed that it scores."""

    url: str
    address: SplitResult
    questions: int = 0
    report: dict[str, int] | None = None
    progress: float = -math.inf
    out_until: float = 0.0


@dataclass(eq=False)
class Http:
    """The scores of servers, or what else an exchange asks; `retried` counts the questions that were asked again."""

    config: Config
    servers: list[Server]
    token: str | None
    exchange: Exchange = SCORES
    differentiable: bool = False
    retried: int = 0
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def rows(self) -> int:
        """Samples of one question."""
        return self.config.batch

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        return self.begin(samples, prompts)()

    def begin(self, samples: Tensor, prompts: Prompts) -> Callable[[], Tensor]:
        """Queries in the background; calling the result waits for the answers. RewardError where there are none."""
        answers = self.begin_answers(samples, prompts)
        return lambda: torch.tensor(answers(), dtype=torch.float32, device=samples.device)

    def answers(self, samples: Tensor, prompts: Prompts) -> list[Any]:
        """Queries, and waits for what is answered, one a sample. RewardError where nothing is."""
        return self.begin_answers(samples, prompts)()

    def begin_answers(self, samples: Tensor, prompts: Prompts) -> Callable[[], list[Any]]:
        """As `begin`, with what answers hold, one a sample."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.config.in_flight * len(self.servers), thread_name_prefix="reward")
        step, stop = self.config.batch, threading.Event()
        futures: list[Future[list[Any]]] = [
            self._pool.submit(self._query, part, prompts and prompts[i * step : (i + 1) * step], stop)
            for i, part in enumerate(samples.detach().cpu().split(step))
        ]

        def answers() -> list[Any]:
            try:
                return [answer for future in futures for answer in future.result()]
            finally:
                stop.set()
                for future in futures:
                    future.cancel()

        return answers

    def _query(self, samples: Tensor, prompts: Prompts, stop: threading.Event) -> list[Any]:
        """Answers about samples by the server with the fewest open questions, in halves where it takes fewer at once."""
        body, failures, form, half = b"", 0, self.config.format, len(samples) // 2
        least = samples.numel() * 16 // 3 if form == "npy" else 0
        while True:
            with self._lock:
                now = time.monotonic()
                server = min(self.servers, key=lambda s: (s.out_until > now, s.questions, CHANCE.random()))
                server.questions += 1
            try:
                report = self._look(server) if server.report is None else server.report
                images, size = (report.get(key) or math.inf for key in ("max_images", "max_bytes"))
                if half and (len(samples) > images or least > size or samples.numel() > LARGEST_QUESTION):
                    break
                body = body or self.exchange.question(samples, prompts, form=form)
                if len(body) > size:
                    break
                return self._ask(server, body, samples if prompts is None else prompts)
            except NoAnswer as error:
                failures += self._counts(server, error)
                if failures > self.config.retries:
                    times = f" after {failures} tries" * (failures > 1)
                    hint = "is it running, and is url right?"
                    if isinstance(error, Busy):
                        hint = f"is its {self.exchange.kind} stuck?"
                    elif isinstance(error.__cause__, TimeoutError):
                        hint = "is it running? If it is slow, raise timeout, or lower batch"
                    raise RewardError(f"{server.url}: {error}{times}; {hint}") from error
            finally:
                with self._lock:
                    server.questions -= 1
            if stop.wait(self.config.backoff * 2 ** max(failures - 1, 0) * CHANCE.uniform(0.5, 1.5)):
                raise CancelledError
            self.retried += 1
        if not half:
            sizes = f"one sample is {len(body):,} bytes, {server.url} takes {size:,} at most"
            raise RewardError(f"format: as {form} {sizes}; png is smaller, or raise its --max-megabytes")
        halves = (slice(half), slice(half, None))
        return [answer for i in halves for answer in self._query(samples[i], prompts and prompts[i], stop)]

    def _look(self, server: Server) -> dict[str, int]:
        """The whole numbers of a server's report of its health: its limits, and how many samples it has scored."""
        values = read_report(self._send(server, "GET", "/health")[1])
        report = {key: value for key, value in values.items() if type(value) is int}
        if report.get("scored") != (server.report or {}).get("scored"):
            server.progress = time.monotonic()
        server.report = report
        return report

    def _counts(self, server: Server, error: NoAnswer) -> bool:
        """False for a server that is busy with others, or is left out while others live: then asking again is free."""
        busy, now = isinstance(error, Busy), time.monotonic()
        if not busy and len(self.servers) == 1:
            return True
        with suppress(NoAnswer):
            self._look(server)
            return not (busy and now - server.progress < self.config.timeout)
        with self._lock:
            new, server.out_until, server.report = server.out_until <= now, now + REST, None
            others, kind = any(other.out_until <= now for other in self.servers), self.exchange.kind
        if new and others:
            logging.getLogger(__name__).warning("%s http: %s: %s; left out for %g seconds", kind, server.url, error, REST)
        return not others

    def _ask(self, server: Server, body: bytes, rows: Any) -> list[Any]:
        status, data = self._send(server, "POST", self.exchange.path, body)
        server.out_until = 0.0
        if status in (401, 403):
            variable = self.config.token_variable
            why = f"the token in {variable} is not the server's" if self.token else f"set {variable} to the server's token"
            raise RewardError(f"{server.url}: not authorised (HTTP {status}); {why}")
        if status != 200:
            why = one_line(read_report(data).get("error") or "refused", most=300)
            raise RewardError(f"{server.url}: {why} (HTTP {status})")
        try:
            return self.exchange.read(data, rows)
        except WireError as error:
            raise RewardError(f"{server.url}: {error}") from error

    def _send(self, server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """The status and body of an answer; a server may let it wait for a third of `timeout`, and score for another.

        All of it has `timeout` seconds: one that sends a letter now and then is cut off.
        """
        address, timeout = server.address, self.config.timeout
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=timeout)
        headers = {"Content-Type": "application/json", "Prefer": f"wait={int(timeout / 3)}"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        late = threading.Event()
        lines: list[socket.socket] = []

        def cut() -> None:
            late.set()
            for line in lines:  # none while it connects, which has a timeout of its own
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

        deadline = threading.Timer(timeout, cut)
        deadline.daemon = True
        deadline.start()
        try:
            connection.connect()
            lines.append(connection.sock)  # kept here: the connection forgets it where an answer has no length
            with suppress(BrokenPipeError, ConnectionResetError):  # a server that refuses need not read all of a question
                connection.request(method, address.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            data = response.read(LONGEST_ANSWER)
            if response.length and len(data) < LONGEST_ANSWER:
                raise http.client.IncompleteRead(data, response.length)
            if late.is_set():
                raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise NoAnswer(f"no answer within {timeout:g} seconds") from error
            if isinstance(error, ValueError | AttributeError):
                raise NoAnswer("no answer (not HTTP)") from error
            raise NoAnswer(f"no answer ({_reason(error)})") from error
        finally:
            deadline.cancel()
            connection.close()
        if response.status in BUSY:
            raise Busy(f"the server is busy (HTTP {response.status})")
        return response.status, data


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return one_line(text.lower(), most=100)


def build(config: Config, exchange: Exchange = SCORES) -> Http:
    """The reward, or who asks servers something else; ValueError for an address that is none."""
    servers = []
    for url in [config.url] if isinstance(config.url, str) else config.url:
        try:
            address = urlsplit(url)
            fine = address.port != 0 and address.scheme in ("http", "https") and address.hostname
        except ValueError:
            fine = False
        if not fine or address.query or address.fragment:
            raise ValueError(f"url: must be like http://127.0.0.1:8765 (got {url!r})")
        if address.username is not None or address.password is not None:
            raise ValueError(f"url: must not hold a name or password; put the token into {config.token_variable}")
        servers.append(Server(url, address))
    token = os.environ.get(config.token_variable) or None
    if token is not None and not sendable(token):
        raise ValueError(f"token_variable: {config.token_variable} must hold letters, digits and signs without spaces")
    return Http(config, servers, token, exchange)
