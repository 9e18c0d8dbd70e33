"""When a batch leaves: the settings."""
from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

from message_model import ValidationError

__all__ = ["SmsProxyConfig"]


@dataclass(frozen=True, slots=True)
class SmsProxyConfig:
    """When batches leave and how hard we try; times in seconds. Wrong values raise `ValidationError`."""

    batch_size: int = 100  # the most messages in one request; so many leave at once; 1 or less turns batching off
    max_delay: float | None = 5.0  # longest linger of a message; None waits for a full batch for ever
    senders: int = 4  # requests to the provider at a time
    max_pending: int = 100_000  # accepted and not yet handed over
    max_attempts: int | None = 100  # tries per batch; less than 1 counts as 1; None: no limit
    backoff_base: float = 0.5  # before try n + 1: uniform in half to all of min(max, base * 2 ** (n - 1))
    backoff_max: float = 30.0
    max_age: float | None = None  # older messages are not sent any more; None sends them all

    def __post_init__(self) -> None:
        for spec in fields(self):
            self._check(spec.name, getattr(self, spec.name), whole="int" in spec.type, optional="None" in spec.type)
        object.__setattr__(self, "batch_size", max(1, self.batch_size))
        if self.max_attempts is not None:
            object.__setattr__(self, "max_attempts", max(1, self.max_attempts))
        if self.max_pending < self.batch_size:
            raise ValidationError("max_pending", "must not be less than batch_size")

    @staticmethod
    def _check(name: str, value: Any, whole: bool, optional: bool) -> None:
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValidationError(name, "must be a whole number" if whole else "must be a number")
        if name in ("senders", "max_pending") and value < 1:
            raise ValidationError(name, "must be at least 1")
        if not whole and not 0 <= value <= sys.float_info.max:
            raise ValidationError(name, "must be a finite number of seconds, not negative")

    def backoff(self, failures: int, fraction: float) -> float:
        """Seconds to wait after so many failures; `fraction` in 0..1 is the jitter."""
        return min(self.backoff_max, self.backoff_base * 2.0 ** min(failures - 1, 64)) * (0.5 + fraction / 2)
