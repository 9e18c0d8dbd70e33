"""The contract that memory and SQLite keep, kept by PostgreSQL."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cluster import Cluster, let_pass
from postgres import PostgresRepository
from repository_contract import RETENTION, RepositoryContract


class TestPostgresRepository(RepositoryContract):
    @pytest.fixture
    def repository(self, url: str) -> Iterator[PostgresRepository]:
        repository = PostgresRepository(url, RETENTION, lease=10 * RETENTION)  # far longer than anything that passes
        yield repository
        repository.close()

    @pytest.fixture
    def age(self, cluster: Cluster, url: str, repository: PostgresRepository) -> Callable[[float], None]:
        def age(seconds: float) -> None:
            let_pass(cluster, url, seconds)
            repository._forget_at -= seconds

        return age
