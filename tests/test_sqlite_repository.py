"""The durable repository: what it adds to the contract of `test_repositories.py`.

The writer is held by a clock that it reads in the middle of a transaction, or by the lock of another connection. What
the file holds is read by other connections, from copies, as a crash would leave them, or byte by byte.
"""
from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastsmsing import Message
from helpers import HANG, Clock, every_thread_ends
from smsproxy import Batch, DuplicateMessageError, Entry, MessageStatus, Reason, RepositoryUnavailableError
from sqlite_repository import SqliteRepository, check_file

__all__ = ["every_thread_ends"]  # a fixture

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus
OURS = f"PRAGMA application_id = {0x534D5350}; PRAGMA user_version = "


def entries(*ids: str, text: str = "Your parcel is here") -> list[Entry]:
    """Entries with these IDs; the fingerprint of each tells its place."""
    return [Entry(Message("48123456789", text, each), f"{place}".encode()) for place, each in enumerate(ids)]


def claimed(repository: SqliteRepository, size: int = 10_000) -> Batch:
    """Up to so many of the oldest messages."""
    return repository.claim(size, 0.0).batch or Batch(())


def ids(repository: SqliteRepository) -> list[str]:
    """What can be claimed, in order; it stays in the outbox."""
    batch = claimed(repository)
    repository.release(batch)
    return batch.ids


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
def busy(path: Path) -> Iterator[tuple[SqliteRepository, Future[Any], Callable[[], None], ThreadPoolExecutor]]:
    """A repository in the middle of saving "first", the result, what lets it go on, and threads for more calls."""
    held, released = threading.Event(), threading.Event()

    def clock() -> float:
        if threading.current_thread() is not threading.main_thread() and not held.is_set():
            held.set()
            assert released.wait(HANG), "nobody let it go on"
        return 1_000.0

    with opened(path, clock=clock) as repository, ThreadPoolExecutor(32) as pool:
        first = pool.submit(repository.save_all, entries("first"))
        assert held.wait(HANG)
        yield repository, first, released.set, pool


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Someone else writes to the file until the block ends."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def run(path: Path, script: str) -> list[Any]:
    """What the last statement of an SQL script finds."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in script.split("; ")][-1]


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


# Opening, keeping, groups


def test_only_the_owner_can_read_any_of_its_files(path: Path) -> None:
    umask = os.umask(0)
    try:
        with opened(path) as repository:
            repository.save_all(entries("a"))
            modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    finally:
        os.umask(umask)
    assert modes.keys() >= {"sms.db", "sms.db-wal", "sms.db.lock"} and set(modes.values()) == {0o600}


def test_a_file_in_use_is_refused_by_any_name_until_it_is_closed_and_a_check_is_not(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with opened(path) as repository:
        repository.save("a")
        for name in (path, link):
            with pytest.raises(RepositoryUnavailableError, match="another process uses it"):
                SqliteRepository(str(name))
            check_file(str(name))
    with opened(link) as repository:
        assert repository.get("a") == ACCEPTED


SCHEMA_1 = (
    "CREATE TABLE message (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, accepted_at REAL NOT"
    f" NULL, final_at REAL, phone_number TEXT, content TEXT, fingerprint BLOB); {OURS} 1"
)


def test_a_file_of_schema_1_is_taken_over_with_all_it_holds(path: Path) -> None:
    rows = [  # in order of acceptance; without a number: handed over
        ("z", "ACCEPTED", 10.0, None, "48999", "secret text", b"mark"),
        ("m", "ACCEPTED", 11.0, None, None, None, None),
        ("a", "ACCEPTED", 12.0, None, "48998", "b\0", None),
        ("d", "DELIVERED", 13.0, 20.0, None, None, b"other"),
        ("c", "CONFIRMED", 14.0, None, None, None, None),
        ("f", "FAILED", 15.0, 15.5, None, None, None),
    ]
    run(path, SCHEMA_1)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executemany("INSERT INTO message VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
        db.commit()
    before, wall = path.read_bytes(), Clock(50.0)
    check_file(str(path))
    assert path.read_bytes() == before, "a check changes nothing"
    with opened(path, 39.0, wall_clock=wall, clock=wall) as repository:
        found = {row[0]: repository.get(row[0]).value for row in rows}
        assert found == {row[0]: "NOT_FOUND" if row[0] == "m" else row[1] for row in rows}, "m is 39 s old"
        batch, expected = claimed(repository), [Message("48999", "secret text", "z"), Message("48998", "b\0", "a")]
        assert [each.message for each in batch.entries] == expected
        assert (repository.oldest(), repository.backlog()) == (40.0, 2)
        known = repository.save_all(entries("z", "d"))
        assert [getattr(error, "fingerprint", None) for error in known] == [b"mark", b"other"]
        repository.handed_over(batch)
    assert b"secret text" not in path.read_bytes()


NOT_OURS: dict[str, list[str | bytes]] = {  # by what is said of it
    "something else": [
        "CREATE TABLE customer (name); INSERT INTO customer VALUES ('Ann')", "CREATE TABLE message (id, status)",
        "CREATE TABLE other (name); PRAGMA user_version = 1", "PRAGMA application_id = 7", "PRAGMA user_version = 1"],
    "not a database": [b"Dear diary", b"SQLite format 3\0" + b"\xa5" * 8_000],
    "newer than this program": [f"{OURS} 3"],
}  # fmt: skip


@pytest.mark.parametrize("look", [SqliteRepository, check_file])
@pytest.mark.parametrize(("content", "reason"), [(each, reason) for reason in NOT_OURS for each in NOT_OURS[reason]])
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_was(
    look: Callable[[str], object], path: Path, content: str | bytes, reason: str
) -> None:
    path.write_bytes(content) if isinstance(content, bytes) else run(path, content)
    before = path.read_bytes()
    for _ in range(2):  # a refusal keeps no lock
        with pytest.raises(RepositoryUnavailableError, match=f"^{path}: .*{reason}"):
            look(str(path))
    assert path.read_bytes() == before
    assert {each.name for each in path.parent.iterdir()} <= {"sms.db", "sms.db.lock"}


@pytest.mark.parametrize("look", [SqliteRepository, check_file])
@pytest.mark.parametrize("name", [".", "nowhere/sms.db"])
def test_a_path_where_no_file_can_be_is_refused(look: Callable[[str], object], path: Path, name: str) -> None:
    with pytest.raises(RepositoryUnavailableError):
        look(str(path.parent / name))


def test_a_check_makes_no_file_and_fails_for_one_that_may_not_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_file(str(path))
    assert list(path.parent.iterdir()) == []
    path.touch()
    monkeypatch.setattr(os, "access", lambda *args: False)  # what the system says to anybody but root
    with pytest.raises(RepositoryUnavailableError, match="cannot be read and written"):
        check_file(str(path))


def test_a_lock_file_that_is_something_else_is_refused_before_anything_is_made(path: Path) -> None:
    Path(f"{path}.lock").write_bytes(b"not a lock file" * 100)
    with pytest.raises(RepositoryUnavailableError, match="not a database"):
        SqliteRepository(str(path))
    assert not path.exists()


def test_a_file_that_is_being_written_is_refused(path: Path, connections: list[sqlite3.Connection]) -> None:
    SqliteRepository(str(path)).close()
    with locked(path), pytest.raises(RepositoryUnavailableError, match="locked"):
        SqliteRepository(str(path))
    with opened(path) as repository:
        assert repository.save_all(entries("a")) == [None]


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    run(path, SCHEMA_1.replace("final_at", "lost"))
    before = run(path, "SELECT sql FROM sqlite_master")
    with pytest.raises(RepositoryUnavailableError, match="final_at"):
        SqliteRepository(str(path))
    assert run(path, "SELECT sql FROM sqlite_master") == before
    assert run(path, "PRAGMA user_version") == [(1,)]


def test_a_start_and_a_claim_read_no_more_than_a_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SqliteRepository(str(path)).close()
    numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
    run(path, f"{numbers} INSERT INTO outbox SELECT i, 'id' || i, 0.0, '48', 'x' FROM n")
    connect, steps = sqlite3.connect, []

    def counted(*args: Any, **options: Any) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.set_progress_handler(lambda: steps.append(1), 100)  # called every 100 steps of SQLite's machine
        return db

    monkeypatch.setattr(sqlite3, "connect", counted)
    with opened(path) as repository:
        batch = repository.claim(100, 5.0).batch
        assert (repository.backlog(), batch and len(batch), batch and batch.ids[-1]) == (30_000, 100, "id100")
    assert len(steps) < 100, "more than 10,000 steps: it went through the outbox"


def test_a_restart_keeps_statuses_reasons_fingerprints_and_the_outbox_in_order(path: Path) -> None:
    with opened(path) as repository:
        repository.save_all(entries(*"gfedcba"))
        repository.update_all({"b": CONFIRMED, "c": FAILED, "d": DELIVERED, "e": Reason.ATTEMPTS, "f": Reason.EXPIRED})
    with opened(path) as repository:
        assert [(repository.get(each), repository.reason(each)) for each in "abcdefh"] == [
            (ACCEPTED, None), (CONFIRMED, None), (FAILED, None), (DELIVERED, None), (FAILED, Reason.ATTEMPTS),
            (FAILED, Reason.EXPIRED), (NOT_FOUND, None)]  # fmt: skip
        errors = repository.save_all(entries("g", "a", "A"))
        assert [getattr(error, "fingerprint", None) for error in errors] == [b"0", b"6", None]
    with opened(path) as repository:
        assert (ids(repository), repository.backlog()) == (["g", "a", "A"], 3)
        repository.handed_over(claimed(repository))
        repository.save_all(entries("0"))
        assert ids(repository) == ["0"]


def test_what_was_promised_is_in_the_file_the_moment_it_is_promised(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries("a", "b", "c"))
    batch = claimed(repository, 2)
    with after_crash(path) as crashed:
        assert ids(crashed) == ["a", "b", "c"], "sent again under the same IDs"
    repository.handed_over(batch)
    with after_crash(path) as crashed:
        assert (ids(crashed), crashed.get("a")) == (["c"], ACCEPTED)
    repository.update_all({"a": DELIVERED, "c": Reason.REJECTED})
    with after_crash(path) as crashed:
        assert (ids(crashed), crashed.get("a"), crashed.reason("c")) == ([], DELIVERED, Reason.REJECTED)


def test_nothing_is_promised_or_seen_before_it_is_in_the_file_and_a_close_waits_for_it(path: Path) -> None:
    with busy(path) as (repository, saving, go_on, pool):
        found = saving.done(), repository.get("first"), ids(repository), repository.backlog()
        assert found == (False, NOT_FOUND, [], 0)
        closing = pool.submit(repository.close)
        go_on()
        assert (saving.result(HANG), closing.result(HANG)) == ([None], None)
    with opened(path) as repository:
        assert (ids(repository), repository.get("first")) == (["first"], ACCEPTED)


def test_each_commit_is_synced_to_the_disk(path: Path, connections: list[sqlite3.Connection]) -> None:
    with opened(path) as repository:
        repository.save_all(entries("a"))
        repository.get("a")
        [writer] = [db for db in connections if db.total_changes]
        for name, value in (("synchronous", 2), ("fullfsync", 1), ("journal_mode", "wal")):
            assert writer.execute(f"PRAGMA {name}").fetchone() == (value,)


@pytest.mark.parametrize("length", [1, 10_000])
@pytest.mark.parametrize("how", [None, CONFIRMED, DELIVERED, Reason.EXPIRED])
def test_numbers_and_texts_are_overwritten_when_they_are_not_needed_any_more(
    path: Path, how: MessageStatus | Reason | None, length: int
) -> None:
    with opened(path) as repository:
        for number in range(20):
            repository.save_all([Entry(Message(f"4800000{number:04}", f"<{number:04}" * length, f"{number}"))])
        if how is None:
            repository.handed_over(claimed(repository, 15))
        else:
            repository.update_all({f"{number}": how for number in range(15)})
    raw = b"".join(each.read_bytes() for each in path.parent.iterdir())
    found = [(f"4800000{number:04}".encode() in raw, f"<{number:04}".encode() in raw) for number in range(20)]
    assert found == [(number >= 15,) * 2 for number in range(20)]


def commits(path: Path) -> int:
    """How many commits the write-ahead log holds (SQLite manual, "WAL-mode File Format")."""
    data = Path(f"{path}-wal").read_bytes()
    frame = 24 + int.from_bytes(data[8:12], "big")
    heads = [data[start : start + 16] for start in range(32, len(data), frame)]
    return sum(head[4:8] != bytes(4) and head[8:] == data[16:24] for head in heads)


@pytest.mark.parametrize("bad", [False, True])
def test_what_comes_while_the_writer_is_busy_shares_a_commit_and_costs_no_other_anything(path: Path, bad: bool) -> None:
    coming = threading.Semaphore(0)
    groups = [entries(f"{number}", "first") for number in range(30)] + [[Entry(Message("48", "\ud800", "odd"))]] * bad

    def save(group: list[Entry]) -> list[type]:
        coming.release()
        return kinds(repository.save_all(group))

    with busy(path) as (repository, first, go_on, pool):
        before = commits(path)
        saving = [pool.submit(save, group) for group in groups]
        for _ in saving:
            assert coming.acquire(timeout=HANG)
        go_on()
        expected = [[type(None), DuplicateMessageError]] * 30 + [[UnicodeEncodeError]] * bad
        assert ([each.result(HANG) for each in saving], first.result(HANG)) == (expected, [None])
        assert bad or commits(path) - before <= 15
        assert len(ids(repository)) == 31


def test_messages_saved_or_updated_together_are_one_commit(path: Path, repository: SqliteRepository) -> None:
    names = [f"{number}" for number in range(250)]  # of several statements
    before, each = commits(path), (CONFIRMED, DELIVERED, Reason.EXPIRED)
    repository.save_all(entries(*names))
    assert commits(path) == before + 1
    repository.update_all({name: each[place % 3] for place, name in enumerate(names[:-1])})
    assert commits(path) == before + 2
    assert (ids(repository), repository.get("247"), repository.get("248")) == (["249"], DELIVERED, FAILED)


@pytest.mark.parametrize("bad", [("48", "x", "\ud800"), ("48", "\ud800", "x"), ("48", object(), "x")])
def test_a_message_that_cannot_be_stored_costs_only_itself(repository: SqliteRepository, bad: tuple[Any, ...]) -> None:
    errors = repository.save_all([*entries("a", "b"), Entry(Message(*bad)), *entries("a", "c")])
    assert [error if error is None else isinstance(error, DuplicateMessageError) for error in errors] == [
        None, None, False, True, None]  # fmt: skip
    assert (ids(repository), repository.backlog()) == (["a", "b", "c"], 3)


# Trouble, closing, times


@contextlib.contextmanager
def full(connections: Iterable[sqlite3.Connection]) -> Iterator[None]:
    """The disk is full until the block ends."""
    for pages in (1, 1_000_000):  # that the database may have
        for db in connections:
            with contextlib.suppress(sqlite3.ProgrammingError):  # closed by now
                db.execute(f"PRAGMA max_page_count = {pages}").fetchone()
        if pages == 1:
            yield


@pytest.mark.parametrize("trouble", ["locked", "full"])
def test_a_file_that_cannot_be_written_can_be_read_is_told_logged_once_and_recovers(
    trouble: str, path: Path, connections: list[sqlite3.Connection], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as repository:
        repository.save_all(entries("a"))
        batch, large = claimed(repository), "x" * 60_000  # more than a database without room can take
        changes = [lambda: repository.save_all(entries("b", "a", "c", text=large)), repository.check, repository.forget,
                   lambda: repository.handed_over(batch), lambda: repository.update_all({"a": DELIVERED})]  # fmt: skip
        with locked(path) if trouble == "locked" else full(connections):
            for change in changes if trouble == "locked" else changes[:1] * 5:
                with pytest.raises(RepositoryUnavailableError, match=trouble):
                    change()
            assert [repository.get(each) for each in "abc"] == [ACCEPTED, NOT_FOUND, NOT_FOUND]
            assert (repository.reason("a"), repository.backlog()) == (None, 1)
        assert kinds(repository.save_all(entries("b", "a", text=large))) == [type(None), DuplicateMessageError]
        repository.handed_over(batch)
        assert ids(repository) == ["b"]
        repository.check()
    levels = [record.levelname for record in caplog.records if record.name == "smsproxy.sqlite"]
    assert levels == ["ERROR", "WARNING"], "when it begins and when it ends"


@pytest.mark.parametrize("found_by", ["a change", "a read"])
def test_a_damaged_page_costs_only_what_is_on_it_and_is_told_once_and_by_a_check(
    path: Path, found_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{number:04}" for number in range(1_000)]
    with opened(path) as repository:
        repository.save_all(entries(*names, text="x"))
        repository.handed_over(claimed(repository))
    raw = bytearray(path.read_bytes())  # SQLite manual, "Database File Format": 0x0A is a leaf of an index
    pages = range(4096, len(raw), 4096)
    spoilt = next(page for page in pages if raw[page] == 0x0A and b"0500ACCEPTED" in raw[page : page + 4096])
    lost = set(map(bytes.decode, re.findall(rb"(\d{4})ACCEPTED", raw[spoilt : spoilt + 4096])))
    raw[spoilt : spoilt + 4096] = b"\xa5" * 4096
    path.write_bytes(raw)
    with opened(path) as repository:
        repository.check()
        if found_by == "a read":
            with pytest.raises(RepositoryUnavailableError, match="malformed"):
                repository.get("0500")
        else:
            errors = repository.update_all(dict.fromkeys(names, DELIVERED))
            assert lost <= errors.keys() and len(errors) < len(names) / 2, "but for those between two pages"
            assert set(kinds(errors.values())) == {RepositoryUnavailableError}
            assert {repository.get(name) for name in names if name not in errors} == {DELIVERED}
        with pytest.raises(RepositoryUnavailableError, match="damaged"):
            repository.check()
        assert repository.save_all(entries("new")) == [None]
    assert ["is damaged" in message for message in caplog.messages] == [True] * (found_by == "a change")


def test_a_row_that_makes_no_sense_costs_only_itself(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries("a", "b", "c"))
    run(path, "UPDATE message SET status = 'EATEN' WHERE id = 'b'")
    assert list(repository.update_all({"a": CONFIRMED, "b": CONFIRMED, "c": DELIVERED})) == ["b"]
    assert (repository.get("a"), repository.get("c")) == (CONFIRMED, DELIVERED)


def test_a_group_of_which_one_half_cannot_be_written_tells_of_each_message_what_became_of_it(
    path: Path, repository: SqliteRepository
) -> None:
    run(path, "CREATE TRIGGER bad BEFORE INSERT ON message WHEN NEW.id = 'bad' BEGIN SELECT RAISE(ABORT, 'bad');END")
    run(path, "CREATE TRIGGER no BEFORE INSERT ON message WHEN NEW.id = 'no' BEGIN SELECT json('{');END")
    assert kinds(repository.save_all(entries("a", "bad", "c", "no"))) == [
        type(None), sqlite3.IntegrityError, RepositoryUnavailableError, RepositoryUnavailableError,
    ]  # fmt: skip
    assert ids(repository) == ["a"]


def test_what_cannot_be_forgotten_is_an_error(path: Path) -> None:
    clock = Clock()
    with opened(path, 100.0, clock=clock) as repository:
        repository.save("a")
        run(path, "CREATE TRIGGER kept BEFORE DELETE ON message BEGIN SELECT RAISE(ABORT, 'kept');END")
        clock.advance(1_000.0)
        with pytest.raises(sqlite3.IntegrityError):
            repository.forget()


def test_an_error_in_the_writer_reaches_its_caller_and_ends_nothing(path: Path) -> None:
    clock = Clock()
    with opened(path, clock=clock) as repository:
        repository.save_all(entries("a", "b"))
        clock.now = "broken"  # type: ignore[assignment]
        assert kinds(repository.update_all({"a": FAILED, "b": DELIVERED}).values()) == [TypeError, TypeError]
        clock.now = 2_000.0
        assert (repository.update_all({"b": DELIVERED}), ids(repository)) == ({}, ["a"])


def test_after_the_end_every_call_is_refused_and_one_file_is_left(path: Path) -> None:
    with opened(path) as repository:
        repository.save_all(entries("a"))
        batch = claimed(repository)
    calls = (lambda: repository.save_all(entries("b")), lambda: repository.get("a"), lambda: repository.reason("a"),
             lambda: repository.update_all({"a": DELIVERED}), lambda: repository.claim(1, 0.0), repository.oldest,
             lambda: repository.handed_over(batch), repository.forget, repository.check)  # fmt: skip
    for call in calls:
        with pytest.raises(RepositoryUnavailableError, match="closed"):
            call()
    repository.close()
    assert {each.name for each in path.parent.iterdir()} == {"sms.db", "sms.db.lock"}


@pytest.mark.parametrize("moment", [1, 30])
def test_a_caller_is_answered_truly_or_refused_whenever_it_is_closed(path: Path, moment: int) -> None:
    repository, acknowledged, enough = SqliteRepository(str(path)), list[str](), threading.Semaphore(0)

    def call(name: int) -> None:
        with contextlib.suppress(RepositoryUnavailableError):
            for number in itertools.count():
                group = [f"{name}-{number}-{place}" for place in range(3)]
                assert repository.save_all(entries(*group)) == [None] * 3
                acknowledged.extend(group)
                enough.release()
                assert repository.get(group[0]) == ACCEPTED

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call, name) for name in range(4)]
        for _ in range(moment):
            assert enough.acquire(timeout=HANG)
        repository.close()
        assert [caller.result(HANG) for caller in callers] == [None] * 4
    with opened(path) as repository:
        assert sorted(ids(repository)) == sorted(acknowledged)


@pytest.mark.parametrize("reported", [False, True])
def test_an_id_that_was_sent_and_forgotten_can_be_used_and_claimed_again(path: Path, reported: bool) -> None:
    clock = Clock()
    with opened(path, 60.0, clock=clock) as repository:
        repository.save_all(entries("a", "b"))
        batch = claimed(repository, 1)
        repository.update_all({"a": DELIVERED}) if reported else repository.handed_over(batch)
        clock.advance(61.0)
        again = entries("a", "b")
        assert kinds(repository.save_all(again)) == [type(None), DuplicateMessageError]
        assert (ids(repository), again[0].accepted_at) == (["b", "a"], clock())


def test_what_is_forgotten_leaves_the_file_and_nothing_is_looked_for_before_it_may_be_due(path: Path) -> None:
    clock = Clock()
    with opened(path, 60.0, clock=clock) as repository:
        repository.save_all(entries("a", "b", "waits"))
        repository.handed_over(claimed(repository, 2))
        for seconds, expected in ((0.0, (60.0, 3)), (30.0, (30.0, 3)), (31.0, (60.0, 1))):
            clock.advance(seconds)
            assert (repository.forget(), run(path, "SELECT count(*) FROM message")[0][0]) == expected
        assert ids(repository) == ["waits"]


def test_the_retention_of_this_run_counts_and_time_passes_while_it_is_closed(path: Path) -> None:
    wall = Clock()
    for retention, seconds, expected in ((0.0, 65.0, DELIVERED), (120.0, 0.0, DELIVERED), (60.0, 0.0, NOT_FOUND)):
        with opened(path, retention, wall_clock=wall) as repository:
            if not retention:
                repository.save("a")
                repository.update("a", DELIVERED)
            repository.forget()
            assert repository.get("a") == expected
        wall.advance(seconds)


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_jump_of_the_wall_clock_changes_nothing_in_a_running_process(path: Path, jump: float) -> None:
    clock, wall = Clock(), Clock(1.7e9)
    with opened(path, 60.0, clock=clock, wall_clock=wall) as repository:
        repository.save_all(entries("a", "b"))
        repository.handed_over(claimed(repository, 1))
        wall.advance(jump)
        assert (repository.forget(), repository.get("a")) == (60.0, ACCEPTED)
        assert (repository.oldest(), repository.claim(100, 5.0).wait) == (0.0, 5.0)
        clock.advance(4.0)
        assert repository.claim(100, 5.0).wait == pytest.approx(1.0)


@pytest.mark.parametrize(("passed", "wait"), [(0.0, 5.0), (3.0, 2.0), (6.0, None), (-1e6, 5.0)])
def test_after_a_restart_a_message_waits_for_the_rest_of_its_linger_and_never_for_longer(
    path: Path, passed: float, wait: float | None
) -> None:
    wall, clock = Clock(1.7e9), Clock()
    with opened(path, wall_clock=wall, clock=clock) as repository:
        repository.save_all(entries("a"))
    wall.advance(passed)
    clock.now = 3.0  # another machine's
    with opened(path, wall_clock=wall, clock=clock) as repository:
        claim = repository.claim(100, 5.0)
        assert (claim.wait, claim.batch is None) == (wait and pytest.approx(wait), wait is not None)
        if wait is not None:
            clock.advance(wait)
            claim = repository.claim(100, 5.0)
        assert claim.batch is not None
        assert claim.batch.entries[0].accepted_at == pytest.approx(clock() - max(5.0, passed))
