"""The durable repository: what it adds to the contract of `test_repositories.py`.

To stop the writer at a chosen step, or to make one fail, these tests reach for its connection: `Held` waits in the
connection's trace callback, which runs in the writer's thread right before a statement.
"""
from __future__ import annotations

import contextlib
import functools
import os
import queue
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class Broken(dict[str, MessageStatus]):
    """Updates that cannot be read."""

    def items(self) -> Any:
        raise RuntimeError("broken mapping")


class Held:
    """Holds the writer right before its next statement that begins so, until the block ends or `open`.

    `words` has the first word of every statement that it executes, before and after that.
    """

    def __init__(self, repository: SqliteRepository, statement: str) -> None:
        self.words: list[str] = []
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
        self.words.append(sql.split(None, 1)[0])
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


def settle(futures: list[Future[Any]]) -> list[BaseException | None]:
    """Waits for all and returns their errors."""
    assert not wait_for_futures(futures, HANG).not_done, "a caller hangs"
    return [future.exception() for future in futures]


def queued(repository: SqliteRepository, *calls: Callable[[], Any]) -> list[Future[Any]]:
    """Runs each call in a thread of its own, the next one once this one waits for the writer or was refused."""
    submit, waiting, futures = repository._submit, threading.Semaphore(0), list[Future[Any]]()

    def submitted(change: Any) -> Future[Any]:
        try:
            return submit(change)
        finally:
            waiting.release()

    def run(call: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "_submit", submitted)
        for call in calls:
            futures.append(Future())
            threading.Thread(target=run, args=(call, futures[-1]), daemon=True).start()
            assert waiting.acquire(timeout=HANG), "the call never came to the writer"
    return futures


def later(repository: SqliteRepository, *ids: Any, text: str = TEXT) -> list[Future[Any]]:
    """Saves in this order, without waiting for the disk."""
    return queued(repository, *(functools.partial(repository.save, each, message(each, text)) for each in ids))


def group(*ids: Any, text: str = TEXT) -> list[tuple[Message, bytes | None]]:
    """Messages for `save_all`; the fingerprint of each one tells its place."""
    return [(message(each, text), f"{place}".encode()) for place, each in enumerate(ids)]


def kinds(errors: Iterable[BaseException | None]) -> list[type[BaseException] | None]:
    return [None if error is None else type(error) for error in errors]


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive(), f"{thread.name} was left behind"


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
            settle(later(repository, *(f"{number}" for number in range(20)), text=LARGE))
        if damage == "cut short":
            os.truncate(path, 4096 * 3)
        else:
            with open(path, "r+b") as file:
                file.seek(4096)
                file.write(b"\xa5" * 4096 * 10)
        with pytest.raises(RepositoryUnavailableError, match="malformed"), opened(path) as repository:
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
        command = [sys.executable, "-c", script, path]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None
            assert first.stdout.readline() == "saved\n"
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

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [("a text", "not a database"), ("a directory", "unable to open"), ("in use", "another process uses it")],
    )
    def test_the_command_says_so_in_one_line_and_exits_with_1(self, path: str, kind: str, reason: str) -> None:
        with contextlib.ExitStack() as undo:
            if kind == "in use":
                undo.enter_context(opened(path))
            elif kind == "a text":
                Path(path).write_text("Dear diary")
            else:
                os.mkdir(path)
            command = [sys.executable, "main.py", "--port", "0", "--log-level", "error", "--db", path]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
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

    @pytest.mark.parametrize("text", ["Zażółć gęślą \U0001f4e6", "a\0b", "\ufeff\u2028", "x" * 65_000, "'\";--"])
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
        ids = [f"{number}" for number in range(50)]
        with Held(repository, "COMMIT") as held:
            first = later(repository, "first")
            held.wait()
            rest = later(repository, *ids)
        assert settle(first + rest) == [None] * 51
        assert (held.words.count("COMMIT"), outbox(repository)) == (2, ["first", *ids])

    def test_a_group_has_a_largest_size(self, repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite_repository, "GROUP", 10)
        with Held(repository, "COMMIT") as held:
            first = later(repository, "first")
            held.wait()
            rest = later(repository, *(f"{number}" for number in range(45)))
        assert settle(first + rest) == [None] * 46
        assert held.words.count("COMMIT") == 1 + 5

    def test_the_updates_of_one_mapping_are_one_transaction(self, repository: SqliteRepository) -> None:
        settle(later(repository, *(f"{number}" for number in range(100))))
        words = statements(repository)
        assert repository.update_all({f"{number}": CONFIRMED for number in range(100)}) == {}
        assert (words.count("UPDATE"), words.count("BEGIN"), words.count("COMMIT")) == (100, 1, 1)

    def test_a_mapping_tells_which_updates_were_refused_and_applies_the_rest(
        self, repository: SqliteRepository
    ) -> None:
        for message_id in "abc":
            repository.save(message_id)
        repository.update("b", FAILED)
        refused = repository.update_all({"a": CONFIRMED, "b": DELIVERED, "x": CONFIRMED, "c": DELIVERED})
        found = {message_id: type(error) for message_id, error in refused.items()}
        assert found == {"b": StatusTransitionError, "x": UnknownMessageError}
        assert [repository.get(message_id) for message_id in "abcx"] == [CONFIRMED, FAILED, DELIVERED, NOT_FOUND]

    def test_an_empty_mapping_is_no_error(self, repository: SqliteRepository) -> None:
        assert repository.update_all({}) == {}

    def test_the_parts_of_a_group_are_in_the_order_of_the_calls(self, repository: SqliteRepository) -> None:
        with Held(repository, "COMMIT") as held, ThreadPoolExecutor(1) as pool:
            futures = later(repository, "first")
            held.wait()
            futures += later(repository, "a", "a")
            held.open()
            [_, won, lost] = settle(futures)
            assert pool.submit(repository.update, "a", CONFIRMED).result(HANG) is None
        assert (won, type(lost), repository.get("a")) == (None, DuplicateMessageError, CONFIRMED)

    @pytest.mark.parametrize("bad", [object(), None, "\ud800", 2**70], ids=["object", "none", "surrogate", "giant"])
    def test_one_bad_row_fails_only_its_own_caller(self, repository: SqliteRepository, bad: Any) -> None:
        with Held(repository, "COMMIT") as held:
            first = later(repository, "first")
            held.wait()
            rest = later(repository, "a", bad, "b", bad, "first", "c")
        failed = [type(error) for error in settle(first + rest) if error is not None]
        assert failed[2] is DuplicateMessageError
        assert all(not issubclass(kind, RepositoryUnavailableError) for kind in failed)
        assert (len(failed), outbox(repository)) == (3, ["first", "a", "b", "c"])
        assert held.words.count("COMMIT") == 2

    def test_a_duplicate_does_not_disturb_its_group(self, repository: SqliteRepository) -> None:
        with Held(repository, "COMMIT") as held:
            first = later(repository, "first")
            held.wait()
            rest = later(repository, "a", "first", "b")
        assert kinds(settle(first + rest)) == [None, None, DuplicateMessageError, None]
        assert (held.words.count("BEGIN"), outbox(repository)) == (2, ["first", "a", "b"])

    @pytest.mark.parametrize("bad", ["\ud800", ("x",), 2**70], ids=["surrogate", "tuple", "giant"])
    def test_one_unusable_id_in_a_delivery_report_costs_only_itself(
        self, repository: SqliteRepository, bad: Any
    ) -> None:
        settle(later(repository, "a", "b"))
        updater = StatusUpdater(repository)
        updater.start()
        updater.updates.put({"a": "CONFIRMED", bad: "CONFIRMED", "b": "DELIVERED"})
        assert updater.stop(HANG)
        assert (repository.get("a"), repository.get("b")) == (CONFIRMED, DELIVERED)
        errors = [updater.errors.get_nowait() for _ in range(updater.errors.qsize())]
        assert [error.message_id for error in errors if error is not None] == [bad]

    def test_a_delivery_report_is_applied_but_for_what_cannot_be(self, repository: SqliteRepository) -> None:
        settle(later(repository, "a", "b"))
        updater = StatusUpdater(repository)
        updater.start()
        words = statements(repository)
        updater.updates.put({"a": "CONFIRMED", "x": "CONFIRMED", "b": "EATEN"})
        assert updater.stop(HANG)
        errors = [updater.errors.get_nowait() for _ in range(updater.errors.qsize())]
        found = {error.message_id: type(error.error) for error in errors if error is not None}
        assert found == {"x": UnknownMessageError, "b": UnknownStatusError}
        assert (repository.get("a"), repository.get("b"), words.count("COMMIT")) == (CONFIRMED, ACCEPTED, 1)

    def test_a_read_does_not_wait_for_the_writer(self, repository: SqliteRepository) -> None:
        repository.save("a", message("a"))
        with Held(repository, "COMMIT") as held:
            [future] = later(repository, "b")
            held.wait()
            found = (repository.get("a"), repository.get("b"), outbox(repository), future.done())
        assert found == (ACCEPTED, NOT_FOUND, ["a"], False)
        settle([future])

    def test_messages_saved_together_are_one_transaction(self, repository: SqliteRepository) -> None:
        words = statements(repository)
        assert repository.save_all(group(*(f"{number}" for number in range(100)))) == [None] * 100
        assert (words.count("INSERT"), words.count("BEGIN"), words.count("COMMIT")) == (100, 1, 1)

    def test_messages_saved_together_are_in_the_outbox_in_their_order(self, repository: SqliteRepository) -> None:
        repository.save_all(group("z", "a", "m"))
        repository.save_all(group("0", "Z"))
        assert outbox(repository) == ["z", "a", "m", "0", "Z"]

    def test_messages_saved_together_keep_numbers_texts_and_the_time(self, path: str) -> None:
        messages = [Message("1", "one", "a"), Message("2", "two", "b")]
        with opened(path, clock=Clock(5.25)) as repository:
            repository.save_all([(each, None) for each in messages])
            assert list(repository.outbox()) == [(5.25, each) for each in messages]

    def test_no_messages_saved_together_are_no_error(self, repository: SqliteRepository) -> None:
        assert repository.save_all([]) == []

    def test_a_duplicate_among_messages_saved_together_costs_only_itself(self, repository: SqliteRepository) -> None:
        repository.save("b", message("b"), b"earlier")
        words = statements(repository)
        errors = repository.save_all(group("a", "b", "c"))
        assert kinds(errors) == [None, DuplicateMessageError, None]
        assert (getattr(errors[1], "message_id", None), getattr(errors[1], "fingerprint", None)) == ("b", b"earlier")
        assert (outbox(repository), words.count("COMMIT")) == (["b", "a", "c"], 1)

    @pytest.mark.parametrize(
        "bad",
        [
            (NUMBER, TEXT, object()), (NUMBER, TEXT, "\ud800"), (NUMBER, TEXT, 2**70), (NUMBER, "\ud800", "x"),
            (object(), TEXT, "x"),
        ],
        ids=["object", "surrogate", "giant", "text", "number"],
    )  # fmt: skip
    def test_an_unusable_row_among_messages_saved_together_costs_only_itself(
        self, repository: SqliteRepository, bad: tuple[Any, ...]
    ) -> None:
        words = statements(repository)
        errors = repository.save_all([*group("a"), (Message(*bad), None), *group("c")])
        assert (errors[0], isinstance(errors[1], sqlite_repository.UNUSABLE), errors[2]) == (None, True, None)
        assert (outbox(repository), words.count("COMMIT")) == (["a", "c"], 1)

    def test_an_id_given_twice_among_messages_saved_together_is_saved_once(self, repository: SqliteRepository) -> None:
        [won, lost] = repository.save_all([(message("a", "first"), b"1"), (message("a", "second"), b"2")])
        assert (won, type(lost), getattr(lost, "fingerprint", None)) == (None, DuplicateMessageError, b"1")
        assert [each for _, each in repository.outbox()] == [message("a", "first")]

    def test_messages_saved_together_and_others_share_one_commit(self, repository: SqliteRepository) -> None:
        with Held(repository, "COMMIT") as held:
            futures = later(repository, "first")
            held.wait()
            futures += later(repository, "a")
            futures += queued(repository, lambda: repository.save_all(group("b", "a", "c")))
            futures += later(repository, "c", "d")
        assert kinds(settle(futures)) == [None, None, None, DuplicateMessageError, None]
        assert kinds(futures[2].result(HANG)) == [None, DuplicateMessageError, None]
        assert (held.words.count("COMMIT"), outbox(repository)) == (2, ["first", "a", "b", "c", "d"])

    def test_a_change_that_raises_does_not_disturb_messages_saved_together(self, repository: SqliteRepository) -> None:
        with Held(repository, "COMMIT") as held:
            futures = later(repository, "first")
            held.wait()
            futures += queued(
                repository,
                lambda: repository.save_all(group("a", "first")),
                lambda: repository.update_all(Broken(a=CONFIRMED)),
                lambda: repository.save_all(group("b")),
            )
        assert kinds(settle(futures)) == [None, None, RuntimeError, None]
        assert kinds(futures[1].result(HANG)) == [None, DuplicateMessageError]
        assert outbox(repository) == ["first", "a", "b"]


class TestTrouble:
    def refused(self, repository: SqliteRepository, reason: str) -> None:
        """Nothing can be written, nothing is half-written, and reads go on."""
        before = (outbox(repository), repository.get("a"))
        calls: list[Callable[[], object]] = [
            lambda: repository.save("b", message("b", LARGE)),
            lambda: repository.save_all(group("c", "a", "b", text=LARGE)),
        ]
        for call in calls:
            with pytest.raises(RepositoryUnavailableError, match=reason):
                call()
        assert (outbox(repository), repository.get("a")) == before
        assert (repository.get("b"), repository.get("c")) == (NOT_FOUND, NOT_FOUND)

    def works(self, repository: SqliteRepository) -> None:
        repository.save("b", message("b", LARGE))
        repository.update("a", CONFIRMED)
        assert (outbox(repository), repository.get("a")) == (["b"], CONFIRMED)
        repository.check()

    def test_a_lock_of_someone_else_is_told_and_waited_out(self, path: str, impatient: None) -> None:
        with opened(path) as repository, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            repository.save("a", message("a"))
            other.execute("BEGIN IMMEDIATE")
            self.refused(repository, "locked")
            changes: list[Callable[[], object]] = [
                lambda: repository.update("a", CONFIRMED),
                lambda: repository.update_all({"a": CONFIRMED}),
                lambda: repository.handed_over(["a"]),
                repository.check,
            ]
            for change in changes:
                with pytest.raises(RepositoryUnavailableError, match="locked"):
                    change()
            assert (outbox(repository), repository.get("a")) == (["a"], ACCEPTED)
            other.execute("ROLLBACK")
            self.works(repository)

    def test_a_full_disk_is_told_and_the_service_carries_on_with_new_room(self, repository: SqliteRepository) -> None:
        repository.save("a", message("a"))
        pages = writer(repository).execute("PRAGMA page_count").fetchone()[0]
        writer(repository).execute(f"PRAGMA max_page_count = {pages}").fetchone()
        self.refused(repository, "full")
        writer(repository).execute("PRAGMA max_page_count = 1000000").fetchone()
        self.works(repository)

    def test_a_group_that_does_not_fit_is_refused_as_a_whole(self, repository: SqliteRepository) -> None:
        repository.save("a", message("a"))
        pages = writer(repository).execute("PRAGMA page_count").fetchone()[0]
        writer(repository).execute(f"PRAGMA max_page_count = {pages + 5}").fetchone()
        with Held(repository, "COMMIT") as held:
            first = later(repository, "b")
            held.wait()
            rest = later(repository, "c") + later(repository, "d", text=LARGE)
        assert settle(first) == [None]
        assert [type(error) for error in settle(rest)] == [RepositoryUnavailableError] * 2
        assert outbox(repository) == ["a", "b"]
        writer(repository).execute("PRAGMA max_page_count = 1000000").fetchone()
        assert settle(later(repository, "c", "d")) == [None, None]
        assert outbox(repository) == ["a", "b", "c", "d"]

    def test_a_file_that_became_read_only_is_told_and_recovers(self, repository: SqliteRepository) -> None:
        repository.save("a", message("a"))
        writer(repository).execute("PRAGMA query_only = ON")
        self.refused(repository, "readonly")
        with pytest.raises(RepositoryUnavailableError, match="readonly"):
            repository.check()
        writer(repository).execute("PRAGMA query_only = OFF")
        self.works(repository)

    def test_a_commit_that_fails_leaves_nothing_behind(self, repository: SqliteRepository) -> None:
        repository.save("a", message("a"))
        writer(repository).set_authorizer(
            lambda action, first, *rest: sqlite3.SQLITE_DENY
            if (action, first) == (sqlite3.SQLITE_TRANSACTION, "COMMIT")
            else sqlite3.SQLITE_OK
        )
        self.refused(repository, "not authorized")
        writer(repository).set_authorizer(lambda *args: sqlite3.SQLITE_OK)
        self.works(repository)

    def test_the_proxy_waits_for_the_repository_before_it_goes_on(self, repository: SqliteRepository) -> None:
        client = Gate()
        with SmsProxy(client, SmsProxyConfig(batch_size=1), repository=repository) as proxy:
            message_id = proxy.send(SendMessage(NUMBER, TEXT)).id
            client.wait_entered()
            writer(repository).execute("PRAGMA query_only = ON")
            client.opened.set()
            client.wait_for(bool)
            client.report({message_id: "DELIVERED"})
            with pytest.raises(RepositoryUnavailableError):
                proxy.send(SendMessage(NUMBER, TEXT))
            assert (outbox(repository), proxy.get_status(message_id)) == ([message_id], ACCEPTED)
            writer(repository).execute("PRAGMA query_only = OFF")
        assert (client.ids, outbox(repository), repository.get(message_id)) == ([message_id], [], DELIVERED)

    def test_health_tells_what_is_wrong_with_the_file(self, path: str, impatient: None) -> None:
        with opened(path) as repository, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            with SmsProxy(Recorder(), repository=repository) as proxy:
                assert proxy.health() == []
                other.execute("BEGIN IMMEDIATE")
                assert ["locked" in reason for reason in proxy.health()] == [True]
                other.execute("ROLLBACK")
                assert proxy.health() == []

    def test_health_tells_of_a_writer_that_does_not_answer(
        self, repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_repository, "BUSY_TIMEOUT", 0.01)
        with SmsProxy(Recorder(), repository=repository) as proxy, Held(repository, "COMMIT") as held:
            later(repository, "a")
            held.wait()
            assert ["does not answer" in reason for reason in proxy.health()] == [True]

    def test_a_change_that_raises_fails_its_caller_and_nobody_else(self, repository: SqliteRepository) -> None:
        repository.save("a", message("a"))
        with pytest.raises(RuntimeError, match="broken mapping"):
            repository.update_all(Broken(a=CONFIRMED))
        self.works(repository)

    def test_a_clock_that_raises_fails_its_caller_and_nobody_else(self, path: str) -> None:
        clock = Clock()
        broken = threading.Event()

        def read() -> float:
            if broken.is_set():
                raise RuntimeError("broken clock")
            return clock()

        with opened(path, clock=read) as repository:
            repository.save("a", message("a"))
            broken.set()
            with pytest.raises(RuntimeError, match="broken clock"):
                repository.update("a", DELIVERED)
            broken.clear()
            self.works(repository)

    def test_an_error_of_the_writer_itself_does_not_end_it(self, path: str, caplog: pytest.LogCaptureFixture) -> None:
        clock, broken, raised = Clock(), threading.Event(), threading.Event()

        def read() -> float:
            if broken.is_set():
                broken.clear()
                raised.set()
                raise RuntimeError("broken clock")
            return clock()

        with opened(path, clock=read) as repository:
            repository.save("final")
            repository.update("final", DELIVERED)  # now the writer looks at the clock after each group
            with Held(repository, "COMMIT") as held:
                futures = later(repository, "a")
                held.wait()
                broken.set()
            assert (settle(futures), raised.wait(HANG)) == ([None], True)
            assert settle(later(repository, "b")) == [None]
        assert "broken clock" in caplog.text


class TestClosing:
    def test_it_commits_what_waits(self, path: str) -> None:
        repository = SqliteRepository(path)
        with ThreadPoolExecutor(1) as pool, Held(repository, "COMMIT") as held:
            futures = later(repository, "first")
            held.wait()
            futures += later(repository, *(f"{number}" for number in range(20)))
            closing = pool.submit(repository.close)
            held.open()
            closing.result(HANG)
        assert settle(futures) == [None] * 21
        with opened(path) as repository:
            assert outbox(repository) == ["first", *(f"{number}" for number in range(20))]

    def test_every_later_call_is_refused(self, path: str) -> None:
        with opened(path) as repository:
            repository.save("a", message("a"))
        calls: list[Callable[[], object]] = [
            lambda: repository.save("b"),
            lambda: repository.save_all(group("b")),
            lambda: repository.get("a"),
            lambda: repository.update("a", CONFIRMED),
            lambda: repository.update_all({"a": CONFIRMED}),
            lambda: repository.handed_over(["a"]),
            repository.outbox,
            repository.check,
        ]
        for call in calls:
            with pytest.raises(RepositoryUnavailableError, match="closed"):
                call()

    def test_it_can_be_closed_twice(self, path: str) -> None:
        with opened(path) as repository:
            repository.close()
        with opened(path):
            pass

    def test_it_leaves_no_thread_and_one_file(self, path: str, tmp_path: Path) -> None:
        before = threading.active_count()
        with opened(path) as repository:
            repository.save("a")
            repository.get("a")
        assert threading.active_count() == before
        assert {name.name for name in tmp_path.iterdir()} - {"sms.db.lock"} == {"sms.db"}

    def test_a_read_under_way_is_finished(self, path: str) -> None:
        repository = SqliteRepository(path)
        settle(later(repository, *(f"{number}" for number in range(100))))
        start = threading.Barrier(5)

        def read() -> set[MessageStatus]:
            found = set()
            start.wait(HANG)
            with contextlib.suppress(RepositoryUnavailableError):
                for number in range(100):
                    found.add(repository.get(f"{number}"))
            return found

        with ThreadPoolExecutor(4) as pool:
            reads = [pool.submit(read) for _ in range(4)]
            start.wait(HANG)
            repository.close()
            assert all(done.result(HANG) <= {ACCEPTED} for done in reads)

    @pytest.mark.parametrize("together", [1, 5])
    @pytest.mark.parametrize("moment", [1, 20, 100])
    def test_a_caller_is_answered_truly_or_refused_whenever_it_closes(
        self, path: str, together: int, moment: int
    ) -> None:
        repository = SqliteRepository(path)
        acknowledged: queue.Queue[str] = queue.Queue()

        def call(name: int) -> None:
            number = 0
            with contextlib.suppress(RepositoryUnavailableError):
                while True:
                    number += 1
                    ids = [f"{name}-{number}-{place}" for place in range(together)]
                    assert repository.save_all(group(*ids)) == [None] * together
                    for message_id in ids:
                        acknowledged.put(message_id)

        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(call, name) for name in range(8)]
            known = [acknowledged.get(timeout=HANG) for _ in range(moment)]
            repository.close()
            for caller in callers:
                caller.result(HANG)
        known += [acknowledged.get_nowait() for _ in range(acknowledged.qsize())]
        with opened(path) as repository:
            assert sorted(outbox(repository)) == sorted(known)


class TestRetention:
    def finals(self, repository: SqliteRepository, count: int) -> list[str]:
        """Stores so many messages that are delivered."""
        ids = [f"{number}" for number in range(count)]
        settle(later(repository, *ids))
        assert repository.update_all(dict.fromkeys(ids, DELIVERED)) == {}
        return ids

    def test_it_forgets_in_steps_and_accepts_between_them(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_repository, "PURGE_STEP", 10)
        clock = Clock()
        with opened(path, 60.0, clock=clock) as repository:
            ids = self.finals(repository, 35)
            clock.now += 61.0
            with Held(repository, "DELETE") as held:
                repository.save("during")  # wakes the writer, which then begins to forget
                held.wait()
                between = later(repository, "between")
            assert settle(between) == [None]
            for _ in range(4):
                repository.check()
            order = [word for word in held.words if word in ("INSERT", "DELETE")]
            assert order == ["INSERT", "DELETE", "INSERT", "DELETE", "DELETE", "DELETE"]
            assert {repository.get(message_id) for message_id in ids} == {NOT_FOUND}
            assert (repository.get("during"), repository.get("between")) == (ACCEPTED, ACCEPTED)

    def test_it_forgets_while_nobody_calls(self, path: str) -> None:
        with opened(path, 0.05) as repository, Held(repository, "DELETE") as held:
            repository.save("a")
            repository.update("a", DELIVERED)
            held.wait()
            held.open()
            repository.check()
            assert repository.get("a") == NOT_FOUND

    def test_it_forgets_what_became_due_while_it_was_closed(self, path: str) -> None:
        clock = Clock()
        with opened(path, 60.0, clock=clock) as repository:
            self.finals(repository, 3)
        clock.now += 61.0
        with opened(path, 60.0, clock=clock) as repository:
            repository.check()
            repository.check()
            assert {repository.get(f"{number}") for number in range(3)} == {NOT_FOUND}

    def test_the_retention_of_this_run_counts(self, path: str) -> None:
        clock = Clock()
        with opened(path, 0, clock=clock) as repository:
            self.finals(repository, 3)
        clock.now += 61.0
        with opened(path, 120.0, clock=clock) as repository:
            repository.check()
            repository.check()
            assert repository.get("0") == DELIVERED
        with opened(path, 60.0, clock=clock) as repository:
            repository.check()
            repository.check()
            assert repository.get("0") == NOT_FOUND

    def forget_again(self, repository: SqliteRepository, clock: Clock, repair: Callable[[], object]) -> None:
        clock.now += 61.0
        repository.check()
        repository.check()
        assert repository.get("0") == DELIVERED
        repair()
        clock.now += 600.0
        repository.check()
        repository.check()
        assert {repository.get(f"{number}") for number in range(3)} == {NOT_FOUND}

    def test_forgetting_that_fails_is_tried_again(self, path: str) -> None:
        clock = Clock()
        with opened(path, 60.0, clock=clock) as repository:
            self.finals(repository, 3)
            writer(repository).set_authorizer(
                lambda action, *rest: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_DELETE else sqlite3.SQLITE_OK
            )
            self.forget_again(
                repository, clock, lambda: writer(repository).set_authorizer(lambda *args: sqlite3.SQLITE_OK)
            )

    def test_forgetting_whose_commit_fails_is_tried_again(self, path: str) -> None:
        clock = Clock()
        with opened(path, 60.0, clock=clock) as repository:
            self.finals(repository, 3)
            # A deferred constraint is checked, and here broken, by the COMMIT itself.
            writer(repository).executescript(
                """
                CREATE TABLE trap (seq REFERENCES message (seq) DEFERRABLE INITIALLY DEFERRED);
                CREATE TRIGGER spring AFTER DELETE ON message BEGIN INSERT INTO trap VALUES (-1); END;
                PRAGMA foreign_keys = ON;
                """
            )
            self.forget_again(repository, clock, lambda: writer(repository).execute("PRAGMA foreign_keys = OFF"))

    def test_a_confirmed_message_waits_for_its_end(self, path: str) -> None:
        clock = Clock()
        with opened(path, 60.0, clock=clock) as repository:
            settle(later(repository, "a", "b"))
            repository.update("a", CONFIRMED)
            self.finals(repository, 2)
            clock.now += 1e6
            repository.check()
            repository.check()
            assert [repository.get(message_id) for message_id in "ab01"] == [CONFIRMED, ACCEPTED, NOT_FOUND, NOT_FOUND]


class Images:
    """Copies of the database as a crash at that moment would leave it: what was written, and nothing of memory."""

    def __init__(self, path: str, into: Path) -> None:
        self._path, self._into = path, into
        self.taken: list[str] = []

    def take(self) -> None:
        """Takes one more. Files so small are not checkpointed, so a commit meanwhile only adds to the log's end."""
        image = str(self._into / f"image-{len(self.taken)}.db")
        for suffix in ("", "-wal"):
            if os.path.exists(self._path + suffix):
                shutil.copy(self._path + suffix, image + suffix)
        self.taken.append(image)


class Crashing(SqliteRepository):
    """Takes an image at one step."""

    def __init__(self, path: str, step: str, images: Images) -> None:
        super().__init__(path)
        self._step, self._images = step, images

    def save_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
        errors = super().save_all(messages)
        if self._step == "committed":  # nobody else knows yet
            self._images.take()
        return errors

    def handed_over(self, message_ids: Any) -> None:
        ids = list(message_ids)
        if self._step == "before the mark":
            self._images.take()
        super().handed_over(ids)
        if self._step == "after the mark":
            self._images.take()

    def update_all(self, updates: Mapping[str, MessageStatus]) -> Any:
        if self._step == "before the update":
            self._images.take()
        failures = super().update_all(updates)
        if self._step == "after the update":
            self._images.take()
        return failures


class Imaging(Recorder):
    """A provider double that takes an image of each moment before it takes a batch, and after."""

    def __init__(self, images: Images) -> None:
        super().__init__()
        self._images = images

    def send(self, messages: Any) -> None:
        self._images.take()
        super().send(messages)
        self._images.take()


def restart(path: str, config: SmsProxyConfig = WAITS) -> tuple[list[str], dict[str, MessageStatus]]:
    """What a new process hands over, and the statuses after that, of all that the file knows."""
    client = Recorder()
    with opened(path) as repository:
        proxy = SmsProxy(client, config, repository=repository)
        proxy.start()
        assert proxy.stop(HANG) == 0
        assert outbox(repository) == []
    with contextlib.closing(sqlite3.connect(path)) as db:
        statuses = {row[0]: MessageStatus(row[1]) for row in db.execute("SELECT id, status FROM message ORDER BY seq")}
    return client.ids, statuses


class TestCrashes:
    """A failure at each step, through the real proxy: what a new process finds and does."""

    @pytest.fixture
    def images(self, path: str, tmp_path: Path) -> Images:
        return Images(path, tmp_path)

    def run(self, repository: SqliteRepository, client: Recorder, texts: int = 3) -> list[str]:
        """Accepts so many messages, hands them over as one batch, stops cleanly; returns their IDs."""
        proxy = SmsProxy(client, WAITS, repository=repository)
        with contextlib.closing(repository), proxy:
            return [proxy.send(SendMessage(NUMBER, f"{number}")).id for number in range(texts)]

    def test_before_the_commit_nothing_was_promised_and_nothing_is_sent(self, path: str, images: Images) -> None:
        client = Recorder()
        with opened(path) as repository, SmsProxy(client, WAITS, repository=repository) as proxy:
            before = proxy.send(SendMessage(NUMBER, TEXT)).id
            with Held(repository, "COMMIT") as held:
                [answer] = queued(repository, lambda: proxy.send(SendMessage(NUMBER, TEXT)))
                held.wait()
                images.take()
                assert not answer.done()
            after = answer.result(HANG).id
        assert client.ids == [before, after]
        assert restart(images.taken[0]) == ([before], {before: ACCEPTED})

    def test_after_the_commit_it_is_sent_though_nobody_was_told(self, path: str, images: Images) -> None:
        ids = self.run(Crashing(path, "committed", images), Recorder(), texts=1)
        assert restart(images.taken[0]) == (ids, {ids[0]: ACCEPTED})

    def test_before_the_provider_took_it_a_batch_is_sent_once(self, path: str, images: Images) -> None:
        ids = self.run(SqliteRepository(path), Imaging(images))
        assert restart(images.taken[0]) == (ids, dict.fromkeys(ids, ACCEPTED))

    def test_after_the_provider_took_it_a_batch_is_sent_again_under_the_same_ids(
        self, path: str, images: Images
    ) -> None:
        ids = self.run(SqliteRepository(path), Imaging(images))
        assert restart(images.taken[1]) == (ids, dict.fromkeys(ids, ACCEPTED))

    def test_before_the_mark_only_the_batches_under_way_are_sent_again(self, path: str, images: Images) -> None:
        client = Recorder()
        repository = Crashing(path, "before the mark", images)
        config = SmsProxyConfig(batch_size=2, max_delay=None, senders=1)
        with contextlib.closing(repository), SmsProxy(client, config, repository=repository) as proxy:
            ids = [proxy.send(SendMessage(NUMBER, TEXT)).id for _ in range(6)]
        assert client.ids == ids
        # Of the second image: the first batch is marked, the second one is taken and not marked.
        again, statuses = restart(images.taken[1])
        assert again == [message_id for message_id in statuses if message_id not in ids[:2]]
        assert again[:2] == ids[2:4]

    def test_after_the_mark_nothing_is_sent_again(self, path: str, images: Images) -> None:
        ids = self.run(Crashing(path, "after the mark", images), Recorder())
        assert restart(images.taken[0]) == ([], dict.fromkeys(ids, ACCEPTED))

    @pytest.mark.parametrize(("step", "status"), [("before the update", ACCEPTED), ("after the update", DELIVERED)])
    def test_a_report_that_overtakes_the_mark_ends_the_sending_once_it_is_applied(
        self, path: str, images: Images, step: str, status: MessageStatus
    ) -> None:
        applied = threading.Event()

        class Early(Recorder):
            def send(self, messages: Any) -> None:
                super().send(messages)
                self.report({each.message_id: "DELIVERED" for each in messages})
                assert applied.wait(HANG)

        class Watching(Crashing):
            def update_all(self, updates: Mapping[str, MessageStatus]) -> Any:
                failures = super().update_all(updates)
                applied.set()
                return failures

        ids = self.run(Watching(path, step, images), Early())
        again = ids if status is ACCEPTED else []
        assert restart(images.taken[0]) == (again, dict.fromkeys(ids, status))
        assert restart(path) == ([], dict.fromkeys(ids, DELIVERED))

    @pytest.mark.parametrize(("step", "again"), [("before the update", True), ("after the update", False)])
    def test_a_batch_is_given_up_once_that_is_recorded(
        self, path: str, images: Images, step: str, again: bool
    ) -> None:
        client = Scripted(FastSmsingError("no"))
        repository = Crashing(path, step, images)
        config = SmsProxyConfig(batch_size=1, max_attempts=1)
        updated = Held(repository, "UPDATE")
        with contextlib.closing(repository), SmsProxy(client, config, repository=repository) as proxy:
            message_id = proxy.send(SendMessage(NUMBER, TEXT)).id
            updated.wait()
            updated.open()
        assert client.ids == []
        expected = ([message_id], {message_id: ACCEPTED}) if again else ([], {message_id: FAILED})
        assert restart(images.taken[0]) == expected

    def test_a_stop_that_leaves_messages_leaves_them_for_the_next_start(self, path: str) -> None:
        client = Gate()
        with opened(path) as repository:
            proxy = SmsProxy(client, SmsProxyConfig(batch_size=1, senders=1), repository=repository)
            proxy.start()
            ids = [proxy.send(SendMessage(NUMBER, TEXT)).id for _ in range(3)]
            client.wait_entered()
            assert proxy.stop(0.0) == 3
            assert outbox(repository) == ids
        client.opened.set()  # too late to be recorded: the file is closed
        assert restart(path) == (ids, dict.fromkeys(ids, ACCEPTED))

    def test_an_idempotency_key_is_known_after_a_restart(self, path: str, images: Images) -> None:
        repository = Crashing(path, "committed", images)
        with contextlib.closing(repository), SmsProxy(Recorder(), WAITS, repository=repository) as proxy:
            first = proxy.send(SendMessage(NUMBER, TEXT), "order-7").id
        client = Recorder()
        with opened(images.taken[0]) as image, SmsProxy(client, WAITS, repository=image) as proxy:
            assert proxy.send(SendMessage(NUMBER, TEXT), "order-7").id == first
            with pytest.raises(IdempotencyError):
                proxy.send(SendMessage(NUMBER, "another text"), "order-7")
        assert client.ids == [first]


class TestRestarts:
    def fill(self, path: str, *ids: str, accepted: float | None = None) -> None:
        with opened(path, clock=time.time if accepted is None else Clock(accepted)) as repository:
            settle(later(repository, *ids))

    def test_messages_leave_in_the_order_of_acceptance_and_before_new_ones(self, path: str) -> None:
        ids = ["z", "a", "m", "b", "y"]
        self.fill(path, *ids)
        client = Recorder()
        config = SmsProxyConfig(batch_size=2, max_delay=None, senders=1)
        with opened(path) as repository, SmsProxy(client, config, repository=repository) as proxy:
            new = proxy.send(SendMessage(NUMBER, TEXT)).id
        assert client.ids == [*ids, new]

    def test_numbers_and_texts_leave_unchanged(self, path: str) -> None:
        self.fill(path, "a")
        client = Recorder()
        with opened(path) as repository, SmsProxy(client, WAITS, repository=repository):
            pass
        assert client.batches == [[message("a")]]

    def test_they_count_against_max_pending_and_are_never_refused(self, path: str) -> None:
        ids = [f"{number}" for number in range(25)]
        self.fill(path, *ids)
        client = Gate()
        config = SmsProxyConfig(batch_size=5, max_pending=10, senders=1)
        with opened(path) as repository, SmsProxy(client, config, repository=repository) as proxy:
            client.wait_entered()
            assert proxy.gauges()["smsproxy_pending_messages"] == 25
            with pytest.raises(OverloadedError):
                proxy.send(SendMessage(NUMBER, TEXT))
            client.opened.set()
            client.wait_for(lambda batches: len(batches) == 5)
        assert client.ids == ids

    def test_their_age_counts_from_acceptance(self, path: str) -> None:
        self.fill(path, "old", accepted=time.time() - 3_600)
        self.fill(path, "young")
        client = Recorder()
        config = SmsProxyConfig(batch_size=100, max_delay=None, max_age=600.0)
        with opened(path) as repository:
            with SmsProxy(client, config, repository=repository):
                pass
            statuses = [repository.get(message_id) for message_id in ("old", "young")]
            assert (client.ids, statuses, outbox(repository)) == (["young"], [FAILED, ACCEPTED], [])

    def test_they_have_lingered_already(self, path: str) -> None:
        self.fill(path, "old", accepted=time.time() - 3_600)
        client = Recorder()
        config = SmsProxyConfig(batch_size=100, max_delay=1_800.0)
        with opened(path) as repository, SmsProxy(client, config, repository=repository):
            client.wait_for(bool)
        assert client.ids == ["old"]

    def test_a_time_of_acceptance_in_the_future_is_taken_as_now(self, path: str) -> None:
        self.fill(path, "a", accepted=time.time() + 3_600)
        client = Recorder()
        config = SmsProxyConfig(batch_size=100, max_delay=0.0, max_age=600.0)
        with opened(path) as repository, SmsProxy(client, config, repository=repository):
            client.wait_for(bool)
        assert client.ids == ["a"]

    def test_delivery_reports_of_messages_handed_over_before_are_applied(self, path: str) -> None:
        self.fill(path, "a")
        assert restart(path)[0] == ["a"]
        client = Recorder()
        with opened(path) as repository, SmsProxy(client, WAITS, repository=repository) as proxy:
            client.report({"a": "DELIVERED"})
            proxy.stop(HANG)
            assert (client.ids, repository.get("a")) == ([], DELIVERED)
