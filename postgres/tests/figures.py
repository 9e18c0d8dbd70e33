"""Measures what README.md quotes, on a throw-away server: python postgres/tests/figures.py [--messages 100000]

Prints what a save, a look and a claim cost with so many messages that wait or are claimed; the statements of one
process per message, and what stays in the tables with a retention of one second; what the webhook costs; and the time
from the kill of one of two instances to the end of the last request for what was accepted.
"""
from __future__ import annotations

import argparse
import math
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import psycopg  # noqa: E402

import postgres.connections  # noqa: E402
from cluster import Cluster, find_programs, run_as, until  # noqa: E402
from fastsmsing import InMemoryClient, Message  # noqa: E402
from message_ids import NewIds  # noqa: E402
from message_model import Entry, MessageStatus  # noqa: E402
from postgres import PostgresRepository  # noqa: E402
from service import Load, Service  # noqa: E402
from smsproxy import SendMessage, SmsProxy, SmsProxyConfig  # noqa: E402

GROUP = 16  # messages that are accepted together


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the statements that are sent, by their first words."""
    execute, counts = postgres.connections._execute, Counter[str]()

    def count(db: Any, sql: str, parameters: Any, timeout: float) -> Any:
        counts[" ".join(sql.split())[:60]] += 1
        return execute(db, sql, parameters, timeout)

    postgres.connections._execute = count
    try:
        yield counts
    finally:
        postgres.connections._execute = execute


def tables(cluster: Cluster, url: str) -> dict[str, tuple[int, str]]:
    """Rows and size of each table."""
    sizes = """
        SELECT c.relname, pg_size_pretty(pg_total_relation_size(c.oid)) FROM pg_class c
        JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'smsproxy' AND c.relkind = 'r'
    """
    found = cluster.sql(url, sizes)
    return {name: (cluster.sql(url, f"SELECT count(*) FROM smsproxy.{name}")[0][0], size) for name, size in found}


def median(call: Callable[[], object], times: int) -> float:
    """Milliseconds that a call takes."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1000


def costs(cluster: Cluster, waiting: int, claimed: int) -> None:
    """What a save of one and of 16 messages, a look that finds nothing due, and a claim of 100 messages cost."""
    url, ids = cluster.create(f"costs_{waiting}_{claimed}"), NewIds()
    with closing(PostgresRepository(url, lease=3600.0)) as repository:

        def save(count: int) -> None:
            messages = [Message("48123456789", "Your parcel is here", ids()) for _ in range(count)]
            assert repository.save_all([Entry(message, linger=1e6) for message in messages]) == [None] * count

        def claim() -> None:
            assert len(repository.claim(100, math.inf).batch or ()) == 100

        for _ in range((waiting + claimed) // 1_000):
            save(1_000)
        save((waiting + claimed) % 1_000)
        for _ in range(claimed // 100):
            claim()
        for table in ("message", "outbox", "batch"):
            cluster.sql(url, f"VACUUM ANALYZE smsproxy.{table}")
        cluster.sql(url, "CHECKPOINT")
        one, group = median(lambda: save(1), 200), median(lambda: save(GROUP), 200)
        look, batch = median(lambda: repository.claim(100, 0.0), 100), median(claim, 30)
        print(f"{waiting:6} waiting, {claimed:6} claimed: save of 1 {one:.2f} ms, of {GROUP} {group:.2f} ms; "
              f"look {look:.2f} ms; claim of 100 {batch:.2f} ms")  # fmt: skip


def deliver(cluster: Cluster, messages: int) -> None:
    """Sends messages through one process in groups, until all are delivered and forgotten."""
    url = cluster.create("delivered")
    with closing(PostgresRepository(url, 1.0)) as repository, counted() as counts:
        proxy = SmsProxy(InMemoryClient(), SmsProxyConfig(max_delay=1.0), repository=repository)
        began = time.monotonic()
        with proxy:
            for _ in range(messages // GROUP):
                entries = [proxy.entry(SendMessage("48123456789", "Your parcel is here")) for _ in range(GROUP)]
                assert proxy.accept_all(entries) == [None] * GROUP
            accepted = time.monotonic() - began
            until(lambda: not repository.backlog(), "the last hand-over", 600.0)
            handed_over, statements = time.monotonic() - began, sum(counts.values())
            until(lambda: not cluster.sql(url, "SELECT id FROM smsproxy.message LIMIT 1"), "the last forgetting", 600.0)
        print(f"{messages} messages: accepted in {accepted:.1f} s, handed over after {handed_over:.1f} s, "
              f"{statements / messages:.3f} statements a message until then")  # fmt: skip
        for sql, count in counts.most_common():
            print(f"  {count:7} {sql}")
        print("tables at once:", tables(cluster, url))
        for table in ("message", "outbox", "batch"):
            cluster.sql(url, f"VACUUM smsproxy.{table}")
        print("tables after a vacuum:", tables(cluster, url))


def telling(cluster: Cluster) -> None:
    """What the webhook costs those who change a status, and what it costs to make bodies and to take them out, also
    while a transaction that stays open keeps vacuum from removing rows."""
    urls, ids = [cluster.create(name) for name in ("silent", "telling")], NewIds()
    with closing(PostgresRepository(urls[0])) as silent, closing(PostgresRepository(urls[1])) as told:
        changes = told.changes()

        def update(repository: PostgresRepository, count: int) -> float:
            messages = [Message("48123456789", "Your parcel is here", ids()) for _ in range(count)]
            assert repository.save_all([Entry(message, linger=1e6) for message in messages]) == [None] * count
            updates = {message.message_id: MessageStatus.DELIVERED for message in messages}
            return median(lambda: repository.update_all(updates), 1)

        def tell() -> tuple[int, float]:
            number, began = 0, time.monotonic()
            while (body := changes.claim(100, 1.0, flush=True).batch) is not None:
                assert changes.holds(body)
                changes.handed_over(body)
                number += len(body)
            return number, time.monotonic() - began

        for count in (1, 100):
            pairs = [(update(silent, count), update(told, count)) for _ in range(200)]  # by turns
            off, on = map(statistics.median, zip(*pairs, strict=True))
            print(f"update of {count}: {off:.2f} ms without a webhook, {on:.2f} ms with one")
        with psycopg.connect(urls[1]) as reader:
            reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM smsproxy.change")
            for when in ("first", "behind 20,000 dead rows", "behind 40,000 dead rows"):
                for _ in range(20):
                    update(told, 1_000)
                pending = median(changes.pending, 20)
                number, seconds = tell()
                print(f"{number} changes, {when}: {number / seconds:.0f} a second, pending() {pending:.2f} ms")


def in_request(service: Service) -> bool:
    """Whether the first instance has a request under way."""
    return any(request.end is None and request.instance == "instance1" for request in service.requests())


def kill(cluster: Cluster, directory: Path, lease: float) -> None:
    """Kills one of two instances under load, in the middle of a request."""
    url = cluster.create(f"killed_{lease:.0f}")
    service = Service(directory, url, 2, "--lease", f"{lease}", "--max-delay", "0.5", latency=0.3)
    with service.running() as instances:
        with Load(instances) as load:
            load.await_accepted(1000)
            until(lambda: in_request(service), "a request of the first instance")
            instances[0].signal(signal.SIGKILL)
            killed = time.monotonic()
            load.without(instances[0])
            accepted = list(load.accepted)
        until(lambda: service.sent().issuperset(accepted), "the last request", 120.0)
        ends = {each: request.end for request in service.requests() if request.taken for each in request.ids}
        last = max(end for each in accepted if (end := ends[each]) is not None)
        print(f"lease {lease:g} s: {last - killed:.1f} s from the kill to the end of the last request "
              f"for {len(accepted)} messages")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    messages = parser.parse_args().messages
    programs = find_programs()
    assert programs is not None, "PostgreSQL's server programs are not installed"
    with tempfile.TemporaryDirectory(prefix="smsproxy-pg-", ignore_cleanup_errors=True) as directory:
        cluster = Cluster(programs, run_as(Path(directory)), Path(directory))
        try:
            cluster.start()
            for waiting, claimed in ((0, 0), (400, 0), (100_000, 0), (0, 400), (0, 6_400), (0, 30_000), (0, 100_000)):
                costs(cluster, waiting, claimed)
            deliver(cluster, messages)
            telling(cluster)
            for lease in (3.0, 30.0):
                (Path(directory) / f"{lease}").mkdir()
                kill(cluster, Path(directory) / f"{lease}", lease)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
