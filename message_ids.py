"""The IDs of messages: UUIDs of version 7, and of version 8 for those that stand for an idempotency key."""
from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Sequence

__all__ = ["NewIds", "all_ours", "id_of_key", "is_ours", "time_of"]

_SHAPE = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
_TO_SHAPE = str.maketrans("0123456789abcdef", "x" * 16, "x")

_VARIANTS = dict(zip("0123456789abcdef", 4 * "89ab", strict=True))  # RFC 9562, 4.1: the variant's bits are 10


class NewIds:
    """Makes UUIDs of version 7 (RFC 9562, 5.7): milliseconds since 1970, then 74 random bits. Thread-safe.

    Random digits are drawn for many at a time, and the digits of a millisecond are used as long as it lasts (measured:
    0.9 in place of 2.3 microseconds an ID, of 28 that a POST takes the loop).
    """

    def __init__(self) -> None:
        self._tails: list[str] = []  # random parts not used yet
        self._head = (0, "")  # the last millisecond and its digits

    def __call__(self) -> str:
        """A new ID."""
        try:
            tail = self._tails.pop()
        except IndexError:
            tails = self._random_tails()
            tail = tails.pop()
            self._tails += tails
        milliseconds, head = self._head
        now = time.time_ns() // 1_000_000
        if now != milliseconds:
            head = f"{now >> 16:08x}-{now & 0xFFFF:04x}-"
            self._head = (now, head)
        return head + tail

    @staticmethod
    def _random_tails() -> list[str]:
        digits = os.urandom(19 * 256 // 2).hex()
        parts = [digits[start : start + 19] for start in range(0, len(digits), 19)]
        return [f"7{part[:3]}-{_VARIANTS[part[3]]}{part[4:7]}-{part[7:]}" for part in parts]


def id_of_key(key: str) -> str:
    """The UUID of version 8 (RFC 9562, 5.8) that stands for an idempotency key."""
    digits = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-{_VARIANTS[digits[16]]}{digits[17:20]}-{digits[20:32]}"


def all_ours(ids: Sequence[str]) -> bool:
    """Whether these are UUIDs, as IDs are made here, and so may be quoted: anything else may be a phone number.

    A translation of all of them takes a tenth of the time of a regular expression for each.
    """
    return "\n".join(ids).translate(_TO_SHAPE) == "\n".join([_SHAPE] * len(ids))


def is_ours(message_id: object) -> bool:
    """`all_ours` for one that may be of any type."""
    return isinstance(message_id, str) and all_ours([message_id])


def time_of(message_id: str) -> float | None:
    """When the message was accepted, in seconds since 1970; None for an ID that does not tell."""
    return _seconds(message_id[:13]) if len(message_id) == 36 and message_id[14] == "7" else None


@functools.lru_cache(256)  # messages of a batch came within few milliseconds
def _seconds(digits: str) -> float | None:
    try:
        return int(digits.replace("-", ""), 16) / 1000
    except ValueError:
        return None
