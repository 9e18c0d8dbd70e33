"""The file of an SQLite repository: what is opened, refused, locked, converted and checked; how long its log gets."""
from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastsmsing import Message
from helpers import Clock, returned_by
from message_model import Entry, MessageStatus, RepositoryUnavailableError
from providers import HANG
from repository_contract import entries, entry, name
from sqlite_file import LOG_LIMIT, SqliteFile, check_file
from sqlite_repository import CUT_PAUSE, SqliteRepository

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus
OURS = f"PRAGMA application_id = {0x534D5350}; PRAGMA user_version = "
# As version 0.1 made it.
SCHEMA_1 = (
    "CREATE TABLE message (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, accepted_at REAL NOT"
    f" NULL, final_at REAL, phone_number TEXT, content TEXT, fingerprint BLOB); {OURS} 1"
)


def run(path: Path, script: str) -> list[tuple[object, ...]]:
    """What the last statement of an SQL script finds."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in script.split("; ")][-1]


def contents(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in directory.iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sms.db"


# Opening


def test_only_the_owner_can_read_any_of_its_files(path: Path) -> None:
    umask = os.umask(0)
    try:
        with contextlib.closing(SqliteFile(str(path))):
            modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    finally:
        os.umask(umask)
    assert modes.keys() >= {"sms.db", "sms.db-wal", "sms.db.lock"}
    assert set(modes.values()) == {0o600}


def test_each_commit_is_synced_to_the_disk(path: Path) -> None:
    with contextlib.closing(SqliteFile(str(path))) as file:
        names = ("journal_mode", "synchronous", "fullfsync")
        settings = [file.writer.execute(f"PRAGMA {each}").fetchone() for each in names]
    assert settings == [("wal",), (2,), (1,)]


def test_a_file_in_use_is_refused_by_any_name_until_it_is_closed(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with contextlib.closing(SqliteFile(str(path))):
        for used in (path, link):
            with pytest.raises(RepositoryUnavailableError, match=f"^{path}: another process uses it$"):
                SqliteFile(str(used))
    SqliteFile(str(link)).close()


def test_a_file_that_somebody_writes_to_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlite_file.BUSY_TIMEOUT", 0.01)
    SqliteFile(str(path)).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RepositoryUnavailableError, match=f"^{path}: .*locked"):
            SqliteFile(str(path))
    SqliteFile(str(path)).close()


def test_a_lock_file_that_is_something_else_is_refused_before_anything_is_made(path: Path) -> None:
    Path(f"{path}.lock").write_bytes(b"not a lock file" * 100)
    with pytest.raises(RepositoryUnavailableError, match=f"^{path}: cannot be locked: .*not a database"):
        SqliteFile(str(path))
    assert not path.exists()


NOT_OURS: dict[str, list[str | bytes]] = {  # by what is said of it
    "the database belongs to something else": [
        "CREATE TABLE customer (name); INSERT INTO customer VALUES ('Ann')",
        "CREATE TABLE message (id, status)",
        "CREATE TABLE other (name); PRAGMA user_version = 1",
        "PRAGMA application_id = 7",
        "PRAGMA user_version = 1",
    ],
    "file is not a database": [b"Dear diary", b"SQLite format 3\0" + b"\xa5" * 8_000],
    "schema version 3 is newer than this program": [f"{OURS} 3"],
    "a development version of 0.2.0 made the database": [
        f"CREATE TABLE outbox (seq INTEGER PRIMARY KEY, id TEXT, accepted_at REAL, content TEXT); {OURS} 2"
    ],
}


@pytest.mark.parametrize("look", [SqliteFile, check_file])
@pytest.mark.parametrize(("content", "reason"), [(each, reason) for reason in NOT_OURS for each in NOT_OURS[reason]])
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_was(
    look: Callable[[str], object], path: Path, content: str | bytes, reason: str
) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        run(path, content)
    before = path.read_bytes()
    for _ in range(2):  # a refusal keeps no lock
        with pytest.raises(RepositoryUnavailableError, match=f"^{path}: {reason}"):
            look(str(path))
    assert path.read_bytes() == before
    assert contents(path.parent).keys() <= {"sms.db", "sms.db.lock"}


@pytest.mark.parametrize("look", [SqliteFile, check_file])
@pytest.mark.parametrize(
    ("where", "why"), [(".", "is a directory"), ("nowhere/sms.db", "the directory does not exist")]
)
def test_a_path_where_no_file_can_be_is_refused_by_its_own_name(
    look: Callable[[str], object], path: Path, where: str, why: str
) -> None:
    wanted = os.path.realpath(path.parent / where)
    with pytest.raises(RepositoryUnavailableError, match=f"^{wanted}: {why}$"):
        look(str(path.parent / where))
    assert not os.path.exists(f"{wanted}.lock")


@pytest.mark.parametrize("look", [SqliteFile, check_file])
@pytest.mark.parametrize(
    "meant", ["mysql://shop:secret@db/sms", "host=db dbname=secret", "dbname = secret", "PASSWORD=secret"]
)
def test_the_address_of_a_database_elsewhere_makes_no_file_and_is_not_repeated(
    look: Callable[[str], object], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RepositoryUnavailableError, match="neither a path nor a URL") as refused:
        look(meant)
    assert "secret" not in str(refused.value)
    assert contents(tmp_path) == {}


# Checking


def test_a_check_makes_no_file(path: Path) -> None:
    check_file(str(path))
    assert contents(path.parent) == {}


def test_a_check_fails_for_a_file_that_may_not_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    monkeypatch.setattr(os, "access", lambda *args: False)  # what the system says to anybody but root
    with pytest.raises(RepositoryUnavailableError, match=f"^{path}: cannot be read and written"):
        check_file(str(path))


@pytest.mark.parametrize("state", ["empty", "of version 0.1", "closed", "in use", "left by a crash"])
def test_a_check_changes_nothing(path: Path, state: str) -> None:
    with contextlib.ExitStack() as stack:
        if state == "empty":
            path.touch()
        elif state == "of version 0.1":
            run(path, SCHEMA_1)
        else:
            repository = stack.enter_context(contextlib.closing(SqliteRepository(str(path))))
            repository.save(name(1))
            if state == "closed":
                repository.close()
            elif state == "left by a crash":  # with a log that nobody has copied into the database
                (path.parent / "crashed").mkdir()
                for suffix in ("", "-wal"):
                    shutil.copy(f"{path}{suffix}", path.parent / "crashed")
                path = path.parent / "crashed" / path.name
        before = contents(path.parent)
        check_file(str(path))
        after = contents(path.parent)
    for index in (before, after):  # of a log; SQLite makes it anew whenever it reads one
        index.pop("sms.db-shm", None)
    assert after == before


# Converting


def test_a_file_of_version_0_1_is_taken_over_with_all_it_holds(path: Path) -> None:
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
    clock = Clock(50.0)
    with contextlib.closing(SqliteRepository(str(path), 39.0, wall_clock=clock, clock=clock)) as repository:
        found = {row[0]: repository.get(row[0]).value for row in rows}
        assert found == {row[0]: "NOT_FOUND" if row[0] == "m" else row[1] for row in rows}, "m is 39 s old"
        assert (repository.ages(), repository.backlog()) == ((40.0, 40.0), 2)
        batch = repository.claim(5, 0.0).batch
        assert batch is not None, "they are due at once"
        assert [each.message for each in batch.entries] == [
            Message("48999", "secret text", "z"), Message("48998", "b\0", "a"),
        ]  # fmt: skip
        known = repository.save_all([Entry(Message("48", "x", each)) for each in ("z", "d", "new")])
        assert [getattr(error, "fingerprint", None) for error in known] == [b"mark", b"other", None]
        repository.handed_over(batch)
        assert repository.backlog() == 1
    assert b"secret text" not in path.read_bytes()


def test_a_conversion_that_fails_changes_nothing(path: Path) -> None:
    run(path, SCHEMA_1.replace("final_at", "lost"))
    before = run(path, "SELECT sql FROM sqlite_master")
    with pytest.raises(RepositoryUnavailableError, match="final_at"):
        SqliteFile(str(path))
    assert run(path, "SELECT sql FROM sqlite_master") == before
    assert run(path, "PRAGMA user_version") == [(1,)]


# The write-ahead log


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Someone reads the file as it is now, until the block ends: a backup, or an operator's shell."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM message").fetchone()
        yield


def send(repository: SqliteRepository, number: int) -> None:
    """Accepts 100 long messages and hands them over, which erases them."""
    new = [entry(100 * number + each, f"<secret {each}>" + "x" * 1_500) for each in range(100)]
    assert repository.save_all(new) == [None] * 100
    batch = repository.claim(100, 0.0).batch
    assert batch is not None
    repository.handed_over(batch)


def log_size(path: Path) -> int:
    return os.path.getsize(f"{path}-wal")


def test_after_a_long_reader_the_next_housekeeping_empties_the_log(path: Path) -> None:
    clock = Clock()
    with contextlib.closing(SqliteRepository(str(path), 0.0, clock=clock)) as repository:
        with reading(path):
            for number in range(60):
                send(repository, number)
            size = log_size(path)
            assert size > LOG_LIMIT
            assert repository.forget() == CUT_PAUSE, "it is tried again"
            assert log_size(path) == size, "somebody reads it"
            assert not repository._file.copy_log(), "so writers are not held up to copy the rest"
        assert repository.forget() == CUT_PAUSE, "not too often"
        clock.advance(CUT_PAUSE)
        assert repository.forget() is None
        assert log_size(path) == 0
        left = b"".join(contents(path.parent).values())
        assert (b"<secret" in left, b"48123456789" in left) == (False, False)
        send(repository, 100)
        assert repository.get(name(10_000)) is ACCEPTED


def test_after_a_long_reader_the_log_gets_short_by_what_is_written(path: Path) -> None:
    with contextlib.closing(SqliteRepository(str(path))) as repository:
        with reading(path):
            for number in range(60):
                send(repository, number)
            assert log_size(path) > LOG_LIMIT
        for number in range(60, 63):
            send(repository, number)
        assert log_size(path) <= LOG_LIMIT


def test_whoever_reads_the_newest_state_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlite_file.BUSY_TIMEOUT", 10 * HANG)
    clock = Clock()
    with contextlib.closing(SqliteRepository(str(path), 0.0, clock=clock)) as repository:
        with reading(path):
            for number in range(60):
                send(repository, number)
        with reading(path):
            assert returned_by(repository.forget) == CUT_PAUSE
            send(repository, 60)
        clock.advance(CUT_PAUSE)
        assert repository.forget() is None
        assert log_size(path) == 0


def test_a_repository_that_only_keeps_house_leaves_a_short_log_alone(path: Path) -> None:
    with contextlib.closing(SqliteRepository(str(path), 100.0)) as repository:
        repository.save_all(entries(range(10)))
        size = log_size(path)
        assert repository.forget() == pytest.approx(100.0, abs=2.0)
        assert log_size(path) >= size > 0
