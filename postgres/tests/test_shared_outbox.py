"""The shared outbox in order of due: where looks begin, who gets a message, and whose clock counts."""
from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from cluster import HANG, Cluster, Passage, let_pass, until
from message_model import MessageStatus, Reason, StatusTransitionError
from postgres import PostgresRepository
from postgres.statements import SAVE
from repositories import LEASE, Clock, Make, claim, entry, fill

HOUR = 3600.0
STEPS = 9  # of the front: more than two of its rounds
FRONT = "SELECT front > clock_timestamp() + interval '10 min' FROM smsproxy.pulse"
RESET = "UPDATE smsproxy.pulse SET front = DEFAULT, next_front = DEFAULT, published = DEFAULT, settled = NULL"
PLANNED = (
    "SELECT * FROM smsproxy.look(101)", "SELECT * FROM smsproxy.expire(500, 60)",
    "SELECT * FROM smsproxy.renew('{owner}', ARRAY[{batch}], 60)",
    "SELECT * FROM smsproxy.release('{owner}', ARRAY[{batch}], ARRAY['no such message'])",
    "SELECT * FROM smsproxy.cancel('no such message', 60, 60)",
)  # fmt: skip


class Save:
    """The save of one message that is due at once, in a transaction that stays open."""

    def __init__(self, url: str, message_id: str) -> None:
        self._db = psycopg.connect(url)
        columns = ([message_id], ["48123456789"], [b"Hi"], [None], [0.0], [False], [math.inf])
        assert self._db.execute(SAVE, (*columns, 1000.0)).fetchall() == [(message_id,)]

    def commit(self) -> None:
        """Ends the transaction: now others can see the message."""
        self._db.commit()
        self._db.close()


@pytest.fixture
def beats(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection on which the front is moved by hand; whoever holds a lock stops it, as it stops claims."""
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SET lock_timeout = '20ms'")
        yield db


def beat(db: psycopg.Connection[Any]) -> None:
    with contextlib.suppress(psycopg.errors.LockNotAvailable):
        db.execute("SELECT smsproxy.beat(0)")


def is_ahead(db: psycopg.Connection[Any]) -> bool:
    """Whether the front, after one more step, is far ahead of what is due now."""
    beat(db)
    return db.execute(FRONT).fetchall() == [(True,)]


def move_front(db: psycopg.Connection[Any]) -> None:
    """Returns when the front is far ahead; something else in the cluster, an autovacuum perhaps, may stop it."""
    until(lambda: is_ahead(db), "the move of the front")


# Order


def test_what_any_instance_accepted_leaves_in_order_of_due(make: Make) -> None:
    one, other = make(), make()
    late, early = fill(one, 2, linger=900.0), fill(other, 2, linger=300.0)
    code = fill(one, 1)
    assert claim(other, 4).ids == [*code, *early, late[0]]
    assert other.claim(4, 2000.0).due_in == pytest.approx(900.0, abs=HANG)


def test_what_waits_is_known_to_all(make: Make) -> None:
    one, other = make(), make()
    fill(one, 30, linger=100.0)
    found = other.claim(20, 50.0)
    assert (found.batch, found.near, found.waiting) == (None, 0, 30)
    assert found.full_in == pytest.approx(50.0, abs=HANG)
    assert len(other.claim(20, 150.0).batch or ()) == 20
    found = one.claim(20, 150.0)
    assert (found.batch, found.near, found.waiting, found.full_in) == (None, 10, 10, math.inf)


def test_riders_that_one_instance_puts_back_ride_with_another_or_are_cancelled(make: Make) -> None:
    one, other = make(), make()
    code, riders = fill(one, 1), fill(one, 3, linger=HOUR)
    batch = claim(one)
    one.release(batch.only(lambda each: each.message.message_id in riders))
    assert other.cancel(riders[0])
    next_code = fill(other, 1)
    assert claim(other).ids == [*next_code, *riders[1:]]
    assert one.unsent(batch).ids == code
    assert not one.cancel(code[0])


def test_a_start_with_a_shorter_linger_brings_forward_what_all_instances_accepted(make: Make, beats: Any) -> None:
    one = make()
    one.save_all([entry("a", linger=math.inf, default=True), entry("b", linger=HOUR)])
    one.save_all([entry("c", linger=5.0, default=True)])
    beat(beats)
    other = make()
    other.hasten(0.0)
    assert claim(one, 2).ids == ["a", "c"]
    assert other.claim(2, 0.0).due_in == pytest.approx(HOUR, abs=HANG)


def test_ten_thousand_can_be_brought_forward(make: Make) -> None:
    repository = make()
    for _ in range(11):
        repository.save_all([entry(linger=HOUR, default=True) for _ in range(1_000)])
    repository.hasten(60.0)
    assert repository.claim(20_000, 61.0).near == 11_000


# Where looks begin


@pytest.mark.parametrize("begin", range(STEPS))
def test_no_message_gets_behind_the_front_however_long_its_commit_takes(
    cluster: Cluster, url: str, make: Make, beats: Any, begin: int
) -> None:
    """The save begins at each step of the front, is committed at each later one, and looked for then or at the end."""
    repository = make()
    rounds = [(end, at) for end in range(begin, STEPS) for at in {end, STEPS - 1}]
    for commit, look in rounds:
        cluster.sql(url, "DELETE FROM smsproxy.outbox")
        fill(repository, 1, linger=HOUR)
        cluster.sql(url, RESET)
        found: list[str] = []
        for step in range(STEPS):
            if step == begin:
                save = Save(url, f"code {commit} {look}")
            beat(beats)
            if step == commit:
                save.commit()
            if step == look:
                found = claim(repository, 1).ids
        assert found == [f"code {commit} {look}"]
        move_front(beats)


def test_a_step_of_the_front_that_waited_for_the_one_before_it_notes_nothing(
    url: str, make: Make, beats: Any, cluster: Cluster
) -> None:
    """It has its transaction ID from before the publication, so a save that did not see that may have a later one."""
    repository = make()
    fill(repository, 1, linger=HOUR)
    with psycopg.connect(url) as publishing, ThreadPoolExecutor(1) as pool:
        beat(beats)
        publishing.execute("SELECT smsproxy.beat(0)")
        waiting = pool.submit(cluster.sql, url, "SELECT smsproxy.beat(0)")
        waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"
        until(lambda: cluster.sql(url, waits)[0][0], "a step that waits")
        save = Save(url, "code")
        publishing.commit()
        waiting.result(HANG)
    for _ in range(STEPS):
        beat(beats)
    save.commit()
    assert claim(repository, 1).ids == ["code"]


def test_saves_that_commit_in_any_order_are_all_found(cluster: Cluster, url: str, make: Make) -> None:
    repository, ended = make(), threading.Event()
    fill(repository, 1, linger=HOUR)

    def save(number: int) -> None:
        rng = random.Random(number)
        with psycopg.connect(url) as db:
            for turn in range(40):
                columns = ([f"{number}.{turn}"], ["48123456789"], [b"Hi"], [None], [0.0], [False], [math.inf])
                db.execute(SAVE, (*columns, 1000.0))
                db.execute("SELECT pg_sleep(%s)", (rng.random() * 0.01,))
                db.commit()

    def move() -> int:
        turns = 0
        with psycopg.connect(url, autocommit=True) as db:
            while not ended.is_set():
                db.execute("SELECT smsproxy.beat(0)")
                turns += 1
        return turns

    found: list[str] = []
    with ThreadPoolExecutor(7) as pool:
        moving = [pool.submit(move) for _ in range(2)]
        saving = [pool.submit(save, number) for number in range(4)]
        while not all(each.done() for each in saving):
            if batch := repository.claim(3, 0.0).batch:
                found += batch.ids
        ended.set()
        assert sum(each.result(HANG) for each in moving) > 20
    while batch := repository.claim(3, 0.0).batch:
        found += batch.ids
    codes = sorted(each for each in found if "." in each)
    assert codes == sorted(f"{number}.{turn}" for number in range(4) for turn in range(40))


def test_what_is_released_is_in_front_again(make: Make, beats: Any) -> None:
    one, other = make(), make()
    ids = fill(one, 2)
    batch = claim(one)
    fill(one, 1, linger=HOUR)
    move_front(beats)
    one.release(batch)
    assert claim(other, 2).ids == ids


def test_the_front_is_found_again_in_a_database_that_was_restored(
    cluster: Cluster, url: str, make: Make, beats: Any
) -> None:
    """Its notes name transactions of another server, which are yet to come here."""
    fill(make(), 1, linger=HOUR)
    cluster.sql(url, "UPDATE smsproxy.pulse SET published = '4611686018427387904', settled = '4611686018427387905'")
    make()
    move_front(beats)


def pages_read(url: str, statement: str) -> int:
    """How many pages of tables and indexes a statement reads, its functions' included."""
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
        db.execute(statement)  # once before, or the catalog's pages count, too
        (plan,) = db.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}").fetchone() or ()
        top = plan[0]["Plan"]
        return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def test_a_look_reads_as_much_with_30_000_claimed_as_with_none(cluster: Cluster, url: str, make: Make) -> None:
    repository = make(lease=HOUR)
    look = "SELECT * FROM smsproxy.claim(gen_random_uuid(), 100, 10, false, 3600)"
    fill(repository, 50, linger=2 * HOUR)
    none = pages_read(url, look)
    for _ in range(30):
        fill(repository, 1_000, linger=HOUR)
    for _ in range(300):
        assert len(repository.claim(100, math.inf).batch or ()) == 100
    assert repository.claim(100, 10.0).batch is None
    cluster.sql(url, "VACUUM smsproxy.outbox")
    assert pages_read(url, look) < none + 300  # to pass all that are claimed it would read 30,000
    assert repository.claim(100, math.inf).waiting == 50
    assert len(repository.claim(50, math.inf).batch or ()) == 50


def test_plans_made_while_the_outbox_was_empty_do_not_read_all_of_it_later(
    cluster: Cluster, url: str, make: Make
) -> None:
    repository = make(connections=1, lease=HOUR)
    fill(repository, 1)
    repository.handed_over(claim(repository))
    cluster.sql(url, "ALTER TABLE smsproxy.outbox SET (autovacuum_enabled = off)")  # it would have new plans made
    cluster.sql(url, "VACUUM ANALYZE smsproxy.outbox, smsproxy.batch")

    def call(statement: str, explain: str = "") -> Any:
        fill(repository, 2, max_age=1e-6)
        batch = claim(repository)
        statement = statement.format(owner=repository._leases.owner, batch=batch.lease.id)
        found = repository._database.run(explain + statement)
        repository.release(batch)
        repository.expire()
        return found

    for statement in PLANNED * 8:  # from the sixth time on a plan is kept
        call(statement)
    for _ in range(25):
        fill(repository, 1_000, linger=HOUR)
    for _ in range(12):
        assert len(repository.claim(1_000, math.inf).batch or ()) == 1_000
    pages = {}
    for statement in PLANNED:
        ((plan,),) = call(statement, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) ")
        pages[statement] = plan[0]["Plan"]["Shared Hit Blocks"]
    assert {statement: read for statement, read in pages.items() if read > 150} == {}


def test_looks_do_not_pass_what_left_while_a_transaction_keeps_vacuum_away(
    url: str, make: Make, repository: PostgresRepository, beats: Any
) -> None:
    look = "SELECT * FROM smsproxy.look(100)"
    with psycopg.connect(url) as dump:
        dump.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM smsproxy.message")
        for _ in range(5):
            fill(repository, 1_000)
        while batch := repository.claim(1_000, 0.0).batch:
            repository.handed_over(batch)
        fill(repository, 1, linger=HOUR)
        passed = pages_read(url, look)
        move_front(beats)
        assert (passed > 100, pages_read(url, look) < 20) == (True, True)


# Who gets a message


def test_of_a_cancel_at_one_instance_and_a_claim_at_another_one_gets_the_message(make: Make) -> None:
    one, other, third = make(), make(), make()
    ids = fill(one, 300)
    start = threading.Barrier(4)

    def cancel(repository: PostgresRepository) -> list[str]:
        start.wait(HANG)
        return [message_id for message_id in ids if repository.cancel(message_id)]

    def take(repository: PostgresRepository) -> list[str]:
        taken: list[str] = []
        start.wait(HANG)
        while batch := repository.claim(7, 0.0).batch:
            taken += batch.ids
        return taken

    with ThreadPoolExecutor(4) as pool:
        cancelling = [pool.submit(cancel, one), pool.submit(cancel, third)]
        taking = [pool.submit(take, other), pool.submit(take, third)]
        cancelled = cancelling[0].result(HANG)
        assert cancelled == cancelling[1].result(HANG)  # whoever came second was told that it is cancelled, too
        claimed = [message_id for each in taking for message_id in each.result(HANG)]
    assert sorted(claimed + cancelled) == sorted(ids)
    assert {other.reason(message_id) for message_id in cancelled} <= {Reason.CANCELLED}
    assert one.backlog() == len(claimed)


def test_a_batch_whose_messages_another_instance_reported_is_sent_without_them(make: Make) -> None:
    one, other = make(), make()
    ids = fill(one, 4)
    batch = claim(one)
    other.update_all({ids[0]: MessageStatus.DELIVERED, ids[2]: MessageStatus.CONFIRMED})
    assert one.unsent(batch).ids == [ids[1], ids[3]]
    assert one.unsent(batch.only(lambda each: each.message.message_id == ids[3])).ids == [ids[3]]


def test_nothing_is_left_to_send_of_a_batch_that_another_took_over(cluster: Cluster, url: str, make: Make) -> None:
    one, other = make(), make()
    fill(one, 2)
    batch = claim(one)
    let_pass(cluster, url, LEASE + 1)
    assert claim(other).ids == batch.ids
    left = one.unsent(batch)
    assert (left.ids, one.holds(left), one.holds(batch)) == ([], False, False)


def test_a_batch_of_which_another_instance_reported_all_is_not_lost(make: Make) -> None:
    one, other = make(), make()
    ids = fill(one, 2)
    batch = claim(one)
    other.update_all(dict.fromkeys(ids, MessageStatus.DELIVERED))
    left = one.unsent(batch)
    assert (left.ids, one.holds(left)) == ([], True)


def test_a_report_that_waits_for_a_lock_is_not_applied_to_what_is_accepted_anew_meanwhile(
    cluster: Cluster, url: str, make: Make
) -> None:
    repository = make()
    repository.save_all([entry("a", linger=HOUR), entry("b")])
    repository.handed_over(claim(repository))
    with psycopg.connect(url) as db, ThreadPoolExecutor(1) as pool:
        db.execute("SELECT FROM smsproxy.message WHERE id = 'a' FOR UPDATE")
        report = pool.submit(repository.update_all, dict.fromkeys("ab", MessageStatus.DELIVERED))
        waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"
        until(lambda: cluster.sql(url, waits)[0][0], "the report that waits")
        cluster.sql(url, "UPDATE smsproxy.message SET changed_at = '2020-01-01' WHERE id = 'b'")
        assert make().save_all([entry("b")]) == [None]
        db.commit()
        assert list(report.result(HANG)) == ["b"]
    assert repository.get("b") is MessageStatus.ACCEPTED
    batch = claim(repository)
    assert repository.unsent(batch).ids == ["b"]
    repository.handed_over(batch)
    assert cluster.sql(url, "SELECT count(*) FROM smsproxy.outbox")[0][0] == 0


def test_a_batch_is_not_taken_over_while_somebody_has_one_of_its_messages(
    cluster: Cluster, url: str, make: Make
) -> None:
    """He may wait for the pulse, which whoever takes over may have."""
    one, other = make(), make()
    ids = fill(one, 2)
    claim(one)
    let_pass(cluster, url, LEASE + 1)
    with psycopg.connect(url) as db:
        db.execute("SELECT FROM smsproxy.message WHERE id = %s FOR UPDATE", ids[:1])
        assert other.claim(100, 0.0).batch is None
    assert claim(other).ids == ids


def test_while_the_database_is_away_what_is_known_here_counts(cluster: Cluster, passage: Passage, make: Make) -> None:
    repository = make(cluster.url("test", passage.port))
    repository._leases.clock = clock = Clock()
    ids = fill(repository, 3)
    batch = claim(repository)
    repository.update_all({ids[1]: MessageStatus.DELIVERED})
    passage.cut()
    assert repository.unsent(batch).ids == [ids[0], ids[2]]
    clock.now += LEASE
    assert not repository.holds(batch)
    assert repository.unsent(batch).ids == []


def test_a_message_whose_update_is_refused_stays_in_its_batch(cluster: Cluster, url: str, make: Make) -> None:
    one, other = make(), make()
    ids = fill(one, 1)
    claim(one)
    assert isinstance(one.update_all({ids[0]: MessageStatus.ACCEPTED})[ids[0]], StatusTransitionError)
    assert other.claim(1, 0.0).batch is None
    let_pass(cluster, url, LEASE + 1)
    assert claim(other).ids == ids


# Expiry


def test_what_expires_does_so_by_the_clock_of_the_database(cluster: Cluster, url: str, make: Make) -> None:
    one, other = make(clock=Clock()), make(clock=Clock())
    ids = fill(one, 2, linger=50.0, max_age=100.0)
    assert one.expire()[0] == other.expire()[0] == []
    let_pass(cluster, url, 101.0)
    assert sorted(other.expire()[0]) == sorted(ids)
    assert one.expire()[0] == []
    assert {one.reason(each) for each in ids} == {Reason.EXPIRED}
    assert (one.backlog(), other.backlog()) == (0, 0)


def test_expiry_is_looked_for_every_second_while_anything_expires_and_every_two_while_nothing_does(make: Make) -> None:
    one, other = make(), make()
    assert {1.0 < one.expire()[1] <= 2.0 for _ in range(20)} == {True}
    fill(one, 1, max_age=HOUR)
    waits = [other.expire()[1] for _ in range(20)]
    assert {0.5 < wait <= 1.0 for wait in waits} == {True}
    assert len(set(waits)) > 1  # instances look at different moments
    claim(one)
    fill(one, 1, linger=0.1, max_age=0.2)
    assert other.expire()[1] <= 0.2
    began = time.monotonic()
    until(lambda: other.expire()[0], "the expiry")
    assert time.monotonic() - began < 10.0


def test_what_expires_at_two_instances_at_once_does_so_once(cluster: Cluster, url: str, make: Make) -> None:
    repositories = [make(), make()]
    ids = fill(repositories[0], 1_200, max_age=10.0)
    let_pass(cluster, url, 11.0)

    def expire(repository: PostgresRepository) -> list[str]:
        found: list[str] = []
        while step := repository.expire()[0]:
            found += step
        return found

    with ThreadPoolExecutor(2) as pool:
        found = [message_id for each in pool.map(expire, repositories) for message_id in each]
    assert sorted(found) == sorted(ids)
