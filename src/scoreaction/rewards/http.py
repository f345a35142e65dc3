"""A reward behind HTTP: a server answers, started with `scoreaction serve-reward` or your own, over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, urlsplit

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from scoreaction.catalog import TOKEN_VARIABLE
from scoreaction.rewards import RewardError
from scoreaction.rewards._wire import Format, WireError, question, read_answer, sendable
from scoreaction.types import Prompts

BUSY = (429, 502, 503, 504)
"""HTTP statuses after which a query is repeated."""
LONGEST_ANSWER = 2**24
PROBE = False
"""A server's answers may cost money or time."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """`r(x, c)` is what the server at `url` answers; a black box. docs/rewards.md has the protocol.

    Samples go in parts of `batch`, `in_flight` of them at a time, while later ones are still drawn. A server that is
    down, slow or busy is asked `retries` times more, after `backoff`, 2 `backoff`, 4 `backoff` ... seconds. The token is read
    from an environment variable, so that no recipe holds it.
    """

    name: Literal["http"] = "http"
    url: str = Field("http://127.0.0.1:8765", description="of the server; https where it is not this machine")
    batch: int = Field(16, ge=1, description="samples of one question")
    in_flight: int = Field(4, ge=1, le=64, description="questions at a time")
    timeout: float = Field(60.0, gt=0, description="seconds to wait for an answer")
    retries: int = Field(3, ge=0, description="how often a question is asked again")
    backoff: float = Field(0.5, ge=0, description="seconds before the first time")
    format: Format = Field("npy", description="npy: exact float32; png: pictures in 8 bits, a few times smaller")
    token_variable: str = Field(TOKEN_VARIABLE, description="environment variable with the token")


class NoAnswer(Exception):
    """The server could not be reached, or is busy: worth asking again."""


@dataclass(eq=False)
class Http:
    """A server's scores; `retried` counts the questions that were asked again."""

    config: Config
    address: SplitResult
    token: str | None
    differentiable: bool = False
    retried: int = 0
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """Samples of one question."""
        return self.config.batch

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        return self.begin(samples, prompts)()

    def begin(self, samples: Tensor, prompts: Prompts) -> Callable[[], Tensor]:
        """Queries in the background; calling the result waits for the answers. RewardError where there are none."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.config.in_flight, thread_name_prefix="reward")
        step = self.config.batch
        futures: list[Future[Tensor]] = [
            self._pool.submit(self._query, part, None if prompts is None else prompts[i * step : (i + 1) * step])
            for i, part in enumerate(samples.detach().cpu().split(step))
        ]

        def scores() -> Tensor:
            try:
                return torch.cat([future.result() for future in futures]).to(samples.device)
            finally:
                for future in futures:
                    future.cancel()

        return scores

    def _query(self, samples: Tensor, prompts: Prompts) -> Tensor:
        body = question(samples, prompts, form=self.config.format)
        for attempt in range(self.config.retries + 1):
            try:
                return self._query_once(body, len(samples))
            except NoAnswer as error:
                if attempt == self.config.retries:
                    times = f" after {attempt + 1} tries" if attempt else ""
                    raise RewardError(f"{self.config.url}: {error}{times}; is it running, and is url right?") from error
                time.sleep(self.config.backoff * 2**attempt)
                self.retried += 1
        raise AssertionError("unreachable")

    def _query_once(self, body: bytes, n: int) -> Tensor:
        kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.address.hostname or "", self.address.port, timeout=self.config.timeout)
        try:
            response = self._response(connection, body)
            data = response.read(LONGEST_ANSWER)
        except TimeoutError as error:
            raise NoAnswer(f"no answer within {self.config.timeout:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"no answer ({_reason(error)})") from error
        finally:
            connection.close()
        return self._read(response.status, data, n)

    def _response(self, connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        with suppress(BrokenPipeError, ConnectionResetError):  # a server that refuses a question need not read all of it
            connection.request("POST", f"{self.address.path.rstrip('/')}/score", body, headers)
        return connection.getresponse()

    def _read(self, status: int, data: bytes, n: int) -> Tensor:
        if status in BUSY:
            raise NoAnswer(f"the server is busy (HTTP {status})")
        if status in (401, 403):
            variable = self.config.token_variable
            why = f"the token in {variable} is not the server's" if self.token else f"set {variable} to the server's token"
            raise RewardError(f"{self.config.url}: not authorised (HTTP {status}); {why}")
        if status != 200:
            raise RewardError(f"{self.config.url}: {_error(data) or 'refused'} (HTTP {status})")
        try:
            return read_answer(data, n)
        except WireError as error:
            raise RewardError(f"{self.config.url}: {error}") from error


def _error(data: bytes) -> str:
    """The error line of an answer."""
    try:
        return " ".join(str(json.loads(data)["error"]).split())[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__).lower()


def build(config: Config) -> Http:
    """The reward; ValueError for an address that is none."""
    try:
        address = urlsplit(config.url)
        port_is_fine = address.port != 0
    except ValueError:
        port_is_fine = False
    if not port_is_fine or address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise ValueError(f"url: must be like http://127.0.0.1:8765 (got {config.url!r})")
    if address.username is not None or address.password is not None:
        raise ValueError(f"url: must not hold a name or password; put the token into {config.token_variable}")
    token = os.environ.get(config.token_variable) or None
    if token is not None and not sendable(token):
        raise ValueError(f"token_variable: {config.token_variable} must hold letters, digits and signs without spaces")
    return Http(config, address, token)
