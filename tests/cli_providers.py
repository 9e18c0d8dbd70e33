"""Provider doubles that a `main.py` in a process of its own can name on its command line."""
from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

from fastsmsing import FastSmsingClient, FastSmsingError, Message, RejectedError
from helpers import Recorder


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


def demanding(token: str) -> FastSmsingClient:
    """A factory that cannot be called without arguments."""
    raise AssertionError(token)


nothing = None
