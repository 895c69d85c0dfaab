"""How fast a server is asked, how long it may take, and how long to wait before asking again."""

import email.utils
import math
import random
import threading
import time
from collections.abc import Mapping
from datetime import UTC
from typing import Any

import openai
from openai import APIResponse

LONGEST_WAIT = 300.0
"""Seconds; a server that wants a longer wait gets no further request for this answer."""
LONGEST_REPLY = 1_000_000
"""Bytes; what is longer is no reply to a question of ours."""
_FIRST_WAIT, _LONGEST_BACKOFF = 0.5, 8.0


class Pace:
    """Spreads requests of several threads evenly, within so many requests and tokens a minute."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait(self, tokens: int) -> bool:
        """Return True when a request of so many tokens may be sent, False if none may any more."""
        with self._lock:
            start = max(time.monotonic(), self._free)
            spent = max(self._seconds_per_request, tokens * self._seconds_per_token)
            self._free = start + spent
        while (left := start - time.monotonic()) > 0 and not self._stopped.wait(left):
            pass
        return not self._stopped.is_set()

    def rest(self, seconds: float) -> None:
        """Let this thread alone wait; `stop` ends it."""
        self._stopped.wait(seconds)

    def start(self) -> None:
        """Let threads send again after `stop`."""
        self._stopped.clear()

    def stop(self) -> None:
        """Let no thread send anything more, and those that wait return at once."""
        self._stopped.set()

    def hold(self, seconds: float) -> None:
        """Let no thread send anything for some seconds; those that wait already are not stopped."""
        with self._lock:
            self._free = max(self._free, time.monotonic() + seconds)


def seconds_until_retry(error: openai.APIError, attempt: int) -> float | None:
    """Return how long to wait before the same request is sent again; None: not at all.

    As `Retry-After` says; else 0.5 s, twice as long each time up to 8 s, less a random part.

    Args:
        error: how the request failed.
        attempt: how often it was sent before; 0 for the first time.
    """
    backoff = min(_LONGEST_BACKOFF, _FIRST_WAIT * 2.0**attempt) * (1 - 0.25 * random.random())
    if isinstance(error, openai.APIConnectionError):  # timeouts are some of these
        return backoff
    if not isinstance(error, openai.APIStatusError) or error.code == "insufficient_quota":
        return None
    if error.status_code not in (408, 409, 429) and error.status_code < 500:
        return None
    asked = _retry_after(error.response.headers)
    if asked is None:
        return backoff
    return max(asked, 0.0) if asked <= LONGEST_WAIT else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait; it may say them, or name a date."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
        return None if math.isnan(seconds) else seconds
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(text)
        return date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None


def read_reply(response: APIResponse[Any], seconds: float) -> bytes:
    """Return the text of a reply that has begun; one that trickles ends after so many seconds.

    Raises:
        openai.APIConnectionError: the connection broke, or (`APITimeoutError`) the time is over.
        ValueError: the reply is longer than `LONGEST_REPLY`.
    """
    end = time.monotonic() + seconds
    content = bytearray()
    try:
        for piece in response.iter_bytes():
            content += piece
            if len(content) > LONGEST_REPLY or time.monotonic() > end:
                break
    except Exception as error:  # those of the HTTP library
        raise openai.APIConnectionError(request=response.http_request) from error
    if time.monotonic() > end:
        raise openai.APITimeoutError(response.http_request)
    if len(content) > LONGEST_REPLY:
        raise ValueError("the reply is too long")
    return bytes(content)
