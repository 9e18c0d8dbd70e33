"""A stand-in for the provider that remembers outside the process what it took: it survives a SIGKILL."""
from __future__ import annotations

import os
import queue
from collections.abc import Mapping, Sequence

from fastsmsing import Message, MessageStatus

__all__ = ["RecordingClient", "make_client"]


class RecordingClient:
    """Appends the IDs of every batch to a file, in two halves, each on disk before it goes on; then reports on it.

    So a crash finds batches that were not taken, taken in part, taken and not answered. Thread-safe: appending a
    few lines with one call is atomic (`O_APPEND`).
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._subscribers: list[queue.Queue[Mapping[str, object] | None]] = []

    def send(self, messages: Sequence[Message]) -> None:
        """Takes the batch; blocks for the disk."""
        middle = len(messages) // 2
        for half in (messages[:middle], messages[middle:]):
            os.write(self._file, "".join(f"{message.message_id}\n" for message in half).encode())
            os.fsync(self._file)
        for status in (MessageStatus.CONFIRMED, MessageStatus.DELIVERED):
            for updates in self._subscribers:
                updates.put({message.message_id: status for message in messages})

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        """Adds a subscriber."""
        self._subscribers.append(updates)

    def stop(self) -> None:
        """Ends the reports."""
        for updates in self._subscribers:
            updates.put(None)


def make_client() -> RecordingClient:
    """The client for the file that RECORDING_FILE names."""
    return RecordingClient(os.environ["RECORDING_FILE"])
