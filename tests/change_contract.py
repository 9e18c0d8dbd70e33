"""What every outbox of changes has to do, whatever it keeps them in. Subclasses make one and say how time passes."""
from __future__ import annotations

import itertools
import random
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from base_repository import Repository
from change_outbox import Change, ChangeBody, ChangeOutbox
from fastsmsing import Message
from helpers import HANG
from message_model import Entry, MessageStatus, Reason
from repository_contract import ODD_IDS, RETENTION, entries, entry, name

__all__ = ["RETENTION", "SETTLED", "ChangeContract"]

CONFIRMED, FAILED, DELIVERED = MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED
SETTLED = 2.5  # seconds after which a change is due everywhere, however coarsely its time is kept
RANK = {CONFIRMED: 1, FAILED: 2, DELIVERED: 2}


def claimed(changes: ChangeOutbox, size: int = 100) -> ChangeBody | None:
    return changes.claim(size, 0.0).batch


class ChangeContract:
    """Fixtures to override: `repository`, which keeps messages for `RETENTION`, and `age`, which lets seconds pass."""

    @pytest.fixture
    def repository(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def age(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def changes(self, repository: Repository) -> ChangeOutbox:
        return repository.changes()

    def told(self, changes: ChangeOutbox, age: Callable[[float], None]) -> list[Change]:
        """All that is to be told, told."""
        told: list[Change] = []
        age(SETTLED)
        while body := claimed(changes):
            changes.handed_over(body)
            told += body.changes
        return told

    # What is told

    def test_at_first_there_is_nothing_to_tell(self, changes: ChangeOutbox, age: Callable[[float], None]) -> None:
        age(SETTLED)
        claim = changes.claim(100, 0.0)
        assert (claim.batch, claim.waiting, changes.pending()) == (None, 0, (0, 0.0))

    def test_a_change_is_told_when_it_has_gathered_others(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(3)))
        repository.update_all({name(1): DELIVERED})
        early = changes.claim(100, 0.0)
        assert early.batch is None
        assert 0 < early.due_in <= SETTLED
        repository.update_all({name(0): FAILED})
        age(SETTLED)
        body = claimed(changes)
        assert body is not None
        assert sorted(body.changes) == [Change(name(0), FAILED), Change(name(1), DELIVERED)]
        assert re.fullmatch("msg_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", body.id)
        assert body.timestamp == round(body.timestamp, 3) > 1e9

    def test_each_change_after_accepted_is_told_with_its_reason_and_nothing_else_is(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        kinds: list[MessageStatus | Reason] = [CONFIRMED, FAILED, DELIVERED, *list(Reason)[:3]]
        updates = dict(enumerate(kinds))
        repository.save_all([*entries(range(8)), entry(8, linger=50.0), entry(9, linger=50.0, max_age=1.0)])
        batch = repository.claim(3, 0.0).batch
        assert batch is not None
        repository.handed_over(batch)
        repository.update_all({name(number): update for number, update in updates.items()})
        assert repository.cancel(name(8))
        age(1.5)
        assert repository.expire()[0] == [name(9)]
        expected = [Change.of(name(number), update) for number, update in updates.items()]
        expected += [Change(name(8), FAILED, Reason.CANCELLED), Change(name(9), FAILED, Reason.EXPIRED)]
        assert sorted(self.told(changes, age)) == expected

    def test_an_update_that_is_refused_is_not_told(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(2)))
        repository.update_all({name(0): CONFIRMED, name(1): DELIVERED})
        assert sorted(self.told(changes, age)) == [Change(name(0), CONFIRMED), Change(name(1), DELIVERED)]
        refused = repository.update_all({name(0): Reason.EXPIRED, name(1): FAILED, name(2): FAILED})
        assert sorted(refused) == [name(0), name(1), name(2)]
        assert not repository.cancel(name(1))
        assert self.told(changes, age) == []

    def test_odd_ids_are_told_as_they_are(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        errors = repository.save_all([Entry(Message("48123", "Hi", each)) for each in ODD_IDS])
        stored = [each for each, error in zip(ODD_IDS, errors, strict=True) if error is None]
        repository.update_all(dict.fromkeys(stored, DELIVERED))
        assert sorted(change.message_id for change in self.told(changes, age)) == sorted(stored)

    def test_what_changed_before_it_was_asked_for_is_not_told(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(2)))
        repository.update_all({name(0): DELIVERED})
        age(SETTLED)
        changes = repository.changes()
        repository.update_all({name(1): DELIVERED})
        assert self.told(changes, age) == [Change(name(1), DELIVERED)]

    # In which order

    def test_a_message_that_changed_twice_is_told_once_with_its_newest_status(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(1)))
        for update in (CONFIRMED, FAILED):
            repository.update_all({name(0): update})
        assert self.told(changes, age) == [Change(name(0), FAILED)]

    def test_while_a_body_is_under_way_nothing_else_can_be_claimed(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(2)))
        repository.update_all({name(0): CONFIRMED})
        age(SETTLED)
        first = claimed(changes)
        assert first is not None
        repository.update_all(dict.fromkeys([name(0), name(1)], DELIVERED))
        age(SETTLED)
        claim = changes.claim(100, 0.0, flush=True)
        assert (claim.batch, claim.waiting) == (None, 0)
        assert changes.holds(first)
        changes.handed_over(first)
        assert first.changes == (Change(name(0), CONFIRMED),)
        assert sorted(self.told(changes, age)) == [Change(name(0), DELIVERED), Change(name(1), DELIVERED)]

    def test_a_body_that_is_released_comes_again_as_it_was(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(3)))
        repository.update_all({name(0): CONFIRMED, name(1): DELIVERED})
        age(SETTLED)
        first = claimed(changes)
        assert first is not None
        repository.update_all({name(0): DELIVERED, name(2): DELIVERED})
        age(SETTLED)
        changes.release(first)
        assert claimed(changes, 1) == first
        changes.handed_over(first)
        assert sorted(self.told(changes, age)) == [Change(name(0), DELIVERED), Change(name(2), DELIVERED)]

    def test_a_body_that_was_handed_over_before_hands_over_no_other(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(2)))
        bodies: list[ChangeBody] = []
        for number in range(2):
            repository.update_all({name(number): DELIVERED})
            age(SETTLED)
            body = claimed(changes)
            assert body is not None
            bodies.append(body)
            changes.handed_over(bodies[0])
        changes.release(bodies[0])
        assert claimed(changes) is None
        changes.release(bodies[1])
        assert claimed(changes) == bodies[1]

    def test_bodies_have_a_size_at_the_most_and_together_all_changes(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        for start in range(0, 1_050, 350):
            repository.save_all(entries(range(start, start + 350)))
            repository.update_all({name(number): DELIVERED for number in range(start, start + 350)})
            age(0.7)
        age(SETTLED)
        bodies: list[ChangeBody] = []
        while body := claimed(changes):
            changes.handed_over(body)
            bodies.append(body)
        assert [len(each) for each in bodies] == [100] * 10 + [50]
        assert sorted(message_id for each in bodies for message_id in each.ids) == [name(each) for each in range(1_050)]
        assert len({each.id for each in bodies}) == 11

    @pytest.mark.parametrize("seed", range(10))
    def test_no_status_is_told_backwards_and_the_last_one_always_is(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None], seed: int
    ) -> None:
        rng = random.Random(seed)
        repository.save_all(entries(range(60)))
        told: dict[str, MessageStatus] = {}
        body: ChangeBody | None = None
        for _ in range(60):
            numbers = [rng.randrange(60) for _ in range(rng.randrange(8))]
            repository.update_all({name(each): rng.choice([CONFIRMED, DELIVERED, FAILED]) for each in numbers})
            age(rng.choice([0.0, 0.3, 1.0]))
            body = body or claimed(changes, rng.choice([3, 100]))
            if body is not None and rng.random() < 0.6:
                if rng.random() < 0.3:
                    changes.release(body)
                else:
                    self.check_order(told, body.changes)
                    changes.handed_over(body)
                body = None
        if body is not None:
            changes.release(body)
        self.check_order(told, self.told(changes, age))
        statuses = {name(each): repository.get(name(each)) for each in range(60)}
        assert told == {each: status for each, status in statuses.items() if status is not MessageStatus.ACCEPTED}

    def check_order(self, told: dict[str, MessageStatus], changes: Any) -> None:
        for change in changes:
            assert RANK[change.status] > (RANK[told[change.message_id]] if change.message_id in told else 0)
            told[change.message_id] = change.status

    def test_changes_from_several_threads_are_all_told_while_bodies_leave(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(400)))
        told: dict[str, MessageStatus] = {}

        def change(first: int) -> None:
            for status in (CONFIRMED, DELIVERED):
                for number in range(first, first + 100, 10):
                    repository.update_all({name(each): status for each in range(number, number + 10)})

        threads = [threading.Thread(target=change, args=(first,)) for first in range(0, 400, 100)]
        for thread in threads:
            thread.start()
        steps = range(int(RETENTION / 4))  # on a busy machine the loop below could go on until they are forgotten
        for step in itertools.takewhile(lambda _: any(thread.is_alive() for thread in threads), itertools.count()):
            if step in steps:
                age(0.1)
            if body := claimed(changes, 30):
                self.check_order(told, body.changes)
                changes.handed_over(body)
        for thread in threads:
            thread.join(HANG)
        self.check_order(told, self.told(changes, age))
        assert told == {name(number): DELIVERED for number in range(400)}

    # How much is pending

    def test_it_tells_how_many_wait_and_for_how_long(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(30)))
        repository.update_all({name(number): DELIVERED for number in range(20)})
        age(SETTLED)
        body = claimed(changes)
        assert body is not None
        repository.update_all({name(number): DELIVERED for number in range(20, 30)})
        age(SETTLED)
        number, seconds = changes.pending()
        assert number == 30
        assert 2 * SETTLED - 1.1 <= seconds <= 2 * SETTLED + 1.1
        changes.handed_over(body)
        number, seconds = changes.pending()
        assert number == 10
        assert SETTLED - 1.1 <= seconds <= SETTLED + 1.1
        self.told(changes, age)
        assert changes.pending() == (0, 0.0)

    def test_what_is_forgotten_is_not_told_any_more(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(2)))
        repository.update_all({name(0): DELIVERED})
        age(RETENTION * 1.1)
        repository.forget()
        repository.update_all({name(1): DELIVERED})
        assert self.told(changes, age) == [Change(name(1), DELIVERED)]
        assert changes.pending() == (0, 0.0)


class DurableChangeContract(ChangeContract):
    """What an outbox that outlives the process has to do besides. `restart` opens the repository anew."""

    @pytest.fixture
    def restart(self) -> Any:
        raise NotImplementedError

    def test_a_restart_tells_what_the_last_body_did_not(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None],
        restart: Callable[[Repository], Repository],
    ) -> None:  # fmt: skip
        repository.save_all(entries(range(3)))
        repository.update_all({name(0): DELIVERED})
        assert self.told(changes, age) == [Change(name(0), DELIVERED)]
        repository.update_all({name(1): DELIVERED})
        again = restart(repository)
        again.update_all({name(2): Reason.EXPIRED})
        expected = [Change(name(1), DELIVERED), Change(name(2), FAILED, Reason.EXPIRED)]
        assert sorted(self.told(again.changes(), age)) == expected

    @pytest.mark.parametrize("released", [False, True])
    def test_a_body_under_way_comes_first_after_a_restart_as_it_was(
        self, repository: Repository, changes: ChangeOutbox, age: Callable[[float], None],
        restart: Callable[[Repository], Repository], released: bool,
    ) -> None:  # fmt: skip
        repository.save_all(entries(range(2)))
        repository.update_all({name(0): CONFIRMED})
        age(SETTLED)
        first = claimed(changes)
        assert first is not None
        repository.update_all(dict.fromkeys([name(0), name(1)], DELIVERED))
        if released:
            changes.release(first)
        again = restart(repository).changes()
        age(SETTLED)
        assert claimed(again) == first
        again.handed_over(first)
        assert sorted(self.told(again, age)) == [Change(name(0), DELIVERED), Change(name(1), DELIVERED)]
