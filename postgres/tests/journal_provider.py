"""A stand-in for the provider that writes down outside the process when each request began and ended."""
from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastsmsing import FastSmsingError, Message, MessageStatus

__all__ = ["JournalClient", "make_client"]


class JournalClient:
    """Appends two lines a request to a file that all instances share: one call appends one whole (`O_APPEND`).

    A request takes `latency` seconds; a share of `failures` fails at its end, as if the provider had not taken it.
    """

    def __init__(self, path: str, name: str, latency: float, failures: float) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._name, self._latency, self._failures = name, latency, failures
        self._subscribers: list[queue.Queue[Mapping[str, object] | None]] = []
        self._stopped = threading.Event()

    def send(self, messages: Sequence[Message]) -> None:
        """Takes the batch."""
        ids = [message.message_id for message in messages]
        request = f"{self._name} {threading.get_ident()} {time.monotonic_ns()}"
        failed = random.random() < self._failures
        self._write(event="begin", request=request, ids=ids)
        self._stopped.wait(self._latency)
        self._write(event="failed" if failed else "end", request=request, ids=ids)
        if failed:
            raise FastSmsingError("simulated failure")
        for status in (MessageStatus.CONFIRMED, MessageStatus.DELIVERED):
            for updates in self._subscribers:
                updates.put(dict.fromkeys(ids, status))

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        """Adds a subscriber."""
        self._subscribers.append(updates)

    def stop(self) -> None:
        """Ends the reports."""
        self._stopped.set()
        for updates in self._subscribers:
            updates.put(None)

    def _write(self, **record: Any) -> None:
        record.update(instance=self._name, thread=threading.get_ident(), time=time.monotonic())
        os.write(self._file, json.dumps(record).encode() + b"\n")


def make_client() -> JournalClient:
    """The client as the environment describes it."""
    return JournalClient(
        os.environ["JOURNAL_FILE"], os.environ["JOURNAL_NAME"],
        float(os.environ.get("JOURNAL_LATENCY", "0")), float(os.environ.get("JOURNAL_FAILURES", "0")),
    )  # fmt: skip
