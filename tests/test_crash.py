"""The whole command with `--db`, killed with SIGKILL under load and started again: nothing accepted is lost.

The moments of the kills are random numbers of accepted messages, from a seed; the provider's stand-in records what it
took outside the process. The long version runs with `pytest -m long -s`.
"""
from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers import Child, request, until
from message_model import MessageStatus
from providers import HANG, Recorder
from receivers import SECRETS, Behaviour, Receiver, Told, answer, secret_line
from smsproxy import SendMessage, SmsProxy
from sqlite_repository import SqliteRepository

CALLERS = 8
SALE = [SendMessage(f"48{place:09}", "Sale") for place in range(50)]  # a list
SENDERS, BATCH = 2, 20
WINDOW = SENDERS * BATCH  # messages that one kill may cause to be sent twice
FLAGS = (
    "--client", "recording_provider:make_client", "--senders", f"{SENDERS}", "--batch-size", f"{BATCH}",
    "--max-delay", "0",  # so that requests are under way at every moment
)  # fmt: skip
RANK = {MessageStatus.ACCEPTED: 0, MessageStatus.CONFIRMED: 1, MessageStatus.FAILED: 2, MessageStatus.DELIVERED: 2}


def start(directory: Path, *flags: str) -> Child:
    provider = str(directory / "provider.txt")
    return Child("--db", str(directory / "sms.db"), *FLAGS, *flags, environ={"RECORDING_FILE": provider})


def key_of(number: int) -> str:
    """The idempotency key of a list, by which its IDs are known also when there was no response."""
    return f"sale-{number}"


@dataclass
class Shop:
    """What the callers know: every ID that got a 202, and how far each was when last seen."""

    accepted: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    lists: int = 0  # that were sent, whatever became of them
    wrong: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, count: int) -> None:
        """Blocks until so many messages are accepted."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.accepted) >= count or self.wrong, HANG), "nothing is accepted"

    def post(self, connection: http.client.HTTPConnection) -> None:
        body = json.dumps({"PhoneNumber": "48123456789", "Content": "Your parcel is here"})
        connection.request("POST", "/sms", body)
        with connection.getresponse() as response:
            document = json.loads(response.read())
        with self.changed:
            if response.status == 202:
                self.accepted.append(document["ID"])
                self.ranks[document["ID"]] = 0
            else:
                self.wrong.append(f"POST: {response.status} {document}")
            self.changed.notify_all()

    def post_list(self, connection: http.client.HTTPConnection) -> None:
        with self.changed:
            self.lists += 1
            number = self.lists
        body = json.dumps({"Messages": [{"PhoneNumber": each.phone_number, "Content": each.message} for each in SALE]})
        connection.request("POST", "/sms/bulk", body, {"Idempotency-Key": key_of(number)})
        with connection.getresponse() as response:
            document = json.loads(response.read())
        with self.changed:
            if response.status == 202:
                ids = [each["ID"] for each in document["Messages"]]
                self.accepted += ids
                self.ranks.update(dict.fromkeys(ids, 0))
            else:
                self.wrong.append(f"POST of a list: {response.status} {document}")
            self.changed.notify_all()

    def poll(self, connection: http.client.HTTPConnection, message_id: str) -> None:
        with self.changed:
            before = self.ranks[message_id]
        connection.request("GET", f"/sms/{message_id}")
        with connection.getresponse() as response:
            document = json.loads(response.read())
        rank = RANK.get(document.get("Status"), -1)
        with self.changed:
            if rank < before:
                self.wrong.append(f"GET {message_id}: {response.status} {document} after rank {before}")
            self.ranks[message_id] = max(rank, self.ranks[message_id])

    def call(self, port: int, seed: str) -> None:
        """Posts and polls until the service is gone."""
        rng = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            while not self.wrong:
                if rng.random() < 0.1:
                    self.post_list(connection)
                else:
                    self.post(connection)
                self.poll(connection, rng.choice(self.accepted))


@contextlib.contextmanager
def callers(shop: Shop, port: int, seed: str) -> Iterator[None]:
    """Callers that go on until the service is gone, which the block has to see to."""
    threads = [threading.Thread(target=shop.call, args=(port, f"{seed}/{n}"), daemon=True) for n in range(CALLERS)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive(), "a caller hangs"


def taken(directory: Path) -> Counter[str]:
    """How many times the provider took each message."""
    return Counter((directory / "provider.txt").read_text().split())


def left(directory: Path, scratch: Path, lists: int = 0) -> set[str]:
    """The IDs in the outbox of a copy of what the killed process left; of so many lists all is there or nothing."""
    for suffix in ("", "-wal"):
        if (directory / f"sms.db{suffix}").exists():
            shutil.copy(directory / f"sms.db{suffix}", scratch / f"sms.db{suffix}")
    with contextlib.closing(SqliteRepository(str(scratch / "sms.db"))) as repository:
        proxy = SmsProxy(Recorder())
        for number in range(1, lists + 1):
            ids = [entry.message.message_id for entry in proxy.entries(SALE, key_of(number))]
            there = [each for each in ids if repository.get(each) is not MessageStatus.NOT_FOUND]
            assert len(there) in (0, len(SALE)), f"a part of list {number} is stored"
        batch = repository.claim(1_000_000, 0.0, flush=True).batch
        return set(batch.ids) if batch else set()


def kill_again_and_again(tmp_path: Path, rounds: int, most: int) -> None:
    """Each round accepts 1 to `most` messages before the kill."""
    directory, shop, rng = tmp_path / "kept", Shop(), random.Random(rounds)
    directory.mkdir()
    unknown, resent_before = [], 0
    for number in range(rounds):
        service = start(directory)
        goal = len(shop.accepted) + rng.randint(1, most)
        with callers(shop, service.server_address[1], f"{rounds}/{number}"):
            shop.wait_for(goal)
            service.end(signal.SIGKILL)
        (tmp_path / f"{number}").mkdir()
        waiting, times = left(directory, tmp_path / f"{number}", shop.lists), taken(directory)
        assert shop.wrong == []
        assert set(shop.accepted) - waiting - set(times) == set(), "lost"
        unknown.append(len(waiting & set(times)))  # taken, perhaps, and not marked: these are sent again
        assert unknown[-1] <= WINDOW
        resent = times.total() - len(times)
        assert resent - resent_before <= (unknown[-2] if number else 0), "sent twice without need"
        resent_before = resent
    service = start(directory)
    connection = http.client.HTTPConnection(*service.server_address, timeout=HANG)
    with contextlib.closing(connection):
        for message_id in shop.accepted:
            shop.poll(connection, message_id)
    # A list that got no response may have been accepted all the same, and a stop leaves what waits.
    until(lambda: b"\nsmsproxy_pending_messages 0\n" in request(service, "GET", "/metrics")[1])
    assert (service.end(), " ERROR " in service.log, shop.wrong) == (0, False, [])
    times = taken(directory)
    assert set(shop.accepted) - set(times) == set(), "lost"
    (tmp_path / "end").mkdir()
    assert left(directory, tmp_path / "end") == set()
    resent = times.total() - len(times)
    assert resent <= sum(unknown)
    print(
        f"\n{rounds} kills: {len(shop.accepted)} messages got a 202, all or nothing of"
        f" each of {shop.lists} lists, 0 lost, 0 NOT_FOUND, no status went backwards;"
        f" {len(times) - len(set(shop.accepted))} more were accepted as the process died; {resent} were sent again,"
        f" at most {max(unknown)} for one kill (the window is {SENDERS} senders x {BATCH} = {WINDOW})"
    )


# With a webhook


class Moody(Receiver):
    """Refuses a third of the requests, until it is in a good mood, and lets one wait until the process is killed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.bodies: dict[str, set[bytes]] = {}  # by their IDs
        self.good = False
        self.cut_off = math.inf  # how many requests came when one waits
        self.killed = threading.Event()
        self._rng = random.Random(seed)

    def came(self, told: Told) -> Behaviour:
        self.bodies.setdefault(told.id, set()).add(told.body)
        if not self.good and self._rng.random() < 0.3:
            return answer(503)
        behave, killed = super().came(told), self.killed

        def wait(handler: object) -> None:
            killed.wait(HANG)

        return behave if self.good or len(self.told) < self.cut_off else wait


def settle(directory: Path, gauge: str, *flags: str) -> None:
    """Starts the service, waits until this gauge is 0, and ends it."""
    with start(directory, *flags) as service:
        until(lambda: f"\n{gauge} 0\n".encode() in request(service, "GET", "/metrics")[1])
        assert service.end() == 0


def kill_while_it_tells(tmp_path: Path, rounds: int, most: int) -> None:
    """Kills it again and again while a receiver is told; then what it was told last has to be what is."""
    shop, rng, secret = Shop(), random.Random(rounds), tmp_path / "secret"
    secret.write_text(secret_line(SECRETS[0]))
    with Moody(rounds) as receiver:
        hook = ("--webhook-url", receiver.url(), "--webhook-secret-file", str(secret))
        for number in range(rounds):
            service = start(tmp_path, *hook)
            goal, told = len(shop.accepted) + rng.randint(1, most), len(receiver.told) + rng.randint(1, 4)
            receiver.killed, receiver.cut_off = threading.Event(), told if number % 2 else math.inf
            with callers(shop, service.server_address[1], f"{rounds}/{number}"):
                shop.wait_for(goal)
                receiver.wait_for(lambda requests, told=told: len(requests) >= told)  # type: ignore[misc]
                service.end(signal.SIGKILL)
            receiver.killed.set()
        receiver.good = True
        settle(tmp_path, "smsproxy_pending_messages", *hook)  # which also applies the last reports
        settle(tmp_path, "smsproxy_webhook_pending_messages", *hook)
        assert (receiver.backwards, shop.wrong) == ([], [])
        assert {len(bodies) for bodies in receiver.bodies.values()} == {1}, "one ID, two bodies"
    with contextlib.closing(SqliteRepository(str(tmp_path / "sms.db"))) as repository:
        statuses = {message_id: repository.get(message_id).value for message_id in shop.accepted}
    told_of = {message_id: receiver.statuses.get(message_id, "ACCEPTED") for message_id in shop.accepted}
    assert told_of == statuses
    again = len(receiver.told) - len({told.id for told in receiver.told})
    print(
        f"\n{rounds} kills: {len(shop.accepted)} messages, {Counter(statuses.values())}, 0 changes lost, none told"
        f" backwards; {len(receiver.bodies)} bodies, {again} of them came twice"
    )


def test_no_change_is_lost_or_told_backwards_when_the_process_is_killed(tmp_path: Path) -> None:
    kill_while_it_tells(tmp_path, rounds=2, most=200)


@pytest.mark.long
def test_no_change_is_lost_or_told_backwards_in_25_kills(tmp_path: Path) -> None:
    kill_while_it_tells(tmp_path, rounds=25, most=2_000)


# Without


def test_nothing_accepted_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, rounds=2, most=200)


@pytest.mark.long
def test_nothing_accepted_is_lost_in_25_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, rounds=25, most=2_000)
