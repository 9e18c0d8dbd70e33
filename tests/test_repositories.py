"""The repository in a file does what every repository does."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import Clock
from repository_contract import RETENTION, RepositoryContract, entry, name
from smsproxy import MessageStatus, Repository
from sqlite_repository import SqliteRepository


class TestSqlite(RepositoryContract):
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def age(self, clock: Clock) -> Callable[[float], None]:
        return clock.advance

    @pytest.fixture
    def repository(self, clock: Clock, tmp_path: Path) -> Iterator[Repository]:
        made = SqliteRepository(str(tmp_path / "sms.db"), RETENTION, clock=clock, wall_clock=lambda: 1.8e9 + clock())
        with contextlib.closing(made):
            yield made

    def test_it_neither_blocks_nor_outlives_the_process(self, repository: Repository) -> None:
        assert (repository.blocking, repository.durable, repository.poll) == (True, True, None)
        assert repository.size() > 0

    def test_messages_are_forgotten_a_few_at_a_time_and_leave_nothing_behind(
        self, repository: Repository, clock: Clock
    ) -> None:
        repository.save_all([entry(number) for number in range(3_000)])
        repository.update_all({name(number): MessageStatus.DELIVERED for number in range(3_000)})
        clock.advance(RETENTION * 1.02)
        calls = 0
        while repository.forget() == 0.0:
            calls += 1
        assert 4 <= calls <= 20
        assert repository.save_all([entry(number) for number in range(3_000)]) == [None] * 3_000

    def test_a_retention_of_0_keeps_messages_for_ever(self, clock: Clock, tmp_path: Path) -> None:
        made = SqliteRepository(str(tmp_path / "kept.db"), 0, clock=clock, wall_clock=lambda: 1.8e9 + clock())
        with contextlib.closing(made) as repository:
            repository.save(name(1))
            clock.advance(1e9)
            assert repository.forget() is None
            assert repository.get(name(1)) is MessageStatus.ACCEPTED

    def test_a_remembered_message_takes_little_memory(self, repository: Repository) -> None:
        for start in range(0, 5_000, 500):
            repository.save_all([entry(number) for number in range(start, start + 500)])
            batch = repository.claim(500, 0.0).batch
            assert batch is not None
            repository.handed_over(batch)
            repository.update_all(dict.fromkeys(batch.ids, MessageStatus.DELIVERED))
        assert repository.size() / 5_000 < 2_000
