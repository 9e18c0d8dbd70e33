"""Measures what README.md quotes, on a throw-away server: python postgres/tests/figures.py [--messages 100000]

Prints the statements of one process per message, what stays in the tables with a retention of one second, and the time
from the kill of one of two instances to the end of the last request for what was accepted.
"""
from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import postgres.connections  # noqa: E402
from cluster import Cluster, find_programs, run_as, until  # noqa: E402
from fastsmsing import InMemoryClient  # noqa: E402
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
    found = cluster.sql(url, "SELECT c.relname, pg_size_pretty(pg_total_relation_size(c.oid)) FROM pg_class c "
                        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'smsproxy' AND c.relkind = 'r'")  # fmt: skip
    return {name: (cluster.sql(url, f"SELECT count(*) FROM smsproxy.{name}")[0][0], size) for name, size in found}


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


def in_request(service: Service) -> bool:
    """Whether the first instance has a request under way."""
    return any(request.end is None and request.instance == "instance1" for request in service.requests())


def kill(cluster: Cluster, directory: Path, lease: float) -> None:
    """Kills one of two instances under load, in the middle of a request."""
    service = Service(directory, cluster.create(f"killed_{lease:.0f}"), 2, "--lease", f"{lease}", "--max-delay", "0.5", latency=0.3)
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
        print(f"lease {lease:g} s: {last - killed:.1f} s from the kill to the end of the last request for {len(accepted)} messages")


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
            deliver(cluster, messages)
            for lease in (3.0, 30.0):
                (Path(directory) / f"{lease}").mkdir()
                kill(cluster, Path(directory) / f"{lease}", lease)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
