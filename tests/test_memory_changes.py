"""The outbox of changes in memory does what every one does, at the very moment."""
from __future__ import annotations

from collections.abc import Callable

import pytest

from base_repository import Claim
from change_contract import RETENTION, ChangeContract, claimed
from change_outbox import GATHER, ChangeOutbox
from helpers import Clock
from memory_repository import InMemoryRepository
from message_model import MessageStatus
from repository_contract import entries, name


class TestInMemory(ChangeContract):
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def age(self, clock: Clock) -> Callable[[float], None]:
        return clock.advance

    @pytest.fixture
    def repository(self, clock: Clock) -> InMemoryRepository:
        return InMemoryRepository(RETENTION, clock=clock, wall_clock=lambda: 1.8e9 + 0.123456 + clock())

    def test_a_change_is_due_a_second_after_it_happened_and_a_full_body_before(
        self, repository: InMemoryRepository, changes: ChangeOutbox, clock: Clock
    ) -> None:
        repository.save_all(entries(range(3)))
        repository.update_all({name(0): MessageStatus.DELIVERED})
        clock.advance(0.25)
        repository.update_all({name(1): MessageStatus.DELIVERED})
        assert changes.claim(3, 1.0) == Claim(None, 2, GATHER - 0.25, near=2)
        repository.update_all({name(2): MessageStatus.DELIVERED})
        assert len(changes.claim(3, 1.0).batch or ()) == 3

    def test_the_oldest_change_of_a_body_counts_and_what_is_not_in_it_waits(
        self, repository: InMemoryRepository, changes: ChangeOutbox, clock: Clock
    ) -> None:
        repository.save_all(entries(range(3)))
        for number in range(3):
            repository.update_all({name(number): MessageStatus.DELIVERED})
            clock.advance(10.0)
        assert changes.claim(2, 0.0).waiting == 1
        assert changes.pending() == (3, 30.0)

    def test_a_body_expires_when_the_last_of_its_messages_is_forgotten(
        self, repository: InMemoryRepository, changes: ChangeOutbox, clock: Clock
    ) -> None:
        repository.save_all(entries(range(2)))
        for number in range(2):
            repository.update_all({name(number): MessageStatus.DELIVERED})
            clock.advance(10.0)
        body = claimed(changes)
        assert body is not None
        assert body.expires_at == clock() - 10.0 + RETENTION
        assert (len(body.unexpired(clock())), len(body.unexpired(body.expires_at))) == (2, 0)

    def test_with_a_retention_of_0_nothing_expires(self, clock: Clock) -> None:
        repository = InMemoryRepository(0, clock=clock)
        changes = repository.changes()
        repository.save_all(entries(range(1)))
        repository.update_all({name(0): MessageStatus.DELIVERED})
        clock.advance(1e9)
        body = claimed(changes)
        assert body is not None
        assert body.expires_at == float("inf")
