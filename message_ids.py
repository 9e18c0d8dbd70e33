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
_TO_VARIANT = 64 * b"89ab"  # of a random byte
_TAIL = b"7xxx-vxxx-xxxxxxxxxxxx\n"  # what is behind the time: the version, the variant, and random digits
_RANDOM = [place for place, digit in enumerate(_TAIL) if digit == ord("x")]
_AT_ONCE = 256


class NewIds:
    """Makes UUIDs of version 7 (RFC 9562, 5.7): milliseconds since 1970, then 74 random bits. Thread-safe.

    Random digits are drawn for many at a time, and the digits of a millisecond are used as long as it lasts (measured:
    0.5 in place of 2.3 microseconds an ID, of 20 that a POST takes).
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
        """Many at a time, place by place: to cut each of them out of the digits would cost four times as much."""
        digits = os.urandom(_AT_ONCE * len(_RANDOM) // 2).hex().encode()
        tails = bytearray(_TAIL * _AT_ONCE)
        for number, place in enumerate(_RANDOM):
            tails[place :: len(_TAIL)] = digits[number * _AT_ONCE : (number + 1) * _AT_ONCE]
        tails[_TAIL.index(b"v") :: len(_TAIL)] = os.urandom(_AT_ONCE).translate(_TO_VARIANT)
        return tails.decode().split()


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
