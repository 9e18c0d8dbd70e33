"""A throw-away cluster of PostgreSQL for the tests, and an empty database for each of them."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import postgres.repository
from cluster import HANG, Bouncer, Cluster, Passage, find_programs, run_as
from postgres import PostgresRepository
from repositories import LEASE, Make


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The server, started with `initdb` in a directory of its own."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server programs are missing (initdb is neither in PATH nor in /usr/lib/postgresql)")
    with tempfile.TemporaryDirectory(prefix="smsproxy-pg-", ignore_cleanup_errors=True) as directory:
        server = Cluster(programs, run_as(Path(directory)), Path(directory))
        try:
            server.start()
            yield server
            assert "deadlock detected" not in server.log()  # everybody takes locks in the same order
        finally:
            server.stop()


@pytest.fixture(scope="session")
def database(cluster: Cluster) -> str:
    """The URL of the one database: to make one takes longer than most tests."""
    return cluster.create("test")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that other tests keep busy is no sick database. The tests of limits set limits of their own."""
    monkeypatch.setattr(postgres.repository, "CHECK_TIMEOUT", HANG)


@pytest.fixture
def url(cluster: Cluster, database: str) -> str:
    """The URL of the database, as empty as a new one, and used by nobody."""
    leave = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'test'"
    cluster.sql("postgres", f"ALTER DATABASE test RESET ALL; {leave}")
    cluster.sql(database, "DROP SCHEMA IF EXISTS smsproxy CASCADE")
    return database


@pytest.fixture
def make(url: str) -> Iterator[Make]:
    """Makes repositories on the test's database, and closes them."""
    made: list[PostgresRepository] = []

    def factory(given: str = url, **options: Any) -> PostgresRepository:
        options = {"lease": LEASE, **options}
        made.append(PostgresRepository(given, **options))
        return made[-1]

    yield factory
    for repository in made:
        repository.close()


@pytest.fixture
def repository(make: Make) -> PostgresRepository:
    """A repository on a new database."""
    return make()


@pytest.fixture
def passage(cluster: Cluster) -> Iterator[Passage]:
    """A way to the cluster that can be cut."""
    way = Passage(cluster)
    yield way
    way.close()


@pytest.fixture
def bouncer(cluster: Cluster) -> Iterator[Bouncer]:
    """PgBouncer in transaction mode in front of the cluster."""
    pooler = Bouncer.find(cluster)
    if pooler is None:
        pytest.skip("pgbouncer is not installed")
    try:
        pooler.start()
        yield pooler
    finally:
        pooler.stop()
