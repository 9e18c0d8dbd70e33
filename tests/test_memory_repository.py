"""The repository in memory does what every repository does."""
from __future__ import annotations

import gc
import math
import random
import tracemalloc
from collections.abc import Callable

import pytest

from fastsmsing import Message
from helpers import Clock
from memory_outbox import SPARE
from memory_repository import InMemoryRepository
from message_model import Batch, Entry, MessageStatus
from repository_contract import RETENTION, RepositoryContract, entry, name


class TestInMemory(RepositoryContract):
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def age(self, clock: Clock) -> Callable[[float], None]:
        return clock.advance

    @pytest.fixture
    def repository(self, clock: Clock) -> InMemoryRepository:
        return InMemoryRepository(RETENTION, clock=clock)

    def test_it_neither_blocks_nor_outlives_the_process(self, repository: InMemoryRepository) -> None:
        assert (repository.blocking, repository.durable, repository.poll, repository.size()) == (False, False, None, 0)

    def test_messages_are_forgotten_a_few_at_a_time_and_leave_nothing_behind(
        self, repository: InMemoryRepository, clock: Clock
    ) -> None:
        for number in range(3_000):
            repository.save(name(number))
            repository.update(name(number), MessageStatus.DELIVERED)
        clock.advance(RETENTION * 1.01)
        calls = 0
        while repository.forget() == 0.0:
            calls += 1
        assert 4 <= calls <= 20
        assert not any(vars(repository)[each] for each in ("_records", "_slices", "_fingerprints"))

    def test_nothing_is_kept_of_what_was_handed_over_however_long_another_message_waits(
        self, repository: InMemoryRepository
    ) -> None:
        repository.save_all([Entry(Message("48123456789", "this one waits for an hour", name(0)), linger=3600.0)])
        for number in range(1, 10):
            repository.save_all([Entry(Message("48123456789", "this one has left", name(number)))])
            batch = repository.claim(1, 0.0).batch
            assert batch is not None
            repository.handed_over(batch)
        del batch
        texts = [each.message for each in gc.get_objects() if isinstance(each, Message)]
        assert ("this one waits for an hour" in texts, "this one has left" in texts) == (True, False)

    def test_little_is_kept_of_what_was_cancelled(self, repository: InMemoryRepository) -> None:
        for number in range(3 * SPARE):
            message = Message("48123456789", "this one was cancelled", name(number))
            repository.save_all([Entry(message, linger=3600.0, max_age=7200.0)])
            assert repository.cancel(name(number))
        del message
        kept = [each for each in gc.get_objects() if isinstance(each, Message) and "cancelled" in each.message]
        assert len(kept) <= SPARE

    def test_a_message_takes_no_more_memory_for_being_claimed_and_released_again_and_again(
        self, repository: InMemoryRepository
    ) -> None:
        repository.save_all([entry(number, linger=3600.0, max_age=7200.0) for number in range(100)])
        repository.save_all([entry(100)])

        def again(times: int) -> int:
            for _ in range(times):
                batch = repository.claim(101, 0.0).batch
                assert batch is not None
                repository.release(batch)
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = again(10)
            after = again(200)
        finally:
            tracemalloc.stop()
        assert after - before < 100_000

    @pytest.mark.parametrize("looks", range(3))
    def test_what_is_too_old_when_it_is_released_expires_then(
        self, repository: InMemoryRepository, clock: Clock, looks: int
    ) -> None:
        repository.save_all([entry(number, max_age=10.0 + number) for number in range(4)])
        batch = repository.claim(4, 0.0).batch
        assert batch is not None
        clock.advance(12.0)
        for _ in range(looks):
            assert repository.expire() == ([], 1.0)
        repository.release(batch.only(lambda each: each.message.message_id != name(1)))
        assert repository.expire() == ([name(0), name(2)], 1.0)
        clock.advance(2.0)
        assert repository.expire() == ([name(3)], math.inf)
        repository.release(batch)
        assert repository.expire() == ([name(1)], math.inf)

    def test_an_expiry_is_to_be_looked_for_when_the_first_message_expires(self, repository: InMemoryRepository) -> None:
        for number, age in enumerate((90.0, 50.0)):
            repository.save_all([Entry(Message("48123456789", "Hi", name(number)), linger=20.0, max_age=age)])
        expired, following = repository.expire()
        assert (expired, round(following, 6)) == ([], 50.0)

    def test_the_oldest_message_is_known_whatever_was_accepted_with_it(
        self, repository: InMemoryRepository, clock: Clock
    ) -> None:
        for numbers in ((0, 1), (2,)):  # at one moment
            repository.save_all([Entry(Message("48123456789", "Hi", name(number))) for number in numbers])
        clock.advance(10.0)
        repository.save_all([Entry(Message("48123456789", "Hi", name(3)))])
        clock.advance(5.0)
        ages = []
        for _ in range(4):
            ages.append(repository.ages().oldest)
            batch = repository.claim(1, 0.0).batch
            assert batch is not None
            repository.handed_over(batch)
        assert ages == [15.0, 15.0, 15.0, 5.0]
        assert repository.ages().oldest == 0.0

    def test_forgetting_waits_for_the_first_message_that_is_due(
        self, repository: InMemoryRepository, clock: Clock
    ) -> None:
        repository.forget()
        for number in range(2):
            repository.save(name(number))
            clock.advance(RETENTION * 0.4)
        clock.advance(RETENTION * 0.1)
        repository.forget()
        assert repository.forget() == pytest.approx(RETENTION * 0.1, abs=RETENTION / 100)

    def test_a_retention_of_0_keeps_messages_for_ever(self, clock: Clock) -> None:
        repository = InMemoryRepository(0, clock=clock)
        repository.save(name(1))
        clock.advance(1e12)
        assert repository.forget() is None
        assert repository.get(name(1)) is MessageStatus.ACCEPTED

    def test_a_remembered_message_takes_little_memory(self, repository: InMemoryRepository) -> None:
        tracemalloc.start()
        try:
            for number in range(5_000):
                repository.save_all([entry(number)])
                batch = repository.claim(1, 0.0).batch
                assert batch is not None
                repository.handed_over(batch)
                repository.update(name(number), MessageStatus.DELIVERED)
            del batch
            size, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert size / 5_000 < 320

    def test_nothing_is_left_of_messages_that_were_cancelled(self, repository: InMemoryRepository) -> None:
        size = 0
        for number in range(20_000):
            if number == 5_000:
                tracemalloc.start()
            repository.save_all([entry(number % 5_000, linger=600_000.0 - number % 7, max_age=600_000.0)])
            assert repository.cancel(name(number % 5_000))
            repository._records.clear()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size < 3_000_000

    @pytest.mark.parametrize("seed", range(100))
    def test_it_keeps_the_order_of_a_sorted_list(self, repository: InMemoryRepository, clock: Clock, seed: int) -> None:
        rng = random.Random(seed)
        waiting: list[Entry] = []
        claimed: list[Batch] = []
        for number in range(300):
            step = rng.random()
            if step < 0.5:
                new = entry(number, linger=rng.choice([0.0, 5.0, 5.0, 60.0, rng.uniform(0, 100)]))
                repository.save_all([new])
                waiting.append(new)
            elif step < 0.7:
                waiting.sort(key=lambda each: (each.due, each.place))
                batch = repository.claim(rng.randrange(1, 9), 0.0, flush=True).batch
                expected = waiting[: len(batch)] if batch else []
                assert (list(batch.entries) if batch else []) == expected
                claimed += [batch] if batch else []
                del waiting[: len(expected)]
            elif step < 0.8 and claimed:
                batch = claimed.pop(rng.randrange(len(claimed)))
                repository.release(batch)
                waiting += batch.entries
            elif step < 0.9 and waiting:
                gone = waiting.pop(rng.randrange(len(waiting)))
                assert repository.cancel(gone.message.message_id)
            else:
                clock.advance(rng.uniform(0, 3))
        assert repository.backlog() == len(waiting) + sum(map(len, claimed))
