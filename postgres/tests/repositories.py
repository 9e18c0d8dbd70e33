"""Repositories on one database as if they were processes, and what fills them."""
from __future__ import annotations

import math
from collections.abc import Callable

from fastsmsing import Message
from message_ids import NewIds
from message_model import Batch, Entry
from postgres import PostgresRepository

__all__ = ["LEASE", "Clock", "Make", "claim", "entry", "fill"]

LEASE = 60.0  # seconds; no test waits so long, so what needs a lease to end moves the clocks
Make = Callable[..., PostgresRepository]


class Clock:
    """A machine's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def entry(
    message_id: str | None = None, text: str = "Hi", fingerprint: bytes | None = None, *, linger: float = 0.0,
    default: bool = False, max_age: float = math.inf,
) -> Entry:  # fmt: skip
    """A message that is due at once, if nothing else is said."""
    return Entry(Message("48123456789", text, message_id or NewIds()()), fingerprint, linger, default, max_age)


def fill(repository: PostgresRepository, count: int, *, linger: float = 0.0, max_age: float = math.inf) -> list[str]:
    """Saves so many messages; returns their IDs."""
    entries = [entry(linger=linger, max_age=max_age) for _ in range(count)]
    assert repository.save_all(entries) == [None] * count
    return [each.message.message_id for each in entries]


def claim(repository: PostgresRepository, size: int = 100) -> Batch:
    """What is due."""
    found = repository.claim(size, 0.0)
    assert found.batch is not None
    return found.batch
