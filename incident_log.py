"""What the log may say: errors without their text, IDs that are ours, one line for a thousand of what repeats."""
from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from message_ids import all_ours, is_ours

__all__ = ["Incident", "Incidents", "counted", "describe", "location", "named"]

IDS_IN_A_LINE = 100  # a line with more is cut by what collects logs (Docker: 16 KiB)


def describe(error: BaseException) -> str:
    """An error's type, its number if it has one (errno, HTTP status), and the type of its cause, or of its `reason`,
    which is how `urllib.error.URLError` has it.

    Never its text: a provider's error may quote a phone number or a message, in any spelling.
    """
    candidates: list[object] = []
    cause: object = error.__cause__
    with contextlib.suppress(Exception):  # attributes of somebody else's class may be code that fails
        candidates += error.args[:1]
        candidates += [getattr(error, name, None) for name in ("errno", "code", "status")]
        cause = cause or getattr(error, "reason", None)
    number = next((each for each in candidates if type(each) is int and 0 < each < 1_000), None)
    described = type(error).__name__ if number is None else f"{type(error).__name__} {number}"
    return f"{described} from {type(cause).__name__}" if isinstance(cause, BaseException) else described


def location(error: BaseException) -> str:
    """An unexpected error's type and place; its text could hold a phone number."""
    name = type(error).__name__
    places = traceback.extract_tb(error.__traceback__)[-1:]  # none if it was never raised
    return " ".join([name, *(f"at {os.path.basename(at.filename)}:{at.lineno}" for at in places)])


def counted(number: float, noun: str) -> str:
    """The number with the noun, which gets its plural."""
    return f"{number:.0f} {noun}" if number == 1 else f"{number:.0f} {noun}s"


def named(ids: Sequence[object]) -> str:
    """The first of the IDs. What is not an ID of ours is not quoted: it could be a phone number."""
    shown = [each for each in ids[:IDS_IN_A_LINE] if isinstance(each, str)]
    shown = shown if all_ours(shown) else list(filter(is_ours, shown))
    more = len(ids) - len(shown)
    return " ".join([*shown, f"(and {more} more)"] if shown and more else shown or [counted(more, "other ID")])


class Incident:
    """Logs an error that repeats when it begins, once a minute with its count, and when it ends. Thread-safe."""

    PAUSE = 60.0  # seconds between two lines about the same error

    def __init__(
        self, logger: logging.Logger, what: str, *, level: int = logging.ERROR,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._what, self._level, self._clock = logger, what, level, clock
        self._lock = threading.Lock()  # guards the following
        self._count = 0  # of errors since it began; 0 when all is well
        self._began = self._logged = 0.0

    def failed(self, error: object, trace: BaseException | None = None) -> None:
        """Counts an error, and logs it when it is time, if it is one of ours with its traceback."""
        with self._lock:
            now = self._clock()
            self._count += 1
            count = self._count
            if count == 1:
                self._began = now
            elif now - self._logged < self.PAUSE:
                return
            self._logged, began = now, self._began
        times = f" ({count} times in {now - began:.0f} s)" if count > 1 else ""
        self._log.log(self._level, "%s: %s%s", self._what, error, times, exc_info=trace)

    def ended(self) -> None:
        """Logs that all is well again, if it was not."""
        if not self._count:  # the common case costs no lock
            return
        with self._lock:
            count, self._count = self._count, 0
            seconds = self._clock() - self._began
        if count:
            self._log.warning("%s: over after %.1f s and %s", self._what, seconds, counted(count, "error"))


class Incidents:
    """Errors of any kind: those that are raised at one place are one incident, which never ends. Thread-safe."""

    def __init__(self, logger: logging.Logger, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._make = functools.partial(Incident, logger, what, clock=clock)
        self._lock = threading.Lock()
        self._by_place: dict[str, Incident] = {}  # as many as there are places in the code

    def failed(self, said: object, error: BaseException) -> None:
        """Counts an error, and logs it with its traceback when it is time."""
        place = location(error)
        with self._lock:
            incident = self._by_place.setdefault(place, self._make())
        incident.failed(said, error)
