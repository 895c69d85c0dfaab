"""Judging answers with a chat model behind any OpenAI-compatible address, as the paper does.

The key comes from the environment variable `OPENAI_API_KEY` only; no file, log line or message
holds it. Verdicts are cached on disk as they come in, so a killed or incomplete judging goes on
where it stopped when the same call is made again.
"""

import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import openai

from mera_ds.errors import InputError
from mera_ds.evaluate.judge import JudgeItem, Judgement
from mera_ds.evaluate.judge_prompt import (
    PROMPT_VERSION,
    SYSTEM_PROMPT,
    fill_prompt,
    joined_answers,
    parse_reply,
)
from mera_ds.evaluate.pace import Pace, read_reply, seconds_until_retry
from mera_ds.files import failpoint, full_disk_is_an_error, sha256_json
from mera_ds.log import logger

DEFAULT_MODEL = "gpt-4o-mini-2024-07-18"
KEY_VARIABLE = "OPENAI_API_KEY"

MAX_REPLY_TOKENS = 64
MAX_ASKS = 3
"""A reply that is not understood is asked for again at most twice."""
MAX_FAILURES_IN_A_ROW = 20
"""So many answers in a row for which no reply had text: the rest is not asked."""
BYTES_PER_TOKEN = 3
"""For estimates; English text has four or more, so they are on the high side."""


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    input: float
    output: float


PRICES = {
    "gpt-4o-mini-2024-07-18": Prices(0.15, 0.60),
    "gpt-4o-2024-08-06": Prices(2.50, 10.00),
    "gpt-4.1-mini-2025-04-14": Prices(0.40, 1.60),
}


@dataclass(frozen=True)
class Estimate:
    """What judging would take, verdicts in the cache aside."""

    requests: int
    input_tokens: int
    output_tokens: int
    dollars: float


class OpenAIJudge:
    """A chat model as judge; see the module's docstring. Its name in results is the model's."""

    def __init__(
        self,
        cache: Path,
        model: str = DEFAULT_MODEL,
        base_url: str | None = None,
        prices: Prices | None = None,
        max_dollars: float = 5.0,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 5,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            cache: JSON-lines file of verdicts; made if missing, only ever appended to.
            prices: needed for a model that `PRICES` does not list (zeros for a local server).
            max_dollars: refuse to start above this estimate, and stop asking when it is spent.
            timeout: seconds for connecting, until a reply begins, and until it has ended.
            max_retries: repetitions of a request after 408, 409, 429, 5xx, a timeout or a broken
                connection (see `seconds_until_retry`).
            requests_per_minute: repetitions count; None: as fast as the server answers.
            tokens_per_minute: of prompts and longest replies, estimated; None: no limit.

        Raises:
            InputError: the key is not in the environment, or the model's prices are not known.
        """
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not re.fullmatch("[!-~]+", key):
            raise InputError(
                f"the judge {model} needs an API key in the environment variable {KEY_VARIABLE} "
                "(any word for a local server that wants none); or use an offline judge"
            )
        if prices is None and model not in PRICES:
            raise InputError(
                f"the prices of judge model {model!r} are not known, so its cost cannot be "
                f"limited; give them (evaluate.judge_prices), or use one of {', '.join(PRICES)}"
            )
        self.name = model
        self._key = key
        self._prices = prices or PRICES[model]
        self._concurrency = concurrency
        self._cache = _VerdictCache(cache)
        self._budget = _Budget(max_dollars)
        self._pace = Pace(requests_per_minute, tokens_per_minute)
        self._max_retries = max_retries
        self._timeout = timeout
        self._client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=0)
        self._failures = 0
        self._last_failure = ""

    def estimate(self, items: Sequence[JudgeItem]) -> Estimate:
        """Return what judging the items takes at most, if every first reply is understood."""
        unique = {self._cache_key(item): item for item in items}
        sizes = [_prompt_tokens(item) for key, item in unique.items() if key not in self._cache]
        output = MAX_REPLY_TOKENS * len(sizes)
        return Estimate(len(sizes), sum(sizes), output, self._cost(sum(sizes), output))

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """Judge all items, those with the same texts once; the order is that of the items.

        Raises:
            InputError: the estimate is above the limit, or the server refuses key or model.
        """
        estimate = self.estimate(items)
        if estimate.dollars > self._budget.left:
            raise InputError(
                f"judging {estimate.requests} answers with {self.name} may cost "
                f"${estimate.dollars:.4f} and ${self._budget.left:.4f} of the limit are left; "
                "raise the limit (evaluate.judge_max_dollars) or judge fewer answers"
            )
        logger.info(
            f"judging {len(items)} answers with {self.name}: {estimate.requests} requests, "
            f"at most ${estimate.dollars:.4f}; the other verdicts are known"
        )
        self._failures = 0
        self._pace.start()
        unique = {self._cache_key(item): item for item in items}
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            verdicts = dict(zip(unique, pool.map(self._judge, unique.values()), strict=True))
        except BaseException:
            self._pace.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [verdicts[self._cache_key(item)] for item in items]

    def _judge(self, item: JudgeItem) -> Judgement:
        key = self._cache_key(item)
        if cached := self._cache.get(key):
            return cached
        reply = ""
        for _ in range(MAX_ASKS):
            if self._failures >= MAX_FAILURES_IN_A_ROW:
                return Judgement("error", None, f"not asked after others: {self._last_failure}")
            most = self._cost(_prompt_tokens(item), MAX_REPLY_TOKENS)
            if not self._budget.reserve(most):
                return Judgement("error", None, "not asked: the cost limit is reached")
            spent = 0.0
            try:
                reply, spent = self._ask(item)
            except openai.APIError as error:
                return self._failed(error)
            except CancelledError:
                return Judgement("error", None, "not asked: judging has ended")
            finally:
                self._budget.settle(most, spent)
            if reply:
                self._failures = 0
            if judgement := parse_reply(reply):
                self._cache.add(key, judgement)
                return judgement
        if not reply:
            return self._failure("invalid", "no text in what the server sent")
        return Judgement("invalid", None, f"not understood: {reply[:200]!r}")

    def _ask(self, item: JudgeItem) -> tuple[str, float]:
        """Ask until there is a reply; return it ("" for one without text) and its dollars."""
        tokens = _prompt_tokens(item) + MAX_REPLY_TOKENS
        attempt = 0
        while True:
            if not self._pace.wait(tokens):
                raise CancelledError
            try:
                return self._send(item)
            except openai.APIError as error:
                seconds = seconds_until_retry(error, attempt)
                if seconds is None or attempt == self._max_retries:
                    raise
                if isinstance(error, openai.RateLimitError):
                    self._pace.hold(seconds)
                self._pace.rest(seconds)
                attempt += 1

    def _send(self, item: JudgeItem) -> tuple[str, float]:
        """Send one request; return the reply ("" for one without text) and its cost in dollars."""
        cost = self._cost(_prompt_tokens(item), MAX_REPLY_TOKENS)
        try:
            with self._client.chat.completions.with_streaming_response.create(
                model=self.name,
                messages=[
                    {"role": "system", "content": SYSTEM_PROMPT},
                    {"role": "user", "content": fill_prompt(item)},
                ],
                temperature=0,
                max_tokens=MAX_REPLY_TOKENS,
            ) as response:
                completion = json.loads(read_reply(response, self._timeout))
            reply = completion["choices"][0]["message"]["content"] or ""
            if not isinstance(reply, str):
                return "", cost
        except (ValueError, LookupError, TypeError, RecursionError):
            return "", cost  # not a chat completion
        return self._without_key(reply), self._spent(completion, cost)

    def _spent(self, completion: Any, estimate: float) -> float:
        """Return the dollars of a reply, as its server counts tokens, else the estimate."""
        try:
            usage = completion["usage"]
            dollars = self._cost(usage["prompt_tokens"], usage["completion_tokens"])
        except (LookupError, TypeError):
            return estimate
        return dollars if dollars >= 0 else estimate

    def _failed(self, error: openai.APIError) -> Judgement:
        cause = f" ({error.__cause__})" if isinstance(error, openai.APIConnectionError) else ""
        message = self._without_key(f"{error}{cause}")[:300]
        refused = openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError
        if isinstance(error, refused) or error.code == "insufficient_quota":
            self._pace.stop()
            raise InputError(
                f"the server refuses the judge model {self.name!r} or the key in {KEY_VARIABLE}: "
                f"{message}"
            ) from None
        return self._failure("error", f"{type(error).__name__}: {message}")

    def _failure(self, verdict: Literal["invalid", "error"], why: str) -> Judgement:
        self._failures += 1
        self._last_failure = why
        return Judgement(verdict, None, why)

    def _without_key(self, text: str) -> str:
        """Remove the key from what a server sent, should it repeat it."""
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text

    def _cost(self, input_tokens: int, output_tokens: int) -> float:
        return (self._prices.input * input_tokens + self._prices.output * output_tokens) / 1e6

    def _cache_key(self, item: JudgeItem) -> str:
        return sha256_json(
            [self.name, PROMPT_VERSION, item.question, joined_answers(item), item.prediction]
        )


def _prompt_tokens(item: JudgeItem) -> int:
    return len((SYSTEM_PROMPT + fill_prompt(item)).encode(errors="replace")) // BYTES_PER_TOKEN


class _Budget:
    """Money shared by threads: reserved before a request, settled after it."""

    def __init__(self, dollars: float) -> None:
        self.left = dollars
        self._lock = threading.Lock()

    def reserve(self, dollars: float) -> bool:
        with self._lock:
            if dollars > self.left:
                return False
            self.left -= dollars
            return True

    def settle(self, reserved: float, spent: float) -> None:
        with self._lock:
            self.left += reserved - spent


class _VerdictCache:
    """Verdicts by key, in memory and in a JSON-lines file that is only ever appended to.

    A line that a killed process left incomplete is passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._verdicts: dict[str, Judgement] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            self._append(b"\n")
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                verdict = Judgement(entry["verdict"], entry["score"], entry["detail"])
                if verdict.verdict not in ("yes", "no"):
                    raise ValueError
                self._verdicts[entry["key"]] = verdict
            except (ValueError, KeyError, TypeError):
                logger.warning("%s holds an unreadable line; that answer is judged again", path)

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def get(self, key: str) -> Judgement | None:
        return self._verdicts.get(key)

    def add(self, key: str, judgement: Judgement) -> None:
        line = json.dumps({"key": key, **asdict(judgement)}, ensure_ascii=False) + "\n"
        with self._lock:
            self._append(line.encode(errors="replace"))
            self._verdicts[key] = judgement
        failpoint("judge.cached")

    def _append(self, content: bytes) -> None:
        with full_disk_is_an_error(self._path), self._path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
