"""What every peer does with a message: remember it, and hand batches of ten to a thread that delivers them."""
from __future__ import annotations

import queue
import threading
import uuid

BATCH_SIZE = 10

statuses: dict[str, str] = {}
_batches: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
_pending: list[str] = []
_lock = threading.Lock()  # guards _pending


def accept() -> str:
    """Takes a message; returns its new ID."""
    message_id = str(uuid.uuid4())
    statuses[message_id] = "ACCEPTED"
    with _lock:
        _pending.append(message_id)
        if len(_pending) == BATCH_SIZE:
            _batches.put(_pending.copy())
            _pending.clear()
    return message_id


def valid(number: object, content: object) -> bool:
    """Whether these are a phone number and a text."""
    is_number = isinstance(number, str) and number.isascii() and number.isdigit()
    return is_number and isinstance(content, str) and content != ""


def _deliver() -> None:
    while True:
        statuses.update(dict.fromkeys(_batches.get(), "DELIVERED"))


threading.Thread(target=_deliver, daemon=True).start()
