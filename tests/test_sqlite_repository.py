"""The durable repository: what it adds to the contract of `test_repositories.py`.

To stop the writer at a chosen step, or to make one fail, these tests reach for its connection: `Held` waits in the
connection's trace callback, which runs in the writer's thread right before a statement.
"""
from __future__ import annotations

import contextlib
import os
import queue
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path
from typing import Any

import pytest

import sqlite_repository
from fastsmsing import FastSmsingError, Message
from helpers import HANG, Gate, Recorder, Scripted
from smsproxy import (
    DuplicateMessageError, IdempotencyError, MessageStatus, OverloadedError, RepositoryUnavailableError, SendMessage,
    SmsProxy, SmsProxyConfig, StatusTransitionError, StatusUpdater, UnknownMessageError, UnknownStatusError,
)  # fmt: skip
from sqlite_repository import SqliteRepository

ROOT = Path(__file__).parent.parent
ACCEPTED, NOT_FOUND = MessageStatus.ACCEPTED, MessageStatus.NOT_FOUND
CONFIRMED, DELIVERED, FAILED = MessageStatus.CONFIRMED, MessageStatus.DELIVERED, MessageStatus.FAILED
NUMBER, TEXT = "48123456789", "Your parcel is here"
LARGE = "x" * 60_000  # characters: more than a database without room can take
WAITS = SmsProxyConfig(batch_size=100, max_delay=None)  # nothing leaves before a stop


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Held:
    """Holds the writer right before its next statement that begins so, until the block ends or `open`."""

    def __init__(self, repository: SqliteRepository, statement: str) -> None:
        self._statement = statement
        self._entered, self._opened = threading.Event(), threading.Event()
        writer(repository).set_trace_callback(self._trace)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.open()

    def wait(self) -> None:
        """Blocks until the writer is there."""
        assert self._entered.wait(HANG), f"the writer never came to {self._statement}"

    def open(self) -> None:
        """Lets the writer go on."""
        self._opened.set()

    def _trace(self, sql: str) -> None:
        if sql.startswith(self._statement):
            self._entered.set()
            self._opened.wait(HANG)


def writer(repository: SqliteRepository) -> sqlite3.Connection:
    """The connection that writes: here, and only here, the tests know how the repository keeps it."""
    return repository._db


def statements(repository: SqliteRepository) -> list[str]:
    """The first words of all that the writer executes from now on."""
    words: list[str] = []
    writer(repository).set_trace_callback(lambda sql: words.append(sql.split(None, 1)[0]))
    return words


def message(message_id: str, text: str = TEXT) -> Message:
    return Message(NUMBER, text, message_id)


def outbox(repository: SqliteRepository) -> list[str]:
    """The IDs in the outbox, in order."""
    return [each.message_id for _, each in repository.outbox()]


def settle(futures: list[Future[None]]) -> list[BaseException | None]:
    """Waits for all and returns their errors."""
    assert not wait_for_futures(futures, HANG).not_done, "a caller hangs"
    return [future.exception() for future in futures]


def later(repository: SqliteRepository, *ids: Any) -> list[Future[None]]:
    return [repository.save_later(message_id, message(message_id), None) for message_id in ids]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sms.db")


@contextlib.contextmanager
def opened(path: str, *args: Any, **options: Any) -> Iterator[SqliteRepository]:
    with contextlib.closing(SqliteRepository(path, *args, **options)) as repository:
        yield repository


@pytest.fixture
def repository(path: str) -> Iterator[SqliteRepository]:
    with opened(path) as repository:
        yield repository


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repositories made from now on wait 10 ms for a lock that someone else holds."""
    monkeypatch.setattr(sqlite_repository, "BUSY_TIMEOUT", 0.01)


class TestOpening:
    def test_every_commit_is_synced_to_a_write_ahead_log(self, repository: SqliteRepository) -> None:
        pragmas = ("synchronous", "journal_mode", "secure_delete")
        found = [writer(repository).execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas]
        assert found == [2, "wal", 1]

    def test_the_file_tells_whose_it_is_and_its_schema_version(self, path: str) -> None:
        with opened(path):
            pass
        with contextlib.closing(sqlite3.connect(path)) as db:
            found = [db.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in ("application_id", "user_version")]
        assert found == [int.from_bytes(b"SMSP", "big"), len(sqlite_repository.MIGRATIONS)]

    def test_an_older_schema_is_migrated_in_place(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with opened(path) as repository:
            repository.save("a", message("a"))
        newer = (*sqlite_repository.MIGRATIONS, "ALTER TABLE message ADD COLUMN extra; CREATE TABLE added (x);")
        monkeypatch.setattr(sqlite_repository, "MIGRATIONS", newer)
        with opened(path) as repository:
            assert outbox(repository) == ["a"]
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone()[0] == len(newer)
            assert db.execute("SELECT id, extra FROM message, (SELECT count(*) FROM added)").fetchall() == [("a", None)]

    def test_a_migration_that_fails_changes_nothing(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with opened(path) as repository:
            repository.save("a", message("a"))
        with monkeypatch.context() as broken:
            scripts = (*sqlite_repository.MIGRATIONS, "CREATE TABLE added (x); NONSENSE;")
            broken.setattr(sqlite_repository, "MIGRATIONS", scripts)
            with pytest.raises(RepositoryUnavailableError, match="NONSENSE"):
                SqliteRepository(path)
        with contextlib.closing(sqlite3.connect(path)) as db:
            tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert tables == ["message"]
        with opened(path) as repository:
            assert outbox(repository) == ["a"]

    def test_a_newer_schema_is_refused_and_left_alone(self, path: str) -> None:
        with opened(path):
            pass
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute(f"PRAGMA user_version = {len(sqlite_repository.MIGRATIONS) + 1}")
        before = Path(path).read_bytes()
        with pytest.raises(RepositoryUnavailableError, match="newer"):
            SqliteRepository(path)
        assert Path(path).read_bytes() == before

    @pytest.mark.parametrize(
        "script",
        [
            "CREATE TABLE customer (name); INSERT INTO customer VALUES ('Ann');",
            "CREATE TABLE message (id, status);",
            "CREATE TABLE customer (name); PRAGMA user_version = 1;",
            "PRAGMA application_id = 77;",
            "PRAGMA user_version = 1;",
        ],
    )
    def test_a_foreign_database_is_refused_and_left_byte_for_byte(self, path: str, script: str) -> None:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(script)
        before = Path(path).read_bytes()
        assert before
        with pytest.raises(RepositoryUnavailableError, match="belongs to something else"):
            SqliteRepository(path)
        assert Path(path).read_bytes() == before
        assert not os.path.exists(path + "-wal")

    @pytest.mark.parametrize("content", [b"Dear diary", b"\0" * 5_000, b"SQLite format 3\0" + b"\xa5" * 8_000])
    def test_a_file_that_is_no_database_is_refused_and_left_alone(self, path: str, content: bytes) -> None:
        Path(path).write_bytes(content)
        with pytest.raises(RepositoryUnavailableError, match="not a database"):
            SqliteRepository(path)
        assert Path(path).read_bytes() == content

    @pytest.mark.parametrize("damage", ["cut short", "overwritten"])
    def test_a_damaged_database_is_refused(self, path: str, damage: str) -> None:
        with opened(path) as repository:
            settle([repository.save_later(f"{number}", message(f"{number}", LARGE), None) for number in range(20)])
        if damage == "cut short":
            os.truncate(path, 4096 * 3)
        else:
            with open(path, "r+b") as file:
                file.seek(4096)
                file.write(b"\xa5" * 4096 * 10)
        with pytest.raises(RepositoryUnavailableError, match="malformed"):
            with opened(path) as repository:
                repository.outbox()

    def test_a_second_instance_is_refused_until_the_first_is_closed(self, path: str) -> None:
        with opened(path) as first:
            with pytest.raises(RepositoryUnavailableError, match="another process uses it"):
                SqliteRepository(path)
            first.save("a")
        with opened(path) as second:
            assert second.get("a") == ACCEPTED

    def test_another_name_of_the_same_file_is_refused_too(
        self, path: str, tmp_path: Path, repository: SqliteRepository
    ) -> None:
        (tmp_path / "link.db").symlink_to(path)
        with pytest.raises(RepositoryUnavailableError, match="another process uses it"):
            SqliteRepository(str(tmp_path / "link.db"))

    def test_a_second_process_is_refused_until_the_first_is_killed(self, path: str) -> None:
        script = (
            "import sys; from sqlite_repository import SqliteRepository\n"
            "SqliteRepository(sys.argv[1]).save('a'); print('saved', flush=True); sys.stdin.read()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT, **pipes) as first:  # type: ignore[call-overload]
            assert first.stdout.readline() == b"saved\n" or first.stdout.readline() == b"saved\r\n"
            with pytest.raises(RepositoryUnavailableError, match="another process uses it"):
                SqliteRepository(path)
            first.kill()
        with opened(path) as repository:
            assert repository.get("a") == ACCEPTED

    def test_a_missing_directory_is_refused_until_it_is_there(self, tmp_path: Path) -> None:
        path = tmp_path / "not yet" / "sms.db"
        with pytest.raises(RepositoryUnavailableError, match="unable to open") as caught:
            SqliteRepository(str(path))
        assert str(path) in str(caught.value)
        path.parent.mkdir()
        with opened(str(path)) as repository:
            repository.save("a")
            assert repository.get("a") == ACCEPTED

    def test_a_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RepositoryUnavailableError, match="unable to open"):
            SqliteRepository(str(tmp_path))

    def test_a_lock_that_cannot_be_taken_is_refused_with_its_reason(self, path: str) -> None:
        Path(path + ".lock").write_bytes(b"not a lock file" * 100)
        with pytest.raises(RepositoryUnavailableError, match="not a database"):
            SqliteRepository(path)
        assert not os.path.exists(path)

    def test_a_file_that_someone_else_is_writing_is_refused(self, path: str, impatient: None) -> None:
        with opened(path):
            pass
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(RepositoryUnavailableError, match="locked"):
                SqliteRepository(path)
        with opened(path) as repository:
            repository.save("a")

    def test_a_refusal_leaves_no_thread_and_no_lock(self, path: str) -> None:
        before = threading.active_count()
        Path(path).write_bytes(b"Dear diary")
        for _ in range(3):
            with pytest.raises(RepositoryUnavailableError, match="not a database"):
                SqliteRepository(path)
        assert threading.active_count() == before

    @pytest.mark.parametrize("kind", ["a text", "a directory", "in use"])
    def test_the_command_says_so_in_one_line_and_exits_with_1(self, path: str, kind: str) -> None:
        with contextlib.ExitStack() as undo:
            if kind == "in use":
                undo.enter_context(opened(path))
            elif kind == "a text":
                Path(path).write_text("Dear diary")
            else:
                os.mkdir(path)
            command = [sys.executable, "main.py", "--port", "0", "--log-level", "error", "--db", path]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
        reason = {"a text": "not a database", "a directory": "unable to open", "in use": "another process uses it"}[kind]
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"main.py: error: cannot start: {path}: ")
        assert reason in done.stderr


class TestPersistence:
    def test_statuses_survive_a_restart(self, path: str) -> None:
        with opened(path) as repository:
            for message_id, status in (("a", None), ("b", CONFIRMED), ("c", FAILED), ("d", DELIVERED)):
                repository.save(message_id, message(message_id))
                if status is not None:
                    repository.update(message_id, status)
        with opened(path) as repository:
            found = [repository.get(message_id) for message_id in "abcde"]
            assert found == [ACCEPTED, CONFIRMED, FAILED, DELIVERED, NOT_FOUND]

    def test_the_table_of_transitions_holds_over_a_restart(self, path: str) -> None:
        with opened(path) as repository:
            repository.save("a")
            repository.update("a", DELIVERED)
        with opened(path) as repository:
            with pytest.raises(StatusTransitionError):
                repository.update("a", FAILED)
            assert repository.get("a") == DELIVERED

    def test_fingerprints_survive_a_restart(self, path: str) -> None:
        with opened(path) as repository:
            repository.save("a", message("a"), b"\0mark")
        with opened(path) as repository:
            with pytest.raises(DuplicateMessageError) as caught:
                repository.save("a", message("a"), b"other")
            assert caught.value.fingerprint == b"\0mark"

    @pytest.mark.parametrize("text", ["Zażółć gęślą jaźń \U0001f4e6", "a\0b", "\ufeff\u2028", "x" * 65_000, "'\";--"])
    def test_a_text_survives_unchanged(self, path: str, text: str) -> None:
        with opened(path) as repository:
            repository.save("a", message("a", text))
        with opened(path) as repository:
            assert [each for _, each in repository.outbox()] == [message("a", text)]

    def test_what_is_acknowledged_is_seen_by_everybody(self, path: str, repository: SqliteRepository) -> None:
        repository.save("a", message("a"))
        with contextlib.closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT id FROM message").fetchall() == [("a",)]

    def test_nothing_is_acknowledged_before_it_is_committed(self, path: str, repository: SqliteRepository) -> None:
        with Held(repository, "COMMIT") as held:
            [future] = later(repository, "a")
            held.wait()
            assert (future.done(), repository.get("a")) == (False, NOT_FOUND)
        assert (settle([future]), repository.get("a")) == ([None], ACCEPTED)


class TestOutbox:
    def test_it_is_in_order_of_acceptance(self, repository: SqliteRepository) -> None:
        ids = ["z", "a", "m", "0", "Z"]
        settle(later(repository, *ids))
        assert outbox(repository) == ids

    def test_the_order_survives_restarts_and_gaps(self, path: str) -> None:
        with opened(path) as repository:
            settle(later(repository, "3", "2", "1"))
            repository.handed_over(["2"])
        with opened(path) as repository:
            settle(later(repository, "0", "2b"))
        with opened(path) as repository:
            assert outbox(repository) == ["3", "1", "0", "2b"]

    def test_it_tells_when_a_message_was_accepted(self, path: str) -> None:
        clock = Clock(5.25)
        with opened(path, clock=clock) as repository:
            repository.save("a", message("a"))
            clock.now = 7.5
            repository.save("b", message("b", "other"))
            assert list(repository.outbox()) == [(5.25, message("a")), (7.5, message("b", "other"))]

    def test_a_message_handed_over_leaves_it_and_keeps_its_status(self, repository: SqliteRepository) -> None:
        settle(later(repository, "a", "b", "c"))
        repository.handed_over(["c", "a"])
        assert (outbox(repository), repository.get("a")) == (["b"], ACCEPTED)

    @pytest.mark.parametrize("status", [CONFIRMED, FAILED, DELIVERED])
    def test_a_message_that_is_more_than_accepted_leaves_it(
        self, repository: SqliteRepository, status: MessageStatus
    ) -> None:
        settle(later(repository, "a", "b"))
        repository.update("a", status)
        assert outbox(repository) == ["b"]

    def test_a_refused_update_leaves_it_alone(self, repository: SqliteRepository) -> None:
        settle(later(repository, "a"))
        with pytest.raises(StatusTransitionError):
            repository.update("a", ACCEPTED)
        assert outbox(repository) == ["a"]

    def test_a_message_handed_over_can_still_be_followed(self, repository: SqliteRepository) -> None:
        settle(later(repository, "a"))
        repository.handed_over(["a"])
        repository.update("a", CONFIRMED)
        repository.handed_over(["a"])
        repository.update("a", DELIVERED)
        assert (repository.get("a"), outbox(repository)) == (DELIVERED, [])

    def test_handing_over_an_unknown_id_or_none_at_all_does_nothing(self, repository: SqliteRepository) -> None:
        settle(later(repository, "a"))
        repository.handed_over(["b"])
        repository.handed_over([])
        assert (outbox(repository), repository.get("b")) == (["a"], NOT_FOUND)

    def test_an_id_saved_without_a_message_is_not_in_it(self, repository: SqliteRepository) -> None:
        repository.save("a")
        assert outbox(repository) == []

    @pytest.mark.parametrize("how", ["handed over", CONFIRMED, FAILED, DELIVERED])
    @pytest.mark.parametrize("length", [1, 10_000])
    def test_number_and_text_of_what_left_it_are_overwritten(self, path: str, how: object, length: int) -> None:
        with opened(path) as repository:
            for number in range(20):
                repository.save(f"{number}", Message(f"4800000{number:04}", f"<{number:04}" * length, f"{number}"))
            gone = [f"{number}" for number in range(20) if number % 5]
            if isinstance(how, MessageStatus):
                repository.update_all(dict.fromkeys(gone, how))
            else:
                repository.handed_over(gone)
        raw = Path(path).read_bytes()
        assert not os.path.exists(path + "-wal")
        found = [(f"4800000{number:04}".encode() in raw, f"<{number:04}".encode() in raw) for number in range(20)]
        assert found == [(number % 5 == 0,) * 2 for number in range(20)]


class TestGroups:
    def test_all_that_waits_is_committed_at_once(self, repository: SqliteRepository) -> None:
        with Held(repository, "COMMIT") as held:
            first = later(repository, "first")
            held.wait()
            rest = later(repository, *(f"{number}" for number in range(50)))
            words: list[str] = []
            held._trace = lambda sql: None  # type: ignore[method-assign]
            held.open()
            settle(first)
        words = statements(repository)
        assert settle(rest) == [None] * 50
        assert outbox(repository) == ["first", *(f"{number}" for number in range(50))]
        assert words.count("COMMIT") <= 1

    def test_a_group_has_a_largest_size(self, repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite_repository, "GROUP", 10)
        assert True
