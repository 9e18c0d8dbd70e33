"""One repository, or a few of them on one database as if they were processes."""
from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

import postgres.connections
from cluster import HANG, Bouncer, Cluster, let_pass, until
from fastsmsing import Message
from message_model import (
    Batch,
    DuplicateMessageError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    RepositoryUnavailableError,
    StatusTransitionError,
    UnknownMessageError,
)  # fmt: skip
from postgres import PostgresRepository, check_database
from postgres.backlog import Counts
from postgres.schema import MIGRATIONS
from repositories import LEASE, Clock, Make, claim, entry, fill

KILL_ALL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()
"""

# What is stored


def test_texts_may_hold_anything_that_utf8_can_encode(repository: PostgresRepository) -> None:
    text = "NUL \0, snowman \u2603, emoji \U0001f600, quote ' and \\ and %s"
    repository.save_all([entry("a", text)])
    assert claim(repository).entries[0].message == Message("48123456789", text, "a")


@pytest.mark.parametrize("message_id", ["", "a\0b", "\ud800", "ż", "no uuid", "x" * 100_000, "'; DROP TABLE message"])
def test_an_id_may_be_any_string_and_is_unknown(repository: PostgresRepository, message_id: str) -> None:
    assert repository.get(message_id) is MessageStatus.NOT_FOUND
    assert repository.reason(message_id) is None
    assert isinstance(repository.update_all({message_id: MessageStatus.CONFIRMED})[message_id], UnknownMessageError)


def test_duplicates_are_told_before_the_limit(repository: PostgresRepository) -> None:
    repository.save_all([entry("a", fingerprint=b"print")])
    duplicate, full = repository.save_all([entry("a"), entry("b")], 1)
    assert isinstance(duplicate, DuplicateMessageError)
    assert duplicate.fingerprint == b"print"
    assert isinstance(full, OverloadedError)


def test_of_a_group_as_many_are_saved_as_there_is_room(repository: PostgresRepository) -> None:
    results = repository.save_all([entry(each) for each in "abac"], 2)
    assert [type(each) for each in results] == [type(None), type(None), DuplicateMessageError, OverloadedError]
    assert claim(repository).ids == ["a", "b"]


def test_a_repeat_within_a_group_is_told_the_fingerprint_of_the_first(repository: PostgresRepository) -> None:
    _, repeat = repository.save_all([entry("a", fingerprint=b"one"), entry("a", fingerprint=b"two")])
    assert isinstance(repeat, DuplicateMessageError)
    assert repeat.fingerprint == b"one"


def test_the_limit_counts_what_others_saved(make: Make, repository: PostgresRepository) -> None:
    fill(repository, 3)
    assert [type(each) for each in make().save_all([entry()], 3)] == [OverloadedError]


def test_nobody_is_refused_for_a_count_that_is_old(make: Make, repository: PostgresRepository) -> None:
    """The count took long, so the next one would come much later; meanwhile another process handed everything over."""
    clock = Clock()
    slow, ids = make(clock=clock), fill(repository, 3)
    count = slow._backlog._count

    def count_slowly() -> Counts:
        clock.now += 4.5
        return count()

    slow._backlog._count = count_slowly
    assert slow.backlog() == 3
    repository.handed_over(claim(repository))
    clock.now += 2.0
    assert slow.save_all([entry()], 3) == [None]
    assert slow.backlog() == 1
    assert repository.get(ids[0]) is MessageStatus.ACCEPTED


def test_a_count_is_at_most_some_seconds_old_however_long_it_takes(make: Make, repository: PostgresRepository) -> None:
    clock = Clock()
    slow = make(clock=clock)
    count = slow._backlog._count

    def count_slowly() -> Counts:
        clock.now += 4.5
        return count()

    slow._backlog._count = count_slowly
    assert slow.backlog() == 0
    fill(repository, 3)
    clock.now += 5.0
    assert slow.backlog() == 3


def test_the_same_id_at_two_repositories_at_once_is_saved_once(make: Make) -> None:
    repositories = [make(), make()]
    barrier = threading.Barrier(2)

    def save(repository: PostgresRepository) -> list[Exception | None]:
        barrier.wait(HANG)
        return repository.save_all([entry(f"{number}", fingerprint=b"print") for number in range(50)])

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(save, repositories))
    pairs = [{type(one), type(other)} for one, other in zip(*both, strict=True)]
    assert all(pair == {type(None), DuplicateMessageError} for pair in pairs)
    assert repositories[0].backlog() == 50


@pytest.mark.parametrize("turn", range(3))
def test_of_two_lists_under_one_key_at_two_repositories_at_once_nothing_of_the_loser_is_saved(
    make: Make, turn: int
) -> None:
    short, long = ([entry(f"{number}", fingerprint=bytes([most])) for number in range(most)] for most in (100, 250))
    repositories, barrier = [make(), make()], threading.Barrier(2)

    def save(repository: PostgresRepository, entries: list[Entry]) -> Exception | None:
        barrier.wait(HANG)
        return repository.save_together(entries)

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(save, repositories, (short, long)))
    winner = errors.index(None)
    error = errors[1 - winner]
    assert isinstance(error, DuplicateMessageError)
    assert (error.message_id, error.fingerprint) == ("0", (short, long)[winner][0].fingerprint)
    assert len(claim(make(), 1_000)) == len((short, long)[winner])


def test_messages_leave_in_order_of_acceptance_and_batches_are_full(make: Make) -> None:
    repositories = [make(), make(), make()]
    ids = [message_id for _ in range(10) for repository in repositories for message_id in fill(repository, 7)]
    batches = [claim(repositories[turn % 3], 50) for turn in range(5)]
    assert [len(batch) for batch in batches] == [50, 50, 50, 50, 10]
    assert [message_id for batch in batches for message_id in batch.ids] == ids


def test_many_that_claim_at_once_get_full_batches_and_no_message_twice(make: Make) -> None:
    repositories = [make(), make(), make()]
    ids = fill(repositories[0], 700, linger=math.inf)

    def take(repository: PostgresRepository) -> list[Batch]:
        batches = []
        while (found := repository.claim(70, math.inf)).batch is not None:
            batches.append(found.batch)
        return batches

    with ThreadPoolExecutor(6) as pool:
        batches = [batch for batches in pool.map(take, repositories * 2) for batch in batches]
    assert [len(batch) for batch in batches] == [70] * 10
    assert sorted(message_id for batch in batches for message_id in batch.ids) == sorted(ids)


def test_a_batch_that_is_not_due_is_not_cut_and_takes_no_lock(
    cluster: Cluster, url: str, repository: PostgresRepository
) -> None:
    fill(repository, 2, linger=1000.0)
    with psycopg.connect(url) as db:
        db.execute("SELECT FROM smsproxy.mutex WHERE name = 'claim' FOR UPDATE")
        found = repository.claim(3, 1000.0)
        assert (found.batch, found.waiting, found.near, found.full_in) == (None, 2, 2, math.inf)
        assert found.due_in == pytest.approx(1000.0, abs=HANG)
        assert repository.claim(3, math.inf).batch is None
    let_pass(cluster, url, 1000.0)
    assert len(claim(repository)) == 2


def test_an_entry_knows_when_it_was_accepted_by_the_clock_here(cluster: Cluster, url: str, make: Make) -> None:
    repository = make(clock=Clock())
    fill(repository, 1)
    let_pass(cluster, url, 500.0)
    assert claim(repository).entries[0].accepted_at == pytest.approx(500.0, abs=HANG)
    assert repository.ages().oldest == pytest.approx(500.0, abs=HANG)


def test_what_is_due_is_forgotten_in_steps_by_one_at_a_time(cluster: Cluster, url: str, make: Make) -> None:
    repository = make(retention=100.0)
    ids = fill(repository, 600)
    waiting = fill(repository, 1)
    repository.update_all(dict.fromkeys(ids, MessageStatus.DELIVERED))
    let_pass(cluster, url, 101.0)
    with psycopg.connect(url) as db:
        db.execute("SELECT FROM smsproxy.mutex WHERE name = 'forget' FOR UPDATE")
        wait = make(retention=100.0).forget()  # somebody else is at it
        assert wait is not None
        assert wait > 0
    assert repository.get(ids[0]) is MessageStatus.NOT_FOUND
    assert cluster.sql(url, "SELECT count(*) FROM smsproxy.message") == [(601,)]
    assert repository.forget() == 0.0
    assert repository.forget() == 100.0
    assert cluster.sql(url, "SELECT id FROM smsproxy.message") == [(waiting[0],)]


def test_a_message_past_its_retention_may_come_again(cluster: Cluster, url: str, make: Make) -> None:
    repository = make(retention=100.0)
    repository.save("a")
    let_pass(cluster, url, 101.0)
    assert repository.save_all([entry("a")]) == [None]
    assert repository.get("a") is MessageStatus.ACCEPTED


@pytest.mark.parametrize("longest", [1e12, math.inf])
def test_the_longest_retention_is_as_good_as_for_ever(cluster: Cluster, url: str, make: Make, longest: float) -> None:
    repository = make(retention=longest, lease=longest)
    fill(repository, 1)
    ids = claim(repository).ids
    repository.update_all({ids[0]: MessageStatus.DELIVERED})
    let_pass(cluster, url, 5e8)
    assert repository.get(ids[0]) is MessageStatus.DELIVERED
    assert repository.forget() is not None
    repository._leases._renew()
    assert repository.get(ids[0]) is MessageStatus.DELIVERED


# Leases


def test_a_batch_of_a_dead_process_is_taken_over_oldest_first(cluster: Cluster, url: str, make: Make) -> None:
    dead, alive = make(), make()
    ids = fill(dead, 4)
    claim(dead, 2), claim(dead, 2)
    assert alive.claim(2, 0.0).batch is None
    let_pass(cluster, url, LEASE + 1)
    assert [claim(alive, 1).ids, claim(alive, 1).ids] == [ids[:2], ids[2:]]
    assert alive.claim(2, 0.0).batch is None


def test_a_process_whose_lease_may_have_run_out_sends_nothing_even_if_nobody_took_the_batch(make: Make) -> None:
    repository = make()
    repository._leases.clock = clock = Clock()
    fill(repository, 1)
    batch = claim(repository)
    clock.now += LEASE * 0.9
    assert repository.holds(batch)
    clock.now += LEASE * 0.1
    assert not repository.holds(batch)
    clock.now -= LEASE  # once it is lost, it stays lost
    assert not repository.holds(batch)


def test_a_batch_that_is_lost_is_renewed_no_more(cluster: Cluster, url: str, make: Make) -> None:
    repository = make()
    repository._leases.clock = clock = Clock()
    fill(repository, 1)
    batch = claim(repository)
    clock.now += LEASE
    assert not repository.holds(batch)
    repository._leases._renew()
    let_pass(cluster, url, LEASE + 1)
    assert claim(repository).ids == batch.ids


def test_a_batch_that_a_process_takes_over_from_itself_is_out_of_reach_of_its_old_lease(
    cluster: Cluster, url: str, make: Make
) -> None:
    one, other = make(), make()
    ids = [*fill(one, 2), *fill(one, 3, linger=LEASE * 100)]
    old = claim(one)
    let_pass(cluster, url, LEASE + 1)
    new = claim(one)
    assert (old.ids, new.ids) == (ids, ids)
    assert [one.holds(old), one.holds(new)] == [False, True]
    assert one.unsent(old).ids == []
    one.release(old.only(lambda each: each.linger > 0))
    assert (one.unsent(new).ids, other.claim(9, 0.0, flush=True).batch) == (ids, None)
    let_pass(cluster, url, LEASE - 1)
    one._leases._renew()
    let_pass(cluster, url, LEASE - 1)
    assert (one.holds(new), other.claim(9, 0.0, flush=True).batch) == (True, None)
    one.handed_over(old.only(lambda each: each.message.message_id == ids[0]))
    assert one.unsent(new).ids == ids[1:]
    one.release(new)
    assert other.claim(9, 0.0, flush=True).batch is not None


def test_renewal_keeps_all_parts_of_a_batch_and_finds_out_that_another_has_it(
    cluster: Cluster, url: str, make: Make
) -> None:
    one, other = make(), make()
    fill(one, 2)
    batch = claim(one)
    let_pass(cluster, url, LEASE - 1)
    one._leases._renew()
    let_pass(cluster, url, LEASE - 1)
    assert other.claim(1, 0.0).batch is None
    assert one.holds(batch.only(lambda each: each.message.message_id == batch.ids[0]))
    let_pass(cluster, url, LEASE)
    claim(other)
    one._leases._renew()
    assert not one.holds(batch)


def test_after_a_silence_of_the_database_owners_get_the_time_to_renew(cluster: Cluster, url: str, make: Make) -> None:
    owner, other = make(), make()
    fill(owner, 1)
    batch = claim(owner)
    let_pass(cluster, url, LEASE + 1)
    # Nobody reached it meanwhile.
    cluster.sql(url, f"UPDATE smsproxy.pulse SET seen_at = seen_at - interval '{LEASE} s'")
    assert other.claim(1, 0.0).batch is None
    owner._leases._renew()
    let_pass(cluster, url, LEASE - 1)
    assert other.claim(1, 0.0).batch is None
    assert owner.holds(batch)


def test_after_a_silence_a_dead_process_loses_its_batch_a_lease_later(cluster: Cluster, url: str, make: Make) -> None:
    dead, other = make(), make()
    fill(dead, 1)
    batch = claim(dead)
    let_pass(cluster, url, LEASE + 1)
    cluster.sql(url, f"UPDATE smsproxy.pulse SET seen_at = seen_at - interval '{LEASE} s'")
    assert other.claim(1, 0.0).batch is None
    let_pass(cluster, url, LEASE + 1)
    assert claim(other).ids == batch.ids


def test_a_released_batch_is_there_for_others_at_once_and_first(make: Make) -> None:
    one, other = make(), make()
    ids = fill(one, 3)
    batch = claim(one, 2)
    one.release(batch)
    assert not one.holds(batch)
    assert claim(other, 3).ids == ids


def test_a_part_can_be_released_while_the_rest_stays_claimed(make: Make) -> None:
    one, other = make(), make()
    ids = fill(one, 4)
    batch = claim(one)
    one.release(batch.only(lambda each: each.message.message_id in ids[:2]))
    assert claim(other).ids == ids[:2]
    assert one.holds(batch)
    one.handed_over(batch.only(lambda each: each.message.message_id in ids[2:]))
    assert one.backlog() == 2


def test_the_end_releases_what_no_sender_began_with_and_nothing_that_may_be_in_a_request(make: Make) -> None:
    ending, other = make(), make()
    ids = fill(ending, 2)
    first, _ = claim(ending, 1), claim(ending, 1)
    assert ending.holds(first)
    ending.close()
    assert claim(other).ids == ids[1:]
    assert other.claim(1, 0.0).batch is None


def test_a_sender_that_asks_after_the_end_freed_its_batch_is_told_not_to_send_it(make: Make) -> None:
    ending, other = make(), make()
    ids = fill(ending, 1)
    batch = claim(ending)  # its sender has the job, and has not asked yet
    ending.close()
    assert claim(other).ids == ids
    assert not ending.holds(batch)


def test_a_batch_that_another_took_over_cannot_be_released(cluster: Cluster, url: str, make: Make) -> None:
    one, other = make(), make()
    fill(one, 1)
    batch = claim(one)
    let_pass(cluster, url, LEASE + 1)
    claim(other)
    one.release(batch)
    assert one.claim(1, 0.0).batch is None


def test_the_lease_ends_with_the_last_message_of_the_batch(cluster: Cluster, url: str, make: Make) -> None:
    repository, other = make(), make()
    ids = fill(repository, 3)
    batch = claim(repository)
    repository.handed_over(batch.only(lambda each: each.message.message_id == ids[0]))
    repository.update_all({ids[1]: Reason.EXPIRED})
    assert cluster.sql(url, "SELECT count(*) FROM smsproxy.batch") == [(1,)]
    repository.update_all({ids[2]: MessageStatus.DELIVERED})
    assert cluster.sql(url, "SELECT count(*) FROM smsproxy.batch") == [(0,)]
    ids = fill(repository, 1)
    batch = claim(repository)
    other.update_all({ids[0]: MessageStatus.DELIVERED})  # the report came to another instance
    repository._leases._renew()
    assert not repository.holds(batch)
    assert cluster.sql(url, "SELECT count(*) FROM smsproxy.batch") == [(0,)]


def test_leases_are_renewed_by_themselves(cluster: Cluster, url: str, make: Make) -> None:
    repository = make(lease=0.6)
    fill(repository, 1)
    batch = claim(repository)
    first = cluster.sql(url, "SELECT lease_until FROM smsproxy.batch")
    until(lambda: cluster.sql(url, "SELECT lease_until FROM smsproxy.batch") > first, "a renewal")
    assert repository.holds(batch)


# Statuses


def test_reports_of_all_instances_at_once_leave_the_last_status(make: Make) -> None:
    repositories = [make(), make()]
    ids = fill(repositories[0], 300)
    batch = claim(repositories[0], 300)

    def report(job: tuple[PostgresRepository, MessageStatus]) -> dict[str, Exception]:
        return job[0].update_all(dict.fromkeys(ids, job[1]))

    reports = (MessageStatus.CONFIRMED, MessageStatus.DELIVERED)
    jobs = [(repository, status) for repository in repositories for status in reports]
    with ThreadPoolExecutor(5) as pool:
        handing_over = pool.submit(repositories[0].handed_over, batch)
        errors = [error for found in pool.map(report, jobs) for error in found.values()]
        handing_over.result(HANG)
    assert {type(error) for error in errors} == {StatusTransitionError}
    assert {repositories[1].get(message_id) for message_id in ids} == {MessageStatus.DELIVERED}
    assert repositories[1].backlog() == 0


# Starting


def test_several_processes_may_create_the_tables_at_once(make: Make) -> None:
    with ThreadPoolExecutor(4) as pool:
        repositories = list(pool.map(lambda _: make(), range(4)))
    assert fill(repositories[0], 1) == claim(repositories[3]).ids


def test_a_check_only_looks(cluster: Cluster, url: str, make: Make) -> None:
    check_database(url)
    assert cluster.sql(url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'smsproxy'") == [(0,)]
    make()
    check_database(url)
    cluster.sql(url, "UPDATE smsproxy.version SET version = version + 1")
    with pytest.raises(RepositoryUnavailableError, match="newer"):
        check_database(url)


def test_a_check_finds_that_the_tables_cannot_be_created(cluster: Cluster, url: str) -> None:
    cluster.sql("postgres", "DROP ROLE IF EXISTS guest")
    cluster.sql("postgres", f"CREATE ROLE guest LOGIN PASSWORD '{Cluster.PASSWORD}'")
    with pytest.raises(RepositoryUnavailableError, match="may not create"):
        check_database(url.replace("smsproxy:", "guest:"))


def test_a_newer_schema_is_refused(cluster: Cluster, url: str, make: Make) -> None:
    make()
    cluster.sql(url, "UPDATE smsproxy.version SET version = version + 1")
    with pytest.raises(RepositoryUnavailableError, match=f"version {len(MIGRATIONS) + 1}, newer"):
        make()


@pytest.mark.parametrize("setting", ["synchronous_commit = off", "default_transaction_isolation = 'repeatable read'",
                                     "default_transaction_read_only = on"])  # fmt: skip
def test_settings_that_break_a_promise_are_refused(cluster: Cluster, url: str, make: Make, setting: str) -> None:
    cluster.sql(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET {setting}")
    with pytest.raises(RepositoryUnavailableError, match=setting.split()[0].removeprefix("default_")):
        make()


def test_an_encoding_other_than_utf8_is_refused(cluster: Cluster, make: Make) -> None:
    cluster.sql("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(RepositoryUnavailableError, match="LATIN1"):
        make(cluster.url("latin"))


def test_a_wrong_password_is_told_without_it(url: str) -> None:
    with pytest.raises(RepositoryUnavailableError, match="password authentication failed") as caught:
        PostgresRepository(url.replace(Cluster.PASSWORD, "an0ther-pa55word"))
    assert "an0ther" not in str(caught.value)


# Faults


def test_a_stale_connection_is_replaced(cluster: Cluster, url: str, repository: PostgresRepository) -> None:
    ids = fill(repository, 1)
    cluster.sql(url, KILL_ALL)
    assert repository.get(ids[0]) is MessageStatus.ACCEPTED


def test_a_lost_answer_to_a_commit_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, repository: PostgresRepository
) -> None:
    """The connection is cut after the commit and before the answer is seen, for each kind of change."""
    execute = postgres.connections._execute
    cut: list[str] = []

    def lose_answer(db: Any, sql: str, parameters: Any, timeout: float) -> list[Any]:
        rows = execute(db, sql, parameters, timeout)
        if sql not in cut:
            cut.append(sql)
            db.pgconn.finish()
            raise psycopg.OperationalError("the connection is lost")
        return rows

    monkeypatch.setattr(postgres.connections, "_execute", lose_answer)
    assert repository.save_all([entry("a"), entry("b")]) == [None, None]
    (result,) = repository.save_all([entry("a")])
    assert isinstance(result, DuplicateMessageError)
    assert repository.claim(2, 0.0).batch is None  # the answer that is lost had the batch: it waits out its lease
    assert repository.save_all([entry("c"), entry("d")]) == [None, None]
    batch = claim(repository)
    repository.release(batch)
    batch = claim(repository)
    repository.handed_over(batch)
    assert repository.update_all({"c": MessageStatus.CONFIRMED}) == {}
    assert repository.backlog() == 2
    assert repository.save_together([entry("e"), entry("f")]) is None
    error = repository.save_together([entry("g"), entry("f")])
    assert isinstance(error, DuplicateMessageError)
    assert (error.message_id, repository.get("g")) == ("f", MessageStatus.NOT_FOUND)
    assert len(cut) > 5


def again(change: Callable[[], Any]) -> Any:
    """Repeats a change until the database is there for it."""
    while True:
        try:
            return change()
        except RepositoryUnavailableError:
            continue


def kill(url: str, ended: threading.Event) -> None:
    """Kills random connections to the database until the event is set."""
    with psycopg.connect(url, autocommit=True) as db:
        while not ended.wait(0.01):
            db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                       "AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1")  # fmt: skip


def test_connections_killed_at_random_statements_lose_nothing(cluster: Cluster, url: str, make: Make) -> None:
    repository, saved, ended = make(), threading.Event(), threading.Event()
    sent: list[str] = []

    def save(number: int) -> None:
        (error,) = again(lambda: repository.save_all([entry(f"{number}", fingerprint=b"print")]))
        assert error is None or isinstance(error, DuplicateMessageError)

    def carry() -> None:
        while (found := again(lambda: repository.claim(20, 0.0)).batch) is not None or not saved.is_set():
            if found is not None:
                again(lambda: repository.handed_over(found))
                errors = again(lambda: repository.update_all(dict.fromkeys(found.ids, MessageStatus.DELIVERED)))
                assert {type(error) for error in errors.values()} <= {StatusTransitionError}  # it was applied before
                sent.extend(found.ids)

    with ThreadPoolExecutor(5) as pool:
        killer, carrier = pool.submit(kill, url, ended), pool.submit(carry)
        try:
            list(pool.map(save, range(150)))
        finally:
            saved.set()
            carrier.exception(HANG)
            ended.set()
        killer.result(HANG)
        carrier.result(HANG)
    let_pass(cluster, url, LEASE + 1)  # so much for the claims whose answers were lost
    carry()
    assert sorted(sent, key=int) == [f"{number}" for number in range(150)]


def test_a_server_that_is_down_is_unavailable_and_then_available_again(
    cluster: Cluster, repository: PostgresRepository
) -> None:
    ids = fill(repository, 1)
    cluster.halt()
    try:
        for call in (repository.check, repository.ages, lambda: repository.get("a"), lambda: repository.claim(1, 0.0)):
            with pytest.raises(RepositoryUnavailableError):
                call()
    finally:
        cluster.resume()
    repository.check()
    assert claim(repository).ids == ids


def test_a_server_that_becomes_read_only_is_unavailable_until_it_is_not(
    cluster: Cluster, url: str, repository: PostgresRepository
) -> None:
    database = url.rpartition("/")[2]
    cluster.sql("postgres", f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    cluster.sql(url, KILL_ALL)
    for call in (repository.check, lambda: repository.save_all([entry()])):
        with pytest.raises(RepositoryUnavailableError, match="read-only"):
            call()
    cluster.sql("postgres", f"ALTER DATABASE {database} RESET default_transaction_read_only")
    repository.check()


def test_after_the_end_nothing_works(make: Make) -> None:
    repository = make()
    repository.close()
    with pytest.raises(RepositoryUnavailableError, match="closed"):
        repository.get("a")


def test_errors_show_neither_numbers_nor_texts(
    caplog: pytest.LogCaptureFixture, repository: PostgresRepository
) -> None:
    caplog.set_level(logging.DEBUG)
    repository._database.run("ALTER TABLE smsproxy.outbox ADD CHECK (phone_number <> '48123456789')")
    with pytest.raises(RepositoryUnavailableError) as caught:
        repository.save_all([entry(text="a secret")])
    assert "48123456789" not in str(caught.value) + caplog.text
    assert "CheckViolation" in str(caught.value)


# Through a pooler


def test_all_of_it_works_through_pgbouncer_in_transaction_mode(bouncer: Bouncer, url: str, make: Make) -> None:
    repositories = [make(bouncer.url(url)), make(bouncer.url(url))]
    ids = fill(repositories[0], 40)
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda number: claim(repositories[number % 2], 10), range(4)))
        list(pool.map(repositories[0].handed_over, batches))
        reports = [dict.fromkeys(batch.ids, MessageStatus.DELIVERED) for batch in batches]
        list(pool.map(repositories[1].update_all, reports))
        assert set(pool.map(repositories[0].get, ids)) == {MessageStatus.DELIVERED}
    repositories[1].check()
    assert repositories[1].backlog() == 0


def test_the_compose_file_starts_two_instances_on_one_database() -> None:
    yaml = pytest.importorskip("yaml")
    directory = Path(__file__).resolve().parent.parent
    services = yaml.safe_load((directory / "compose.yaml").read_text())["services"]
    assert services.keys() == {"postgres", "smsproxy", "nginx"}
    assert services["smsproxy"]["deploy"]["replicas"] == 2
