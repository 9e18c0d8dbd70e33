"""Instances of the whole command on one database, the load on them, and what their provider saw."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import HANG, until

__all__ = ["Instance", "Load", "Request", "Service"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Instance:
    """One process of `main.py`."""

    def __init__(self, name: str, directory: Path, flags: Sequence[str], environ: Mapping[str, str]) -> None:
        self.name, self.log_path = name, directory / f"{name}.log"
        self._flags, self._environ = flags, {**environ, "JOURNAL_NAME": name}
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Starts the process."""
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "main.py"), *self._flags],
                cwd=HERE, env=dict(self._environ), stderr=log, stdout=log,
            )  # fmt: skip

    def await_ready(self) -> None:
        """Returns when it listens."""
        found = until(self._listening, f"the start of {self.name}")
        assert found is not None
        self.port = int(found[1])

    def _listening(self) -> re.Match[str] | None:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        return re.search(r"listening on \S+ port (\d+)", self.log)

    @property
    def log(self) -> str:
        """What it logged so far."""
        return self.log_path.read_text("utf-8")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once it ends."""
        assert self.process is not None
        return self.process.wait(HANG)

    def end(self) -> None:
        """Kills it, if it runs, stopped or not."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(HANG)

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """One request on a connection of its own; returns status and document."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), dict(headers or {}))
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def post(self, text: str = "Your parcel is here", key: str | None = None, **fields: float) -> tuple[int, Any]:
        """Sends one message in."""
        headers = {"Idempotency-Key": key} if key else {}
        return self.call("POST", "/sms", {"PhoneNumber": "48123456789", "Content": text, **fields}, headers)


@dataclass
class Request:
    """A request to the provider. `end` is None when it did not end."""

    instance: str
    thread: int
    begin: float  # seconds of the clock that all processes of the machine share
    ids: list[str]
    end: float | None = None
    taken: bool = False


class Service:
    """Some instances that share a database and a provider."""

    def __init__(
        self, directory: Path, url: str, count: int, *flags: str, latency: float = 0.0, failures: float = 0.0
    ) -> None:
        self.journal = directory / "journal"
        self.journal.touch()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SMSPROXY_")}
        environ.update(JOURNAL_FILE=str(self.journal), JOURNAL_LATENCY=f"{latency}", JOURNAL_FAILURES=f"{failures}",
                       PYTHONPATH=str(HERE))  # fmt: skip
        every = ("--port", "0", "--client", "journal_provider:make_client", "--db", url, *flags)
        self.instances = [Instance(f"instance{number}", directory, every, environ) for number in range(1, count + 1)]

    @contextlib.contextmanager
    def running(self) -> Iterator[list[Instance]]:
        """Starts all instances at once; kills what is left of them at the end."""
        try:
            for instance in self.instances:
                instance.launch()
            for instance in self.instances:
                instance.await_ready()
            yield self.instances
        finally:
            for instance in self.instances:
                instance.end()

    def requests(self) -> list[Request]:
        """The provider's requests so far, in order of their beginning."""
        found: dict[str, Request] = {}
        for line in self.journal.read_text().splitlines():
            record = json.loads(line)
            if record["event"] == "begin":
                found[record["request"]] = Request(record["instance"], record["thread"], record["time"], record["ids"])
            else:
                request = found[record["request"]]
                request.end, request.taken = record["time"], record["event"] == "end"
        return list(found.values())

    def taken(self) -> dict[str, list[Request]]:
        """The requests that began, and did not fail, with each message."""
        by_message: dict[str, list[Request]] = defaultdict(list)
        for request in self.requests():
            if request.taken or request.end is None:
                for message_id in request.ids:
                    by_message[message_id].append(request)
        return by_message

    def sent(self) -> set[str]:
        """The messages that the provider took."""
        return {each for request in self.requests() if request.taken for each in request.ids}


class Load:
    """Callers that send one message after the other to random instances, and remember the IDs of those accepted."""

    def __init__(self, instances: Sequence[Instance], callers: int = 6) -> None:
        self._instances = list(instances)
        self.accepted: list[str] = []
        self.refused: list[int] = []  # statuses other than 202
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,), daemon=True) for number in range(callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the load."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(HANG)

    def without(self, *gone: Instance) -> None:
        """From now on these are not called any more."""
        self._instances = [each for each in self._instances if each not in gone]

    def await_accepted(self, more: int) -> None:
        """Returns when so many more messages are accepted."""
        goal = len(self.accepted) + more
        until(lambda: len(self.accepted) >= goal, f"the acceptance of {more} more messages")

    def _call(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stopping.is_set():
            instance = rng.choice(self._instances)
            try:
                connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=3.0)
                with contextlib.closing(connection):
                    connection.request("POST", "/sms", json.dumps({"PhoneNumber": "48123456789", "Content": "Hi"}))
                    response = connection.getresponse()
                    document = json.loads(response.read())
            except (OSError, http.client.HTTPException):  # it was killed, or it hangs: was this message accepted?
                continue
            if response.status == 202:
                self.accepted.append(document["ID"])
            else:
                self.refused.append(response.status)
