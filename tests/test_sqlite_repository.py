"""The durable repository: what it adds to the contract of `test_repositories.py`.

The writer is held by a clock that it reads in the middle of a transaction, or by the lock of another connection. What
the file holds is read by other connections, from copies, as a crash would leave them, or byte by byte.
"""
from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import sqlite_repository
from fastsmsing import Message
from helpers import HANG, Clock, Recorder
from smsproxy import (
    DuplicateMessageError, Entry, MessageStatus, OverloadedError, Reason, RepositoryUnavailableError, SendMessage,
    SmsProxy, SmsProxyConfig, StatusTransitionError, UnknownMessageError,
)  # fmt: skip
from sqlite_repository import MIGRATIONS, SqliteRepository, check_file

ROOT = Path(__file__).parent.parent
ACCEPTED, NOT_FOUND = MessageStatus.ACCEPTED, MessageStatus.NOT_FOUND
CONFIRMED, DELIVERED, FAILED = MessageStatus.CONFIRMED, MessageStatus.DELIVERED, MessageStatus.FAILED
LARGE = "x" * 60_000  # characters: more than a database without room can take
TEXTS = ["Zażółć gęślą \U0001f4e6", "a\0b", "\ufeff\u2028", "x" * 65_000, "'\";--"]


class HoldingClock(Clock):
    """A clock that, once `hold` is set, keeps the next thread that reads it until `opened` is."""

    def __init__(self) -> None:
        super().__init__()
        self.hold, self.held, self.opened = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> float:
        if self.hold.is_set():
            self.hold.clear()
            self.held.set()
            assert self.opened.wait(HANG), "nobody opened the clock"
        return super().__call__()


def entries(*ids: str, text: str = "Your parcel is here") -> list[Entry]:
    """Entries with these IDs; the fingerprint of each tells its place."""
    return [Entry(Message("48123456789", text, each), f"{place}".encode()) for place, each in enumerate(ids)]


def outbox(repository: SqliteRepository) -> list[Message]:
    """What can be claimed, in order; it stays in the outbox."""
    batch = repository.claim(10_000, 0.0).batch
    if batch is None:
        return []
    repository.release(batch)
    return [entry.message for entry in batch.entries]


def ids(repository: SqliteRepository) -> list[str]:
    return [message.message_id for message in outbox(repository)]


def hand_over(repository: SqliteRepository, size: int = 10_000) -> None:
    """Claims the oldest messages and hands them over."""
    batch = repository.claim(size, 0.0).batch
    assert batch is not None
    repository.handed_over(batch)


def kinds(errors: Iterable[object]) -> list[type]:
    return [type(error) for error in errors]


@contextlib.contextmanager
def opened(path: Path, *args: Any, **options: Any) -> Iterator[SqliteRepository]:
    with contextlib.closing(SqliteRepository(str(path), *args, **options)) as repository:
        yield repository


@contextlib.contextmanager
def after_crash(path: Path) -> Iterator[SqliteRepository]:
    """A repository on a copy of the file as it is at this moment, which is what a crash would leave."""
    copy = path.with_name("copy.db")
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    with opened(copy) as repository:
        yield repository
    copy.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Someone else writes to the file until the block ends."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive(), f"{thread.name} was left behind"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sms.db"


@pytest.fixture
def repository(path: Path) -> Iterator[SqliteRepository]:
    with opened(path) as repository:
        yield repository


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """All connections that are made from now on; they wait 10 ms for a lock that someone else holds."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recorded(path: str, timeout: float = 0.0, **options: Any) -> sqlite3.Connection:
        made.append(connect(path, timeout=min(timeout, 0.01), **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    return made


# Opening


def test_only_the_owner_can_read_any_of_its_files(path: Path) -> None:
    umask = os.umask(0)
    try:
        with opened(path) as repository:
            repository.save_all(entries("a"))
            modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    finally:
        os.umask(umask)
    assert modes.keys() >= {"sms.db", "sms.db-wal", "sms.db.lock"}
    assert set(modes.values()) == {0o600}


def test_a_second_process_is_refused_until_the_first_is_killed_and_a_check_is_not(path: Path) -> None:
    script = (
        "import sys; from sqlite_repository import SqliteRepository\n"
        "repository = SqliteRepository(sys.argv[1]); repository.save('a'); print('saved', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "saved\n"
        with pytest.raises(RepositoryUnavailableError, match="another process uses it"):
            SqliteRepository(str(path))
        check_file(str(path))
        first.kill()
    with opened(path) as repository:
        assert repository.get("a") == ACCEPTED


def test_another_name_of_the_same_file_is_the_same_file(path: Path, repository: SqliteRepository) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with pytest.raises(RepositoryUnavailableError, match="another process uses it"):
        SqliteRepository(str(link))


def test_a_file_of_schema_1_is_taken_over_with_all_it_holds(path: Path) -> None:
    rows = [  # in order of acceptance; without a number: handed over
        ("z", "ACCEPTED", 10.0, None, "48999", "secret text", b"mark"),
        ("m", "ACCEPTED", 11.0, None, None, None, None),
        ("a", "ACCEPTED", 12.0, None, "48998", "b\0", None),
        ("d", "DELIVERED", 13.0, 20.0, None, None, b"other"),
        ("c", "CONFIRMED", 14.0, None, None, None, None),
        ("f", "FAILED", 15.0, 15.5, None, None, None),
    ]
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(f"{MIGRATIONS[0]}; PRAGMA application_id = {0x534D5350}; PRAGMA user_version = 1")
        names = "id, status, accepted_at, final_at, phone_number, content, fingerprint"
        db.executemany(f"INSERT INTO message ({names}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        db.commit()
    check_file(str(path))
    wall = Clock(50.0)
    with opened(path, 39.0, wall_clock=wall, clock=wall) as repository:
        found = {row[0]: repository.get(row[0]).value for row in rows}
        assert found == {row[0]: "NOT_FOUND" if row[0] == "m" else row[1] for row in rows}, "m is 39 s old"
        assert [(each.phone_number, each.message, each.message_id) for each in outbox(repository)] == [
            ("48999", "secret text", "z"), ("48998", "b\0", "a")]  # fmt: skip
        assert (repository.oldest(), repository.backlog()) == (40.0, 2)
        known = repository.save_all(entries("z", "d"))
        assert [getattr(error, "fingerprint", None) for error in known] == [b"mark", b"other"]
        hand_over(repository)
    assert b"secret text" not in path.read_bytes()


FOREIGN = {
    "a table of its own": "CREATE TABLE customer (name); INSERT INTO customer VALUES ('Ann');",
    "a table like ours": "CREATE TABLE message (id, status);",
    "a version": "CREATE TABLE customer (name); PRAGMA user_version = 1;",
    "an application": "PRAGMA application_id = 77;",
    "a version alone": "PRAGMA user_version = 1;",
}
NO_DATABASE = {"text": b"Dear diary", "zeros": b"\0" * 5_000, "garbage": b"SQLite format 3\0" + b"\xa5" * 8_000}
NEWER = f"PRAGMA application_id = {0x534D5350}; PRAGMA user_version = {len(MIGRATIONS) + 1};"


@pytest.mark.parametrize("look", [SqliteRepository, check_file])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *[pytest.param(script, "belongs to something else", id=name) for name, script in FOREIGN.items()],
        *[pytest.param(content, "not a database", id=name) for name, content in NO_DATABASE.items()],
        pytest.param(NEWER, "newer than this program", id="newer"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_was(
    look: Callable[[str], object], path: Path, content: str | bytes, reason: str
) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(content)
    before = path.read_bytes()
    threads = threading.active_count()
    for _ in range(2):  # a refusal keeps no lock
        with pytest.raises(RepositoryUnavailableError, match=reason) as caught:
            look(str(path))
        assert str(path) in str(caught.value)
    assert (path.read_bytes(), threading.active_count()) == (before, threads)
    assert {each.name for each in path.parent.iterdir()} <= {"sms.db", "sms.db.lock"}


@pytest.mark.parametrize("look", [SqliteRepository, check_file])
@pytest.mark.parametrize("name", [".", "nowhere/sms.db"])
def test_a_path_where_no_file_can_be_is_refused(look: Callable[[str], object], path: Path, name: str) -> None:
    with pytest.raises(RepositoryUnavailableError):
        look(str(path.parent / name))


def test_a_file_that_may_not_be_written_fails_the_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    monkeypatch.setattr(os, "access", lambda *args: False)  # what the system says to anybody but root
    with pytest.raises(RepositoryUnavailableError, match="cannot be read and written"):
        check_file(str(path))


def test_a_lock_file_that_is_something_else_is_refused_before_anything_is_made(path: Path) -> None:
    Path(f"{path}.lock").write_bytes(b"not a lock file" * 100)
    with pytest.raises(RepositoryUnavailableError, match="not a database"):
        SqliteRepository(str(path))
    assert not path.exists()


def test_a_file_that_someone_else_is_writing_is_refused_and_opens_afterwards(path: Path, connections: list[sqlite3.Connection]) -> None:
    with opened(path):
        pass
    with locked(path), pytest.raises(RepositoryUnavailableError, match="locked"):
        SqliteRepository(str(path))
    with opened(path) as repository:
        assert repository.save_all(entries("a")) == [None]


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as repository:
        repository.save_all(entries("a"))
    with monkeypatch.context() as broken:
        broken.setattr(sqlite_repository, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE added (x);\nNONSENSE"))
        with pytest.raises(RepositoryUnavailableError, match="NONSENSE"):
            SqliteRepository(str(path))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'added'").fetchone() == (0,)
    with opened(path) as repository:
        assert ids(repository) == ["a"]


def test_a_check_changes_nothing(path: Path) -> None:
    check_file(str(path))
    assert list(path.parent.iterdir()) == []
    with opened(path) as repository:
        repository.save_all(entries("a"))
        check_file(str(path))
        assert ids(repository) == ["a"]
    before = path.read_bytes()
    check_file(str(path))
    assert path.read_bytes() == before


def test_a_start_and_a_claim_read_no_more_of_a_long_outbox_than_a_batch(
    path: Path, connections: list[sqlite3.Connection]
) -> None:
    with opened(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
            " INSERT INTO outbox SELECT i, 'id' || i, 0.0, '48', 'x' FROM n"
        )
        db.commit()
    connections.clear()
    connect, steps = sqlite3.connect, []
    with pytest.MonkeyPatch.context() as patch:

        def counted(*args: Any, **options: Any) -> sqlite3.Connection:
            db = connect(*args, **options)
            db.set_progress_handler(lambda: steps.append(1), 100)  # called every 100 steps of SQLite's machine
            return db

        patch.setattr(sqlite3, "connect", counted)
        with opened(path) as repository:
            batch = repository.claim(100, 5.0).batch
            assert (repository.backlog(), batch and len(batch), batch and batch.ids[-1]) == (30_000, 100, "id100")
    assert len(steps) < 100, "more than 10,000 steps: it went through the outbox"


# Keeping


def test_a_restart_keeps_statuses_reasons_fingerprints_and_the_outbox(path: Path) -> None:
    updates = {"b": CONFIRMED, "c": FAILED, "d": DELIVERED, "e": Reason.ATTEMPTS, "f": Reason.EXPIRED}
    expected = [ACCEPTED, CONFIRMED, FAILED, DELIVERED, FAILED, FAILED, ACCEPTED, NOT_FOUND]
    with opened(path) as repository:
        repository.save_all(entries(*"abcdefg"))
        repository.update_all(updates)
    with opened(path) as repository:
        assert [repository.get(each) for each in "abcdefgh"] == expected
        assert [repository.reason(each) for each in "acefh"] == [None, None, Reason.ATTEMPTS, Reason.EXPIRED, None]
        errors = repository.save_all(entries("g", "a"))
        assert [error.fingerprint for error in errors if isinstance(error, DuplicateMessageError)] == [b"6", b"0"]
        assert kinds(repository.update_all({"d": FAILED, "h": FAILED}).values()) == [
            StatusTransitionError, UnknownMessageError]  # fmt: skip
        assert (ids(repository), repository.backlog()) == (["a", "g"], 2)


def test_numbers_and_texts_survive_unchanged(path: Path) -> None:
    messages = [Message(f"48{place}", text, f"{place}") for place, text in enumerate(TEXTS)]
    with opened(path) as repository:
        repository.save_all([Entry(message) for message in messages])
    with opened(path) as repository:
        assert [(each.phone_number, each.message) for each in outbox(repository)] == [
            (each.phone_number, each.message) for each in messages
        ]


def test_the_order_of_acceptance_survives_restarts_and_gaps(path: Path) -> None:
    with opened(path) as repository:
        repository.save_all(entries("3", "2", "1"))
        repository.update("1", FAILED)
    with opened(path) as repository:
        repository.save_all(entries("0", "2b"))
        repository.update("2", FAILED)
    with opened(path) as repository:
        assert ids(repository) == ["3", "0", "2b"]


def test_a_place_in_the_order_is_given_once(repository: SqliteRepository) -> None:
    repository.save_all(entries("a", "b"))
    hand_over(repository)
    repository.save_all(entries("c"))
    assert ids(repository) == ["c"]


def test_what_was_promised_is_in_the_file_the_moment_it_is_promised(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries("a", "b", "c"))
    batch = repository.claim(2, 0.0).batch
    assert batch is not None
    with after_crash(path) as crashed:
        assert ids(crashed) == ["a", "b", "c"], "sent again under the same IDs"
    repository.handed_over(batch)
    with after_crash(path) as crashed:
        assert (ids(crashed), crashed.get("a")) == (["c"], ACCEPTED)
    repository.update_all({"a": DELIVERED, "c": Reason.REJECTED})
    with after_crash(path) as crashed:
        assert (ids(crashed), crashed.get("a"), crashed.reason("c")) == ([], DELIVERED, Reason.REJECTED)


def test_nothing_is_promised_or_seen_before_it_is_in_the_file(path: Path) -> None:
    clock = HoldingClock()
    with opened(path, clock=clock) as repository, ThreadPoolExecutor(1) as pool:
        clock.hold.set()
        saving = pool.submit(repository.save_all, entries("a"))
        assert clock.held.wait(HANG)
        assert (saving.done(), repository.get("a"), ids(repository), repository.backlog()) == (False, NOT_FOUND, [], 0)
        clock.opened.set()
        assert (saving.result(HANG), repository.get("a"), repository.backlog()) == ([None], ACCEPTED, 1)


def test_every_connection_that_writes_syncs_each_commit_to_the_disk(
    path: Path, connections: list[sqlite3.Connection]
) -> None:
    with opened(path) as repository:
        repository.save_all(entries("a"))
        repository.get("a")
        writers = [db for db in connections if db.total_changes]
        assert [db.execute("PRAGMA synchronous").fetchone()[0] for db in writers] == [2]


@pytest.mark.parametrize("length", [1, 10_000])
@pytest.mark.parametrize("how", [None, CONFIRMED, DELIVERED, Reason.EXPIRED])
def test_numbers_and_texts_are_overwritten_when_they_are_not_needed_any_more(
    path: Path, how: MessageStatus | Reason | None, length: int
) -> None:
    with opened(path) as repository:
        for number in range(20):
            repository.save_all([Entry(Message(f"4800000{number:04}", f"<{number:04}" * length, f"{number}"))])
        if how is None:
            hand_over(repository, 15)
        else:
            repository.update_all({f"{number}": how for number in range(15)})
    raw = b"".join(each.read_bytes() for each in path.parent.iterdir())
    found = [(f"4800000{number:04}".encode() in raw, f"<{number:04}".encode() in raw) for number in range(20)]
    assert found == [(number >= 15,) * 2 for number in range(20)]


# Groups


def commits(path: Path) -> int:
    """How many commits the write-ahead log holds (SQLite manual, "WAL-mode File Format")."""
    data = Path(f"{path}-wal").read_bytes()
    frame = 24 + int.from_bytes(data[8:12], "big")
    heads = [data[start : start + 16] for start in range(32, len(data), frame)]
    return sum(head[4:8] != bytes(4) and head[8:] == data[16:24] for head in heads)


def test_what_comes_while_the_writer_is_busy_shares_a_commit(path: Path) -> None:
    clock, callers = HoldingClock(), 30
    coming = threading.Semaphore(0)

    def save(repository: SqliteRepository, message_id: str) -> list[Exception | None]:
        coming.release()
        return repository.save_all(entries(message_id))

    with opened(path, clock=clock) as repository, ThreadPoolExecutor(callers + 1) as pool:
        before = commits(path)
        clock.hold.set()
        first = pool.submit(repository.save_all, entries("first"))
        assert clock.held.wait(HANG)
        rest = [pool.submit(save, repository, f"{number}") for number in range(callers)]
        for _ in rest:
            assert coming.acquire(timeout=HANG)
        clock.opened.set()
        assert [each.result(HANG) for each in (first, *rest)] == [[None]] * (callers + 1)
        assert 2 <= commits(path) - before <= callers / 2
        assert len(ids(repository)) == callers + 1


def test_messages_saved_or_updated_together_are_one_commit(path: Path, repository: SqliteRepository) -> None:
    names = [f"{number}" for number in range(250)]  # of several statements
    counts = [commits(path)]
    repository.save_all(entries(*names))
    counts.append(commits(path))
    repository.update_all({name: (CONFIRMED, DELIVERED, Reason.EXPIRED)[place % 3] for place, name in enumerate(names[:-1])})
    counts.append(commits(path))
    assert [after - before for before, after in zip(counts, counts[1:])] == [1, 1]
    assert (ids(repository), repository.backlog(), repository.get("247"), repository.get("248")) == (
        ["249"], 1, DELIVERED, FAILED)  # fmt: skip


@pytest.mark.parametrize("bad", [Message("48", "x", "\ud800"), Message("48", "\ud800", "x"), Message("48", object(), "x")])  # type: ignore[arg-type]
def test_a_message_that_cannot_be_stored_costs_only_itself(repository: SqliteRepository, bad: Message) -> None:
    errors = repository.save_all([*entries("a", "b"), Entry(bad), *entries("a", "c")])
    assert [error if error is None else isinstance(error, DuplicateMessageError) for error in errors] == [
        None, None, False, True, None]  # fmt: skip
    assert (ids(repository), repository.backlog()) == (["a", "b", "c"], 3)


def test_a_caller_whose_change_fails_costs_the_others_of_its_group_nothing(path: Path) -> None:
    clock = HoldingClock()
    with opened(path, clock=clock) as repository, ThreadPoolExecutor(3) as pool:
        clock.hold.set()
        first = pool.submit(repository.save_all, entries("first"))
        assert clock.held.wait(HANG)
        good = pool.submit(repository.save_all, entries("a", "first"))
        bad = pool.submit(repository.save_all, [Entry(Message("48", "\ud800", "x"))])
        clock.opened.set()
        assert (first.result(HANG), kinds(good.result(HANG))) == ([None], [type(None), DuplicateMessageError])
        assert kinds(bad.result(HANG)) == [UnicodeEncodeError]
        assert repository.get("a") == ACCEPTED


def test_an_id_that_cannot_be_in_a_file_is_an_unknown_one(repository: SqliteRepository) -> None:
    repository.save_all(entries("a"))
    odd = "\ud800"
    assert (repository.get(odd), repository.reason(odd)) == (NOT_FOUND, None)
    assert kinds(repository.update_all({odd: DELIVERED, "a": DELIVERED}).values()) == [UnknownMessageError]
    assert repository.get("a") == DELIVERED


def test_known_messages_and_the_limit_are_told_apart_in_a_group(repository: SqliteRepository) -> None:
    repository.save_all(entries("a"))
    errors = repository.save_all(entries("b", "a", "b", "c", "d"), max_pending=3)
    assert kinds(errors) == [type(None), DuplicateMessageError, DuplicateMessageError, type(None), OverloadedError]
    assert (ids(repository), repository.get("d")) == (["a", "b", "c"], NOT_FOUND)


# Trouble


def fill(connections: Iterable[sqlite3.Connection], pages: int) -> None:
    """The database may grow to so many pages, or not at all if it has more."""
    for db in connections:
        with contextlib.suppress(sqlite3.ProgrammingError):  # closed by now
            db.execute(f"PRAGMA max_page_count = {pages}").fetchone()


@contextlib.contextmanager
def full(connections: Iterable[sqlite3.Connection]) -> Iterator[None]:
    """The disk is full until the block ends."""
    fill(connections, 1)
    yield
    fill(connections, 1_000_000)


@pytest.mark.parametrize("trouble", ["locked", "full"])
def test_a_file_that_cannot_be_written_is_told_logged_once_and_recovers(
    trouble: str, path: Path, connections: list[sqlite3.Connection], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as repository:
        repository.save_all(entries("a"))
        with locked(path) if trouble == "locked" else full(connections):
            for _ in range(5):
                with pytest.raises(RepositoryUnavailableError, match=trouble):
                    repository.save_all(entries("b", "a", "c", text=LARGE))
            assert [repository.get(each) for each in "abc"] == [ACCEPTED, NOT_FOUND, NOT_FOUND]
            assert (ids(repository), repository.backlog()) == (["a"], 1)
        assert kinds(repository.save_all(entries("b", "a", text=LARGE))) == [type(None), DuplicateMessageError]
        assert (ids(repository), repository.backlog()) == (["a", "b"], 2)
        repository.check()
    levels = [record.levelname for record in caplog.records if record.name == "smsproxy.sqlite"]
    assert levels == ["ERROR", "WARNING"], "when it begins and when it ends"


def test_a_lock_of_someone_else_stops_every_change_and_no_read(path: Path, connections: list[sqlite3.Connection]) -> None:
    with opened(path, 60.0) as repository:
        repository.save_all(entries("a"))
        batch = repository.claim(1, 0.0).batch
        assert batch is not None
        with locked(path):
            for change in (lambda: repository.update_all({"a": DELIVERED}), lambda: repository.handed_over(batch),
                           repository.check, repository.forget):  # fmt: skip
                with pytest.raises(RepositoryUnavailableError, match="locked"):
                    change()
            assert (repository.get("a"), repository.reason("a")) == (ACCEPTED, None)
        repository.handed_over(batch)
        assert (repository.backlog(), repository.forget()) == (0, 60.0)


def leaf_with(raw: bytes, page_type: int, found: bytes) -> int:
    """Where the first leaf of this type that holds these bytes begins (SQLite manual, "Database File Format")."""
    pages = range(4096, len(raw), 4096)
    return next(start for start in pages if raw[start] == page_type and found in raw[start : start + 4096])


def spoil(path: Path, page_type: int, found: bytes) -> bytes:
    """Overwrites a leaf in the closed file; returns what was in it."""
    raw = bytearray(path.read_bytes())
    start = leaf_with(raw, page_type, found)
    page = bytes(raw[start : start + 4096])
    raw[start : start + 4096] = b"\xa5" * 4096
    path.write_bytes(raw)
    return page


def test_a_damaged_page_costs_only_what_is_on_it_and_is_told_once_and_by_a_check(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{number:04}" for number in range(1_000)]
    with opened(path) as repository:
        repository.save_all(entries(*names, text="x"))
        hand_over(repository)
    page = spoil(path, 0x0A, b"0500ACCEPTED")
    lost = set(map(bytes.decode, re.findall(rb"(\d{4})ACCEPTED", page)))
    with opened(path) as repository:
        repository.check()
        errors = repository.update_all(dict.fromkeys(names, DELIVERED))
        assert lost <= errors.keys() and len(errors) < len(names) / 2, "but for those between two pages"
        assert set(kinds(errors.values())) == {RepositoryUnavailableError}
        assert {repository.get(name) for name in names if name not in errors} == {DELIVERED}
        with pytest.raises(RepositoryUnavailableError, match="malformed"):
            repository.get("0500")
        with pytest.raises(RepositoryUnavailableError, match="damaged"):
            repository.check()
        assert repository.save_all(entries("new")) == [None]
    assert ["is damaged" in record.getMessage() for record in caplog.records] == [True]


def test_a_row_that_makes_no_sense_costs_only_itself(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries("a", "b", "c"))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE message SET status = 'EATEN' WHERE id = 'b'")
        db.commit()
    assert list(repository.update_all({"a": CONFIRMED, "b": CONFIRMED, "c": DELIVERED})) == ["b"]
    assert (repository.get("a"), repository.get("c")) == (CONFIRMED, DELIVERED)


def test_an_error_in_the_writer_reaches_its_caller_and_ends_nothing(path: Path) -> None:
    clock, broken = Clock(), threading.Event()

    def read() -> float:
        if broken.is_set():
            raise RuntimeError("broken clock")
        return clock()

    with opened(path, clock=read) as repository:
        repository.save_all(entries("a", "b"))
        broken.set()
        assert kinds(repository.update_all({"a": FAILED, "b": DELIVERED}).values()) == [RuntimeError, RuntimeError]
        broken.clear()
        assert (repository.update_all({"b": DELIVERED}), ids(repository)) == ({}, ["a"])


# Closing


def test_it_commits_what_waits_when_it_is_closed(path: Path) -> None:
    clock = HoldingClock()
    repository = SqliteRepository(str(path), clock=clock)
    with ThreadPoolExecutor(2) as pool:
        clock.hold.set()
        saving = pool.submit(repository.save_all, entries("a"))
        assert clock.held.wait(HANG)
        closing = pool.submit(repository.close)
        clock.opened.set()
        assert (saving.result(HANG), closing.result(HANG)) == ([None], None)
    with opened(path) as repository:
        assert ids(repository) == ["a"]


def test_after_the_end_every_call_is_refused_and_one_file_and_no_thread_is_left(path: Path) -> None:
    threads = threading.active_count()
    with opened(path) as repository:
        repository.save_all(entries("a"))
        batch = repository.claim(1, 0.0).batch
        assert batch is not None
    calls = (lambda: repository.save_all(entries("b")), lambda: repository.get("a"), lambda: repository.reason("a"),
             lambda: repository.update_all({"a": DELIVERED}), lambda: repository.claim(1, 0.0), repository.oldest,
             lambda: repository.handed_over(batch), repository.forget, repository.check)  # fmt: skip
    for call in calls:
        with pytest.raises(RepositoryUnavailableError, match="closed"):
            call()
    repository.close()
    assert threading.active_count() == threads
    assert {each.name for each in path.parent.iterdir()} == {"sms.db", "sms.db.lock"}


@pytest.mark.parametrize("moment", [1, 30])
def test_a_caller_is_answered_truly_or_refused_whenever_it_is_closed(path: Path, moment: int) -> None:
    repository = SqliteRepository(str(path))
    acknowledged: queue.Queue[str] = queue.Queue()

    def call(name: int) -> None:
        with contextlib.suppress(RepositoryUnavailableError):
            for number in range(1_000_000):
                together = [f"{name}-{number}-{place}" for place in range(3)]
                assert repository.save_all(entries(*together)) == [None] * 3
                for message_id in together:
                    acknowledged.put(message_id)
                assert repository.get(together[0]) == ACCEPTED

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call, name) for name in range(4)]
        known = [acknowledged.get(timeout=HANG) for _ in range(moment)]
        repository.close()
        for caller in callers:
            caller.result(HANG)
    known += [acknowledged.get_nowait() for _ in range(acknowledged.qsize())]
    with opened(path) as repository:
        assert sorted(ids(repository)) == sorted(known)


# Times


def test_what_is_handed_over_and_never_reported_on_is_forgotten_and_what_waits_is_not(path: Path) -> None:
    clock = Clock()
    with opened(path, 60.0, clock=clock) as repository:
        repository.save_all(entries("a", "b"))
        hand_over(repository, 1)
        clock.now += 59.0
        assert repository.get("a") == ACCEPTED
        clock.now += 2.0
        assert [repository.get(each) for each in "ab"] == [NOT_FOUND, ACCEPTED]
        assert repository.save_all(entries("a", "b"))[0] is None, "the ID may be used again"
        assert ids(repository) == ["b", "a"]


def test_forgetting_takes_small_steps_until_nothing_is_due_and_rests_until_something_may_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_repository, "FORGET_STEP", 10)
    clock = Clock()

    def rows() -> int:
        with contextlib.closing(sqlite3.connect(path)) as db:
            found: int = db.execute("SELECT count(*) FROM message").fetchone()[0]
        return found

    with opened(path, 60.0, clock=clock) as repository:
        repository.save_all(entries(*(f"{number}" for number in range(25)), "waits"))
        hand_over(repository, 25)
        assert (repository.forget(), rows()) == (60.0, 26)
        clock.now += 30.0
        assert (repository.forget(), rows()) == (30.0, 26)
        clock.now += 31.0
        assert [(repository.forget(), rows()) for _ in range(3)] == [(0.0, 16), (0.0, 6), (60.0, 1)]
        assert repository.get("waits") == ACCEPTED
    with opened(path, 0, clock=clock) as repository:
        assert repository.forget() is None


def test_the_retention_of_this_run_counts_and_time_passes_while_it_is_closed(path: Path) -> None:
    wall = Clock()
    with opened(path, 0, wall_clock=wall) as repository:
        repository.save_all(entries("a"))
        repository.update("a", DELIVERED)
    wall.now += 65.0
    with opened(path, 120.0, wall_clock=wall) as repository:
        repository.forget()
        assert repository.get("a") == DELIVERED
    with opened(path, 60.0, wall_clock=wall) as repository:
        assert repository.get("a") == NOT_FOUND


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_jump_of_the_wall_clock_changes_nothing_in_a_running_process(path: Path, jump: float) -> None:
    clock, wall = Clock(), Clock(1.7e9)
    with opened(path, 60.0, clock=clock, wall_clock=wall) as repository:
        repository.save_all(entries("a", "b"))
        hand_over(repository, 1)
        wall.now += jump
        assert (repository.forget(), repository.get("a")) == (60.0, ACCEPTED)
        assert (repository.oldest(), repository.claim(100, 5.0).wait) == (0.0, 5.0)
        clock.now += 4.0
        assert repository.claim(100, 5.0).wait == pytest.approx(1.0)


@pytest.mark.parametrize(("passed", "wait"), [(0.0, 5.0), (3.0, 2.0), (6.0, None), (-1e6, 5.0)])
def test_after_a_restart_a_message_waits_for_the_rest_of_its_linger_and_never_for_longer(
    path: Path, passed: float, wait: float | None
) -> None:
    wall, clock = Clock(1.7e9), Clock()
    with opened(path, wall_clock=wall, clock=clock) as repository:
        repository.save_all(entries("a"))
    wall.now += passed
    clock.now = 3.0  # another machine's
    with opened(path, wall_clock=wall, clock=clock) as repository:
        claim = repository.claim(100, 5.0)
        assert (claim.wait, claim.batch is None) == (wait and pytest.approx(wait), wait is not None)
        if wait is not None:
            clock.now += wait
            claim = repository.claim(100, 5.0)
        assert claim.batch is not None
        assert claim.batch.entries[0].accepted_at == pytest.approx(clock() - max(5.0, passed))


# Under a proxy


def test_what_waits_at_a_stop_is_sent_by_the_next_start_in_order_and_counts_before_that(path: Path) -> None:
    config = SmsProxyConfig(batch_size=2, max_delay=None, max_pending=3)
    with opened(path) as repository:
        proxy = SmsProxy(Recorder(), config, repository=repository)  # never started, so nothing is sent
        first = [proxy.send(SendMessage("48123", text)).id for text in ("1", "2", "3")]
        assert proxy.stop(HANG) == 0
    with opened(path) as repository:
        client = Recorder()
        proxy = SmsProxy(client, config, repository=repository)
        with pytest.raises(OverloadedError):
            proxy.send(SendMessage("48123", "4"))
        with proxy:
            client.wait_for(lambda batches: sum(map(len, batches)) >= 2)
            assert client.ids == first[:2]
    with opened(path) as repository:
        assert ids(repository) == first[2:]
