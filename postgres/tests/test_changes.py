"""The contract that the outboxes of changes in memory and SQLite keep, kept by PostgreSQL; and what several processes
may do to each other."""
from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from base_repository import Claim, Repository
from change_contract import RETENTION, SETTLED, DurableChangeContract, claimed
from change_outbox import Change, ChangeBody, ChangeOutbox
from cluster import HANG, Cluster, let_pass, until
from message_model import MessageStatus, RepositoryUnavailableError
from postgres import PostgresRepository
from postgres.changes import PostgresChanges
from repositories import Make
from repository_contract import entries, name

CONFIRMED, FAILED, DELIVERED = MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED
Telling = tuple[PostgresRepository, ChangeOutbox]
Overdue = tuple[ChangeOutbox, ChangeBody, ChangeOutbox]
CONTRACT_LEASE = 10 * RETENTION  # seconds; far longer than anything that passes


class TestPostgresChanges(DurableChangeContract):
    @pytest.fixture
    def made(self) -> Iterator[list[PostgresRepository]]:
        made: list[PostgresRepository] = []
        yield made
        for repository in made:
            repository.close()

    @pytest.fixture
    def repository(self, url: str, made: list[PostgresRepository]) -> PostgresRepository:
        made.append(PostgresRepository(url, RETENTION, lease=CONTRACT_LEASE))
        return made[-1]

    @pytest.fixture
    def age(self, cluster: Cluster, url: str, made: list[PostgresRepository]) -> Callable[[float], None]:
        def age(seconds: float) -> None:
            let_pass(cluster, url, seconds)
            for repository in made:
                repository._forget_at -= seconds

        return age

    @pytest.fixture
    def restart(
        self, cluster: Cluster, url: str, made: list[PostgresRepository]
    ) -> Callable[[Repository], PostgresRepository]:
        def restart(repository: Repository) -> PostgresRepository:
            repository.close()
            cluster.sql(url, "UPDATE smsproxy.body SET lease_until = '-infinity'")
            made.append(PostgresRepository(url, RETENTION, lease=CONTRACT_LEASE))
            return made[-1]

        return restart


# Several processes

NUMBERS = range(240)


@pytest.fixture
def settled(cluster: Cluster, url: str) -> Callable[[], None]:
    """Makes due what has changed; touches nothing that a test's own transaction may have locked."""
    shift = f"UPDATE smsproxy.change SET changed_at = changed_at - interval '{SETTLED} s'"

    def settle() -> None:
        cluster.sql(url, shift)

    return settle


@pytest.fixture
def telling(make: Make, settled: Callable[[], None]) -> Telling:
    """A process, and its outbox with one change that is due."""
    repository = make()
    changes = repository.changes()
    repository.save_all(entries(range(1)))
    repository.update_all({name(0): CONFIRMED})
    settled()
    return repository, changes


@pytest.fixture
def overdue(
    cluster: Cluster, url: str, make: Make, telling: Telling
) -> Overdue:
    """The outbox of a process whose lease ran out, the body that it has claimed, and another process's outbox."""
    _, changes = telling
    body, other = claimed(changes), make().changes()
    assert body is not None
    expire_lease(cluster, url)
    return changes, body, other


def tell_all(changes: ChangeOutbox) -> list[Change]:
    """Tells all that is due."""
    told: list[Change] = []
    while body := claimed(changes):
        assert changes.holds(body)
        changes.handed_over(body)
        told += body.changes
    return told


def expire_lease(cluster: Cluster, url: str) -> None:
    cluster.sql(url, "UPDATE smsproxy.body SET lease_until = clock_timestamp()")


def test_before_the_first_instance_with_a_webhook_nothing_is_recorded_and_from_then_on_by_all(
    cluster: Cluster, url: str, make: Make, settled: Callable[[], None]
) -> None:
    without, teller = make(), make()
    assert not cluster.sql(url, "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")
    without.save_all(entries(range(2)))
    without.update_all({name(0): CONFIRMED})
    changes = teller.changes()
    without.update_all({name(1): CONFIRMED})
    settled()
    assert tell_all(changes) == [Change(name(1), CONFIRMED)]


def test_the_first_start_waits_for_writers_that_began_before_and_misses_none_that_come_after(
    cluster: Cluster, url: str, make: Make, settled: Callable[[], None]
) -> None:
    """Many writers, of which each notes what it changed after the start has said that changes are recorded."""
    repository, started, after = make(), threading.Event(), []
    repository.save_all(entries(NUMBERS))

    def write(first: int) -> None:
        for number in range(first, NUMBERS.stop, 4):
            late = started.is_set()
            repository.update_all({name(number): DELIVERED})
            if late:
                after.append(name(number))

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, first) for first in range(4)]
        changes = make().changes()
        started.set()
        for writer in writers:
            writer.result(HANG)
    settled()
    told = {change.message_id for change in tell_all(changes)}
    assert told.issuperset(after)


def test_a_change_that_commits_after_later_ones_were_told_is_told(
    url: str, make: Make, settled: Callable[[], None]
) -> None:
    """Its time and its number are from before; what a cursor would lose."""
    repository = make()
    changes = repository.changes()
    repository.save_all(entries(range(3)))
    with psycopg.connect(url) as slow, psycopg.connect(url) as slower:
        update = "UPDATE smsproxy.message SET status = 'FAILED', changed_at = now() WHERE id = %s"
        for db, number in ((slower, 0), (slow, 1)):
            db.execute(update, (name(number),))
        repository.update_all({name(2): DELIVERED})
        settled()
        assert tell_all(changes) == [Change(name(2), DELIVERED)]
        slow.commit()
        settled()
        body = claimed(changes)
        assert body is not None
        slower.commit()  # while a body is under way
        changes.handed_over(body)
        settled()
        assert [*body.changes, *tell_all(changes)] == [Change(name(1), FAILED), Change(name(0), FAILED)]


def test_a_message_that_changes_while_its_change_is_under_way_is_told_again(
    url: str, settled: Callable[[], None], telling: Telling
) -> None:
    """One row a message would lose the second change, which begins before the claim and commits after it."""
    _, changes = telling
    with psycopg.connect(url) as slow:
        slow.execute("UPDATE smsproxy.message SET status = 'DELIVERED' WHERE id = %s", (name(0),))
        body = claimed(changes)
        assert body is not None
        slow.commit()
    changes.handed_over(body)
    settled()
    assert [*body.changes, *tell_all(changes)] == [Change(name(0), CONFIRMED), Change(name(0), DELIVERED)]


def await_blocked(cluster: Cluster, url: str) -> None:
    """Returns when a statement waits for another one's lock."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = 'test' AND wait_event_type = 'Lock'"
    until(lambda: cluster.sql(url, waiting), "a statement that waits for a lock")


def test_a_message_that_changes_between_the_look_and_the_end_of_the_claim_is_told_again(
    cluster: Cluster, url: str, settled: Callable[[], None], telling: Telling
) -> None:
    repository, changes = telling
    with psycopg.connect(url) as other, ThreadPoolExecutor(1) as pool:
        # Another body, which never comes to be: the claim waits for it after it has looked.
        values = "true, '', 0, '{}', '{}', '{}', now(), now(), gen_random_uuid(), now()"
        other.execute(f"INSERT INTO smsproxy.body VALUES ({values})")
        claiming = pool.submit(claimed, changes)
        await_blocked(cluster, url)
        repository.update_all({name(0): DELIVERED})
        other.rollback()
        body = claiming.result(HANG)
    assert body is not None
    changes.handed_over(body)
    settled()
    assert [*body.changes, *tell_all(changes)] == [Change(name(0), CONFIRMED), Change(name(0), DELIVERED)]


def test_a_renewal_that_comes_before_a_take_over_keeps_the_body(
    cluster: Cluster, url: str, overdue: Overdue
) -> None:
    changes, body, other = overdue
    with psycopg.connect(url) as renewing, ThreadPoolExecutor(1) as pool:
        renewing.execute("UPDATE smsproxy.body SET lease_until = clock_timestamp() + interval '60 s'")
        claiming = pool.submit(claimed, other)
        await_blocked(cluster, url)
        renewing.commit()
        assert claiming.result(HANG) is None
    assert changes.holds(body)


def test_of_several_processes_one_tells(make: Make, settled: Callable[[], None]) -> None:
    one, other = make(), make()
    outboxes = [one.changes(), other.changes()]
    one.save_all(entries(range(3)))
    one.update_all({name(0): DELIVERED, name(1): DELIVERED})
    settled()
    with ThreadPoolExecutor(2) as pool:
        bodies = list(pool.map(lambda changes: claimed(changes, 1), outboxes))
    assert [len(body.ids) if body else 0 for body in bodies] in ([0, 1], [1, 0])
    told, idle = outboxes if bodies[0] else outboxes[::-1]
    assert idle.claim(100, 0.0, flush=True) == Claim()
    body = bodies[0] or bodies[1]
    assert body is not None
    assert not idle.holds(body)
    idle.handed_over(body)  # not its own
    assert told.holds(body)
    assert idle.pending()[0] == 2
    told.handed_over(body)
    assert idle.pending()[0] == 1
    assert len(tell_all(idle)) == 1


def test_a_body_whose_lease_ran_out_is_taken_over_as_it_is_and_its_owner_leaves_it_alone(
    cluster: Cluster, url: str, make: Make, settled: Callable[[], None]
) -> None:
    hangs, stays = make().changes(), make()
    changes = stays.changes()
    stays.save_all(entries(range(2)))
    stays.update_all({name(0): CONFIRMED})
    settled()
    body = claimed(hangs)
    assert body is not None
    stays.update_all({name(0): DELIVERED})
    settled()
    assert claimed(changes) is None
    expire_lease(cluster, url)
    assert claimed(changes) == body
    assert not hangs.holds(body)
    hangs.handed_over(body)
    hangs.release(body)
    assert changes.holds(body)
    changes.handed_over(body)
    assert tell_all(hangs) == [Change(name(0), DELIVERED)]


def test_a_lease_that_ran_out_and_that_nobody_took_over_is_renewed_before_a_request(overdue: Overdue) -> None:
    changes, body, other = overdue
    assert changes.holds(body)
    assert claimed(other) is None


def test_a_body_that_waits_for_its_next_try_stays_with_its_owner(
    cluster: Cluster, url: str, make: Make, settled: Callable[[], None]
) -> None:
    repository = make()
    repository.changes().close(0.0)  # type: ignore[attr-defined]
    changes = PostgresChanges(repository._database, uuid.uuid4(), None, time.monotonic, lease=0.4)
    try:
        repository.save_all(entries(range(1)))
        repository.update_all({name(0): CONFIRMED})
        settled()
        assert claimed(changes) is not None
        seen = "SELECT lease_until FROM smsproxy.body"
        first = cluster.sql(url, seen)
        until(lambda: cluster.sql(url, seen) > first, "a renewal")
    finally:
        changes.close(time.monotonic() + HANG)


def test_a_lease_that_may_end_before_a_request_does_is_none(
    make: Make, settled: Callable[[], None]
) -> None:
    """As when the answer to its renewal took long."""
    repository = make()
    repository.changes().close(0.0)  # type: ignore[attr-defined]
    changes = PostgresChanges(repository._database, uuid.uuid4(), None, time.monotonic, lease=15.0)
    try:
        repository.save_all(entries(range(1)))
        repository.update_all({name(0): CONFIRMED})
        settled()
        body = claimed(changes)
        assert body is not None
        with pytest.raises(RepositoryUnavailableError):
            changes.holds(body)
    finally:
        changes.close(time.monotonic() + HANG)


def test_a_claim_whose_answer_is_lost_gives_its_body_to_the_next_one(
    telling: Telling, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, changes = telling
    with monkeypatch.context() as patch:
        run = repository._database.run

        def lose(*arguments: Any, **options: Any) -> Any:
            run(*arguments, **options)
            raise RepositoryUnavailableError("the answer is lost")

        patch.setattr(repository._database, "run", lose)
        with pytest.raises(RepositoryUnavailableError):
            changes.claim(100, 0.0)
    assert tell_all(changes) == [Change(name(0), CONFIRMED)]


def test_changes_that_commit_in_any_order_are_all_told_by_tellers_that_take_each_other_over(
    cluster: Cluster, url: str, make: Make
) -> None:
    """Writers hold their transactions open for random times; bodies are claimed, left and taken over meanwhile."""
    repository = make()
    outboxes = [repository.changes(), make().changes(), make().changes()]
    repository.save_all(entries(NUMBERS))
    rng, told = random.Random(5), dict[str, MessageStatus]()

    def write(first: int) -> None:
        rng, pause = random.Random(first), threading.Event()
        with psycopg.connect(url) as db:
            for status in (CONFIRMED, DELIVERED):
                for number in range(first, NUMBERS.stop, 6):
                    db.execute("UPDATE smsproxy.message SET status = %s, changed_at = clock_timestamp() WHERE id = %s",
                               (status.value, name(number)))  # fmt: skip
                    pause.wait(rng.choice([0.0, 0.0, 0.02]))
                    if rng.random() < 0.5:
                        db.commit()

    def tell() -> None:
        changes = rng.choice(outboxes)
        body = changes.claim(30, 0.0, flush=True).batch
        if body is None:
            return
        if rng.random() < 0.3:  # it dies or hangs
            expire_lease(cluster, url)
            changes = rng.choice([each for each in outboxes if each is not changes])
            assert changes.claim(30, 0.0, flush=True).batch == body
        for change in body.changes:
            before = told.get(change.message_id)
            assert (before, change.status) in ((None, CONFIRMED), (None, DELIVERED), (CONFIRMED, DELIVERED))
            told[change.message_id] = change.status
        for each in outboxes:  # the one that hung forgets it, too
            each.holds(body)
        changes.handed_over(body)

    with ThreadPoolExecutor(6) as pool:
        writers = [pool.submit(write, first) for first in range(6)]
        while not all(writer.done() for writer in writers):
            tell()
        for writer in writers:
            writer.result(HANG)
    while outboxes[0].pending()[0]:
        tell()
    assert told == {name(number): DELIVERED for number in NUMBERS}


def test_many_changes_that_are_stale_or_forgotten_do_not_hide_those_behind_them(
    cluster: Cluster, url: str, make: Make, settled: Callable[[], None]
) -> None:
    repository = make()
    changes = repository.changes()
    repository.save_all(entries(range(500)))
    for status in (CONFIRMED, DELIVERED):
        repository.update_all({name(number): status for number in range(500)})
    cluster.sql(url, "DELETE FROM smsproxy.message WHERE id < %s", name(450))
    settled()
    assert sorted(tell_all(changes)) == [Change(name(number), DELIVERED) for number in range(450, 500)]
    assert changes.pending() == (0, 0.0)


def test_what_nobody_tells_is_forgotten_with_its_message(cluster: Cluster, url: str, make: Make) -> None:
    repository = make(retention=RETENTION)
    repository.changes()
    repository.save_all(entries(range(1)))
    repository.update_all({name(0): DELIVERED})
    let_pass(cluster, url, RETENTION * 1.1)
    repository.forget()
    assert cluster.sql(url, "SELECT count(*) FROM smsproxy.change") == [(0,)]


def test_many_that_wait_are_counted_about_and_cheaply(cluster: Cluster, url: str, make: Make) -> None:
    changes = make().changes()
    insert = "INSERT INTO smsproxy.change (id, status) SELECT n::text, 'FAILED' FROM generate_series(1, 5000) n"
    cluster.sql(url, insert)
    assert changes.pending()[0] == 5000
    cluster.sql(url, "DELETE FROM smsproxy.change; INSERT INTO smsproxy.change (id, status) "
                "SELECT (n / 2)::text, 'FAILED' FROM generate_series(2, 5001) n")  # fmt: skip
    assert changes.pending()[0] == 2500


def test_recording_ends_by_hand(cluster: Cluster, url: str, make: Make) -> None:
    repository = make()
    changes = repository.changes()
    repository.save_all(entries(range(2)))
    repository.update_all({name(0): DELIVERED})
    cluster.sql(url, "SELECT smsproxy.record_changes(false)")
    repository.update_all({name(1): DELIVERED})
    assert changes.pending() == (0, 0.0)
