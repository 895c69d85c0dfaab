"""Where the time of a phase goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class TimeShares:
    """Shares of the wall time since the phase began, or was continued."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spent = {"data_wait": 0.0, "save_wait": 0.0}

    @contextmanager
    def spent_on(self, name: str) -> Iterator[None]:
        """Count a block's time as `data_wait` or `save_wait`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[name] += time.monotonic() - began

    def over(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield items, counting the time until each is there as `data_wait`."""
        while True:
            with self.spent_on("data_wait"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def shares(self) -> dict[str, float]:
        """Return the share of each, between 0 and 1."""
        passed = max(1e-9, time.monotonic() - self._began)
        return {name: round(seconds / passed, 5) for name, seconds in self._spent.items()}
