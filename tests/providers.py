"""Provider doubles; the command in a process of its own can name them as its client, so nothing else is imported."""
from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from fastsmsing import FastSmsingClient, FastSmsingError, Message, RejectedError

HANG = 30.0  # seconds after which a test has hung; nothing is paced by it


class Recorder:
    """A provider double that takes every batch at once and remembers it."""

    def __init__(self) -> None:
        self.batches: list[list[Message]] = []
        self.subscribers: list[queue.Queue[Mapping[str, object] | None]] = []
        self.stopped = threading.Event()
        self._changed = threading.Condition()

    def send(self, messages: Sequence[Message]) -> None:
        with self._changed:
            self.batches.append(list(messages))
            self._changed.notify_all()

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        self.subscribers.append(updates)

    def stop(self) -> None:
        self.stopped.set()
        for updates in self.subscribers:
            updates.put(None)

    def report(self, reports: Mapping[str, object]) -> None:
        """Sends one delivery report to every subscriber."""
        for updates in self.subscribers:
            updates.put(reports)

    def wait_for(self, predicate: Callable[[list[list[Message]]], bool]) -> None:
        """Blocks until the batches so far satisfy the predicate."""
        with self._changed:
            assert self._changed.wait_for(lambda: predicate(self.batches), HANG), "the batches never came"

    @property
    def ids(self) -> list[str]:
        """The IDs of all messages taken, in order."""
        return [message.message_id for batch in self.batches for message in batch]


class Receiver(Recorder):
    """A provider double whose delivery reports are pushed; `receive` raises `error` if there is one, and may wait."""

    def __init__(self, error: BaseException | None = None, *, waits: bool = False) -> None:
        super().__init__()
        self.error = error
        self.received: list[tuple[str, Mapping[str, str], bytes]] = []
        self.entered, self.opened = threading.Semaphore(0), threading.Event()
        if not waits:
            self.opened.set()

    def receive(self, query: str, headers: Mapping[str, str], body: bytes) -> None:
        self.entered.release()
        if not self.opened.wait(HANG):
            raise TimeoutError("receive was never opened")
        if self.error is not None:
            raise self.error
        self.received.append((query, headers, body))


class Gate(Recorder):
    """A provider double that holds every request until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def send(self, messages: Sequence[Message]) -> None:
        self.entered.release()
        if not self.opened.wait(HANG):
            raise TimeoutError("the gate was never opened")
        super().send(messages)

    def wait_entered(self, requests: int = 1) -> None:
        """Blocks until so many more requests wait at the gate."""
        for _ in range(requests):
            assert self.entered.acquire(timeout=HANG), "no request came to the gate"


class Scripted(Recorder):
    """A provider double whose requests raise what the script says, one entry a request; None takes the batch.

    Once the script is over every batch is taken. `attempts` has every request, the failed ones, too.
    """

    def __init__(self, *script: BaseException | None) -> None:
        super().__init__()
        self.script = list(script)
        self.attempts: list[list[Message]] = []
        self._lock = threading.Lock()

    def send(self, messages: Sequence[Message]) -> None:
        with self._lock:
            self.attempts.append(list(messages))
            error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        super().send(messages)


class Gossip(Recorder):
    """A provider double whose errors tell every number and text of the batch; it takes one request in four."""

    def __init__(self) -> None:
        super().__init__()
        self._requests, self._lock = 0, threading.Lock()

    def send(self, messages: Sequence[Message]) -> None:
        with self._lock:
            self._requests += 1
            kind = (None, RejectedError, FastSmsingError, RuntimeError)[self._requests % 4]
        if kind is not None:
            said = "; ".join(f"{each.message} to {each.phone_number}\r\nforged" for each in messages)
            raise kind(said) from ValueError(said, said)
        super().send(messages)


class Late(Recorder):
    """Takes every batch, and reports all of it as delivered only when it is told to stop."""

    def stop(self) -> None:
        self.report(dict.fromkeys(self.ids, "DELIVERED"))
        super().stop()


class Hanging(Recorder):
    """Never answers; says so on standard error."""

    def send(self, messages: Sequence[Message]) -> None:
        print("the provider hangs", file=sys.stderr, flush=True)
        threading.Event().wait()


class Down(Recorder):
    """Fails every request, with an error that tells numbers and texts."""

    error: type[Exception] = FastSmsingError

    def send(self, messages: Sequence[Message]) -> None:
        raise self.error("; ".join(f"cannot send {each.message} to {each.phone_number}" for each in messages))


class Rejecting(Down):
    """Rejects every batch."""

    error = RejectedError


def interrupted() -> FastSmsingClient:
    """A factory during which somebody presses Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("nothing came of the signal")


def broken() -> FastSmsingClient:
    """A factory that cannot make its client."""
    raise KeyError("FASTSMSING_TOKEN")


def exiting() -> FastSmsingClient:
    """A factory that ends the process, as if all were well."""
    sys.exit()


class ExitingStop(Recorder):
    """A client whose `stop` ends the process."""

    def stop(self) -> None:
        sys.exit()


class ExitingSubscribe(Recorder):
    """A client whose `subscribe` ends the process."""

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        sys.exit()


def demanding(token: str) -> FastSmsingClient:
    """A factory that cannot be called without arguments."""
    raise AssertionError(token)


nothing = None
