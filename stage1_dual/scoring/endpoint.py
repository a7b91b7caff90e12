"""An OpenAI-compatible endpoint of chat completions: concurrency, pace, retries, and a key that is written nowhere."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pipeline.contracts.errors import InputError, import_failure

# Waiting before a retry: half a second, doubled up to eight, with some of it at random so that many do not come back
# at once. These are the delays of OpenAI's own client (openai._constants).
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may well be answered."""
_REFUSED = frozenset({401, 403, 404, 405})
"""Statuses that every request would have: the key, the model or the address is wrong."""
_MOST_SHOWN = 200


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how.

    Attributes:
        base_url: to which ``/chat/completions`` is added.
        key_env: name of the environment variable that holds the key; None where none is sent.
        concurrency: requests at the same time.
        requests_per_minute: at most so many are begun; None for no limit.
        timeout: for a connection, and for each wait for data, seconds.
        retries: of a request that failed in a way that may pass.
    """

    base_url: str
    key_env: str | None = None
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 6


class RequestFailedError(Exception):
    """This request has no answer; others may have one. Its text is one sentence for the user, without the key."""


class EndpointClient:
    """Sends requests to one endpoint; may be used from several threads.

    A status or a fault that may pass (429, 5xx, a broken connection, a body that is not whole JSON) is tried again
    after a while, and not before the time that ``Retry-After`` names, which every thread then keeps.

    Args:
        endpoint: where and how.

    Raises:
        MissingExtraError: httpx is not installed.
        InputError: the environment variable of the key is not set.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import httpx
        except ImportError as error:
            raise import_failure(error, package="httpx", extra="sample", purpose="scoring at an endpoint") from error
        self._endpoint = endpoint
        self._key = read_key(endpoint.key_env)
        self._client = httpx.Client(
            timeout=endpoint.timeout,
            limits=httpx.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency),
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
        )
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._not_before = 0.0
        self._spacing = 0.0 if endpoint.requests_per_minute is None else 60.0 / endpoint.requests_per_minute

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer to a request of chat completions.

        Args:
            body: of the request, JSON-serialisable.

        Raises:
            RequestFailedError: the endpoint refuses this request, or the retries are used up.
            InputError: the endpoint would refuse every request, or cannot be reached.
        """
        import httpx

        url = self._endpoint.base_url.rstrip("/") + "/chat/completions"
        fault = ""
        for attempt in range(self._endpoint.retries + 1):
            self._wait_for_turn()
            wait = self._wait_after(attempt)
            try:
                response = self._client.post(url, json=dict(body))
                if response.status_code == httpx.codes.OK:
                    return _whole_answer(response.text)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.ProxyError) as error:
                fault = f"cannot be reached ({self.redact(str(error)) or type(error).__name__})"
                if attempt == self._endpoint.retries:
                    raise InputError(
                        f"the endpoint {self._endpoint.base_url} {fault}, after {attempt} retries"
                    ) from None
            except (httpx.HTTPError, ValueError) as error:
                fault = f"gave no whole answer ({self.redact(str(error)) or type(error).__name__})"
            else:
                fault = f"answered with status {response.status_code}: {self._said(response.text)}"
                if response.status_code in _REFUSED:
                    raise InputError(f"the endpoint {self._endpoint.base_url} {fault}") from None
                if response.status_code not in _TRANSIENT:
                    raise RequestFailedError(f"the endpoint {fault}")
                wait = max(wait, self._asked_to_wait(response.headers.get("retry-after")))
            if attempt < self._endpoint.retries:
                self._sleep(wait)
        raise RequestFailedError(f"the endpoint {fault}, after {self._endpoint.retries} retries")

    def stop(self) -> None:
        """Have every request that waits, for its turn or for a retry, give up."""
        self._stopped.set()

    def redact(self, text: str) -> str:
        """A text without the key, which a server may repeat."""
        return text if self._key is None else text.replace(self._key, "[key]")

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _said(self, body: str) -> str:
        """What an error's body says, short and without the key."""
        try:
            found = json.loads(body)["error"]
            text = str(found["message"] if isinstance(found, dict) else found)
        except (ValueError, KeyError, TypeError):
            text = body
        text = " ".join(self.redact(text).split())
        return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."

    def _wait_for_turn(self) -> None:
        """Sleep until this request may begin: requests keep their distance, and none goes before a pause ends."""
        with self._lock:
            turn = max(time.monotonic(), self._not_before)
            self._not_before = turn + self._spacing
        delay = turn - time.monotonic()
        if delay > 0:
            self._sleep(delay)

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise RequestFailedError("the request was given up, since another one showed that none can succeed")

    def _wait_after(self, attempt: int) -> float:
        # Spread, not security.
        return float(min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * (1 - 0.25 * random.random()))  # noqa: S311

    def _asked_to_wait(self, retry_after: str | None) -> float:
        seconds = _seconds(retry_after)
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
        return seconds


def read_key(key_env: str | None) -> str | None:
    """The key in the environment variable of this name; None where no variable is named.

    Raises:
        InputError: it is not set, or holds what no header can.
    """
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise InputError(f"`endpoint.key_env` names the environment variable {key_env}, which is not set")
    if not key.isascii() or not key.isprintable():
        raise InputError(f"the environment variable {key_env} holds characters that no key has")
    return key


def _whole_answer(text: str) -> dict[str, Any]:
    answer = json.loads(text)
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list) or not answer["choices"]:
        raise ValueError("a body without `choices`")
    return answer


def _seconds(retry_after: str | None) -> float:
    """Seconds that a ``Retry-After`` asks for: a number, or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
