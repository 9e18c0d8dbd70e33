"""What every repository has to do, wherever it keeps things. Subclasses say how to make one and how time passes."""
from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from base_repository import Cancelled, Claim, Repository
from fastsmsing import Message
from helpers import HANG
from message_model import (
    TRANSITIONS,
    Batch,
    DuplicateMessageError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    StatusTransitionError,
    UnknownMessageError,
)  # fmt: skip

RETENTION = 100.0  # seconds
ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus
ODD_IDS = ["", "x" * 10_000, "a\0b", "\ud800", "ünïcode", "'; DROP TABLE message; --", "%",
           "01a21087-c443-7ce3-b466-961e7f7bd65c"]  # fmt: skip
CONTENTS = ["Hi", "a\0b", "\0", "x" * 1600, "Zażółć 🎉 gęślą", "'\"\\ %s {} \r\n\t", " "]
ID = "01a21087-c443-7ce3-b466-{:012x}"


def name(number: int) -> str:
    return ID.format(number)


def entry(
    number: int = 0, content: str = "Hi", fingerprint: bytes | None = None, *, linger: float = 0.0,
    default: bool = False, max_age: float = math.inf,
) -> Entry:  # fmt: skip
    return Entry(Message("48123456789", content, name(number)), fingerprint, linger, default, max_age)


def entries(numbers: Iterable[int], linger: float = 0.0) -> list[Entry]:
    return [entry(number, linger=linger) for number in numbers]


class RepositoryContract:
    """Fixtures to override: `repository`, which keeps messages for `RETENTION`, and `age`, which lets seconds pass."""

    @pytest.fixture
    def repository(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def age(self) -> Any:
        raise NotImplementedError

    def numbers(self, batch: Batch | None) -> list[int]:
        return [] if batch is None else [int(message_id[-12:], 16) for message_id in batch.ids]

    # Saving

    def test_what_is_saved_is_accepted_and_in_the_outbox(self, repository: Repository) -> None:
        assert repository.save_all([entry(1), entry(2)]) == [None, None]
        assert [repository.get(name(number)) for number in (1, 2, 3)] == [ACCEPTED, ACCEPTED, NOT_FOUND]
        assert repository.backlog() == 2

    def test_an_id_is_stored_once_also_within_a_group(self, repository: Repository) -> None:
        repository.save_all([entry(1, fingerprint=b"one" * 5)])
        errors = repository.save_all([entry(2), entry(1), entry(3), entry(2)])
        duplicate, saved = DuplicateMessageError, type(None)
        assert [type(error) for error in errors] == [saved, duplicate, saved, duplicate]
        assert isinstance(errors[1], DuplicateMessageError)
        assert errors[1].fingerprint == b"one" * 5
        assert isinstance(errors[3], DuplicateMessageError)
        assert errors[3].fingerprint is None
        assert repository.backlog() == 3

    def test_no_more_are_stored_than_may_be_pending_and_duplicates_are_told_first(self, repository: Repository) -> None:
        repository.save_all([entry(1), entry(2)])
        errors = repository.save_all([entry(3), entry(4), entry(1)], 3)
        assert [type(error) for error in errors] == [type(None), OverloadedError, DuplicateMessageError]
        errors = repository.save_all([entry(2), entry(5)], 3)
        assert [type(error) for error in errors] == [DuplicateMessageError, OverloadedError]
        errors = repository.save_all([entry(6), entry(6), entry(7)], 4)
        assert [type(error) for error in errors] == [type(None), DuplicateMessageError, OverloadedError]
        assert repository.get(name(4)) is repository.get(name(5)) is NOT_FOUND

    def test_saving_one_raises_what_is_wrong(self, repository: Repository) -> None:
        repository.save(name(1), Message("48123", "Hi", "another"))
        with pytest.raises(DuplicateMessageError):
            repository.save(name(1))
        assert repository.backlog() == 1

    def test_without_a_message_there_is_nothing_to_send(self, repository: Repository) -> None:
        repository.save(name(1))
        assert (repository.get(name(1)), repository.backlog()) == (ACCEPTED, 0)

    @pytest.mark.parametrize("content", CONTENTS)
    def test_content_arrives_unchanged(self, repository: Repository, content: str) -> None:
        repository.save_all([entry(1, content)])
        batch = repository.claim(1, 0.0).batch
        assert batch is not None
        assert [each.message for each in batch.entries] == [Message("48123456789", content, name(1))]

    def test_a_list_is_stored_as_a_whole_each_message_at_its_place(self, repository: Repository) -> None:
        assert repository.save_all([entry(0, linger=300.0)]) == [None]
        assert repository.save_together([entry(1, linger=900.0), *entries([2, 3]), entry(4, linger=60.0)], 5) is None
        assert [repository.get(name(number)) for number in range(5)] == [ACCEPTED] * 5
        assert (repository.backlog(), repository.save_together([], 5)) == (5, None)
        assert self.numbers(repository.claim(5, 0.0, flush=True).batch) == [2, 3, 4, 0, 1]

    def test_of_a_list_with_an_id_that_is_stored_nothing_is(self, repository: Repository) -> None:
        repository.save_all([entry(7, fingerprint=b"one" * 5), entry(8)])
        for numbers, duplicate in ([1, 2, 8, 7], 8), ([7, 1], 7), ([1, 2, 1], 1):
            error = repository.save_together(entries(numbers), 100)
            assert isinstance(error, DuplicateMessageError)
            assert (error.message_id, error.fingerprint) == (name(duplicate), b"one" * 5 if duplicate == 7 else None)
        assert [repository.get(name(number)) for number in (1, 2)] == [NOT_FOUND] * 2
        assert self.numbers(repository.claim(9, 0.0).batch) == [7, 8]

    def test_a_list_for_which_there_is_not_room_is_not_stored_and_duplicates_are_told_first(
        self, repository: Repository
    ) -> None:
        repository.save_all(entries(range(3)))
        assert isinstance(repository.save_together(entries([3, 4, 5]), 5), OverloadedError)
        assert isinstance(repository.save_together(entries([3, 4, 1]), 5), DuplicateMessageError)
        assert (repository.get(name(3)), repository.backlog()) == (NOT_FOUND, 3)
        assert repository.save_together(entries([3, 4]), 5) is None
        assert repository.backlog() == 5

    def test_a_list_of_a_thousand_with_times_of_their_own(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        many = [entry(number, linger=900.0, max_age=50.0 if number % 2 else math.inf) for number in range(1_000)]
        assert repository.save_together(many, 1_000) is None
        assert repository.backlog() == 1_000
        age(60.0)
        assert len(repository.expire()[0]) == 500
        assert self.numbers(repository.claim(1_000, 0.0, flush=True).batch) == list(range(0, 1_000, 2))

    def test_a_forgotten_id_is_no_obstacle_to_a_list(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all([entry(1, fingerprint=b"old" * 5)])
        repository.update_all({name(1): DELIVERED})
        age(1.1 * RETENTION)
        assert repository.save_together(entries([0, 1])) is None
        [error] = repository.save_all([entry(1)])
        assert isinstance(error, DuplicateMessageError)
        assert error.fingerprint is None

    @pytest.mark.parametrize("turn", range(5))
    def test_of_two_lists_that_race_for_ids_nothing_of_the_loser_is_stored(
        self, repository: Repository, turn: int
    ) -> None:
        lists = {
            b"short": [entry(number, fingerprint=b"short") for number in range(200)],
            b"long": [entry(number, fingerprint=b"long") for number in [*range(900, 199, -1), *range(200)]],
            b"other": [entry(number, fingerprint=b"other") for number in range(150, 700)],
        }
        results: dict[bytes, Exception | None] = {}
        start = threading.Barrier(len(lists))

        def save(which: bytes) -> None:
            start.wait(HANG)
            results[which] = repository.save_together(lists[which])

        threads = [threading.Thread(target=save, args=(which,)) for which in lists]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        [winner] = [which for which, error in results.items() if error is None]
        errors = [error for error in results.values() if error is not None]
        assert all(isinstance(error, DuplicateMessageError) and error.fingerprint == winner for error in errors)
        assert len(errors) == 2
        numbers = sorted(int(each.message.message_id[-12:], 16) for each in lists[winner])
        assert sorted(self.numbers(repository.claim(2_000, 0.0).batch)) == numbers

    # Statuses

    @pytest.mark.parametrize("message_id", ODD_IDS)
    def test_whatever_was_never_stored_is_unknown(self, repository: Repository, message_id: str) -> None:
        assert repository.get(message_id) is NOT_FOUND
        assert repository.reason(message_id) is None
        assert [type(each) for each in repository.update_all({message_id: DELIVERED}).values()] == [UnknownMessageError]
        with pytest.raises(UnknownMessageError):
            repository.update(message_id, CONFIRMED)

    @pytest.mark.parametrize("before", [ACCEPTED, CONFIRMED, FAILED, DELIVERED])
    @pytest.mark.parametrize("after", MessageStatus)
    def test_a_status_changes_as_the_table_says(
        self, repository: Repository, before: MessageStatus, after: MessageStatus
    ) -> None:
        repository.save(name(1))
        if before is not ACCEPTED:
            repository.update(name(1), before)
        if after in TRANSITIONS[before]:
            repository.update(name(1), after)
            assert repository.get(name(1)) is after
        else:
            with pytest.raises(StatusTransitionError):
                repository.update(name(1), after)
            assert repository.get(name(1)) is before

    @pytest.mark.parametrize("reason", Reason)
    def test_a_message_given_up_is_failed_and_says_why(self, repository: Repository, reason: Reason) -> None:
        repository.save_all([entry(1), entry(2)])
        assert repository.update_all({name(1): reason, name(2): FAILED}) == {}
        assert (repository.get(name(1)), repository.reason(name(1))) == (FAILED, reason)
        assert (repository.get(name(2)), repository.reason(name(2))) == (FAILED, None)

    @pytest.mark.parametrize("reason", Reason)
    def test_what_was_handed_over_or_reported_on_cannot_be_given_up_any_more(
        self, repository: Repository, reason: Reason
    ) -> None:
        repository.save_all(entries(range(4)))
        batch = repository.claim(3, 0.0).batch
        assert batch is not None
        repository.handed_over(batch.only(lambda each: each.message.message_id == name(0)))
        repository.update_all({name(1): CONFIRMED})
        errors = repository.update_all({**{name(number): reason for number in range(4)}, "x": reason})
        kinds = {key: type(error) for key, error in errors.items()}
        assert kinds == {name(0): StatusTransitionError, name(1): StatusTransitionError, "x": UnknownMessageError}
        found = [(repository.get(name(number)), repository.reason(name(number))) for number in range(4)]
        assert found == [(ACCEPTED, None), (CONFIRMED, None), (FAILED, reason), (FAILED, reason)]
        assert repository.update_all({name(0): FAILED, name(1): DELIVERED}) == {}
        assert repository.backlog() == 0

    def test_one_update_that_fails_costs_no_other(self, repository: Repository) -> None:
        repository.save_all([entry(number) for number in range(3)])
        repository.update(name(1), DELIVERED)
        errors = repository.update_all({name(0): CONFIRMED, name(1): FAILED, "x": FAILED, name(2): Reason.EXPIRED})
        kinds = {key: type(error) for key, error in errors.items()}
        assert kinds == {name(1): StatusTransitionError, "x": UnknownMessageError}
        assert [repository.get(name(number)) for number in range(3)] == [CONFIRMED, DELIVERED, FAILED]

    def test_what_is_updated_leaves_the_outbox(self, repository: Repository) -> None:
        repository.save_all([entry(number) for number in range(4)])
        batch = repository.claim(2, 0.0).batch
        repository.update_all({name(0): CONFIRMED, name(2): DELIVERED})
        assert repository.backlog() == 2
        assert batch is not None
        repository.release(batch)
        assert self.numbers(repository.claim(10, 0.0).batch) == [1, 3]

    def test_what_is_refused_an_update_stays_in_the_outbox(self, repository: Repository) -> None:
        repository.save_all([entry(1)])
        assert list(repository.update_all({name(1): ACCEPTED})) == [name(1)]
        assert self.numbers(repository.claim(1, 0.0).batch) == [1]

    # Claiming

    def test_a_full_batch_is_claimed_in_order_and_the_rest_has_to_wait(self, repository: Repository) -> None:
        repository.save_all(entries(range(25), linger=50.0))
        for start in (0, 10):
            claim = repository.claim(10, 50.0)
            assert self.numbers(claim.batch) == list(range(start, start + 10))
            assert claim.waiting > 0  # somebody has to look after them
        claim = repository.claim(10, 50.0)
        assert (claim.batch, claim.waiting, claim.near, claim.full_in) == (None, 5, 5, math.inf)
        assert claim.due_in == pytest.approx(50.0, abs=2.0)
        assert repository.backlog() == 25

    @pytest.mark.parametrize("size", [sys.maxsize, 2**70])
    def test_all_that_waits_can_be_claimed_at_once(self, repository: Repository, size: int) -> None:
        repository.save_all(entries(range(250)))
        assert self.numbers(repository.claim(size, 0.0).batch) == list(range(250))

    def test_a_batch_leaves_when_its_first_message_is_due(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all([entry(1, linger=50.0)])
        age(30.0)
        repository.save_all([entry(2, linger=50.0)])
        claim = repository.claim(10, 50.0)
        assert claim.batch is None
        assert claim.due_in == pytest.approx(20.0, abs=2.0)
        age(21.0)
        assert self.numbers(repository.claim(10, 50.0).batch) == [1, 2]

    def test_what_is_due_first_leaves_first_whenever_it_was_accepted(self, repository: Repository) -> None:
        repository.save_all([entry(1, linger=900.0), entry(2, linger=300.0), entry(3, linger=900.0)])
        repository.save_all([entry(4, linger=600.0), entry(5), entry(6, linger=300.0), entry(7, linger=math.inf)])
        assert self.numbers(repository.claim(3, 0.0).batch) == [5, 2, 6]
        repository.save_all([entry(8)])
        assert self.numbers(repository.claim(3, 0.0).batch) == [8, 4, 1]
        repository.save_all([entry(9)])
        assert self.numbers(repository.claim(9, 0.0).batch) == [9, 3, 7]

    def test_only_what_is_due_within_the_horizon_makes_a_batch_full(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all([*entries(range(2), linger=60.0), *entries(range(2, 5), linger=1000.0)])
        claim = repository.claim(3, 100.0)
        assert (claim.batch, claim.waiting, claim.near) == (None, 5, 2)
        assert (claim.due_in, claim.full_in) == pytest.approx((60.0, 900.0), abs=2.0)
        assert self.numbers(repository.claim(3, 1010.0).batch) == [0, 1, 2]
        age(950.0)
        assert repository.claim(3, 1010.0).batch is None
        assert self.numbers(repository.claim(2, 100.0).batch) == [3, 4]

    def test_what_is_never_due_leaves_in_a_full_batch_or_when_all_is_flushed(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all([entry(1, linger=math.inf)])
        age(1e6)
        claim = repository.claim(2, math.inf)
        assert (claim.batch, claim.waiting, claim.due_in, claim.full_in, claim.near) == (None, 1, math.inf, math.inf, 1)
        repository.save_all([entry(2, linger=math.inf)])
        assert repository.claim(2, 1e6).batch is None
        assert self.numbers(repository.claim(2, math.inf).batch) == [1, 2]
        repository.save_all([entry(3, linger=math.inf)])
        assert self.numbers(repository.claim(2, 0.0, flush=True).batch) == [3]

    def test_an_empty_outbox_has_nothing_to_claim(self, repository: Repository) -> None:
        for flush in (False, True):
            assert repository.claim(1, math.inf, flush=flush) == Claim()
        assert (repository.backlog(), repository.ages()) == (0, (0.0, 0.0))

    def test_what_lingered_by_default_is_brought_forward(self, repository: Repository) -> None:
        repository.save_all([entry(1, linger=900.0), entry(2, linger=900.0, default=True)])
        repository.save_all([entry(3, linger=math.inf, default=True), entry(4, linger=5.0, default=True)])
        repository.hasten(60.0)
        assert repository.claim(9, 0.0).due_in == pytest.approx(5.0, abs=2.0)
        assert self.numbers(repository.claim(9, 0.0, flush=True).batch) == [4, 2, 3, 1]

    def test_the_outbox_knows_its_oldest_message_and_the_one_that_is_longest_past_due(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all([entry(1, linger=900.0)])
        age(50.0)
        assert repository.ages().oldest == pytest.approx(50.0, abs=2.0)
        assert repository.ages().past_due == 0.0
        repository.save_all([entry(2, linger=10.0)])
        age(30.0)
        assert tuple(repository.ages()) == pytest.approx((80.0, 20.0), abs=2.0)
        assert self.numbers(repository.claim(1, 0.0).batch) == [2]
        assert tuple(repository.ages()) == pytest.approx((80.0, 20.0), abs=2.0)  # claimed ones count

    def test_a_claimed_message_knows_its_times(self, repository: Repository, age: Callable[[float], None]) -> None:
        repository.save_all([entry(1, max_age=700.0)])
        age(40.0)
        repository.save_all([entry(2, linger=5.0)])
        batch = repository.claim(2, 0.0).batch
        assert batch is not None
        older, newer = batch.entries
        assert newer.accepted_at - older.accepted_at == pytest.approx(40.0, abs=2.0)
        assert newer.due - older.due == pytest.approx(45.0, abs=2.0)
        assert newer.expires_at == math.inf
        assert older.expires_at - older.accepted_at == pytest.approx(700.0, abs=2.0)

    def test_released_messages_are_claimed_first_in_order(self, repository: Repository) -> None:
        repository.save_all([entry(number) for number in range(9)])
        first, second = repository.claim(3, 0.0).batch, repository.claim(3, 0.0).batch
        assert first is not None
        assert second is not None
        repository.release(second)
        repository.release(first)
        assert self.numbers(repository.claim(5, 0.0).batch) == [0, 1, 2, 3, 4]
        assert self.numbers(repository.claim(5, 0.0).batch) == [5, 6, 7, 8]

    def test_riders_go_back_to_their_places_and_ride_with_another_batch(self, repository: Repository) -> None:
        repository.save_all([entry(1), entry(2, linger=900.0), entry(3, linger=600.0), entry(4, linger=900.0)])
        batch = repository.claim(4, 0.0).batch
        assert batch is not None
        repository.release(batch.only(lambda each: each.linger > 0 or each.message.message_id != name(1)))
        assert repository.claim(4, 0.0).due_in == pytest.approx(600.0, abs=2.0)
        assert repository.cancel(name(2))
        assert not repository.cancel(name(1))
        repository.save_all([entry(5)])
        assert self.numbers(repository.claim(4, 0.0).batch) == [5, 3, 4]

    def test_what_is_still_to_be_sent_of_a_batch(self, repository: Repository) -> None:
        repository.save_all(entries(range(5)))
        batch = repository.claim(5, 0.0).batch
        assert batch is not None
        assert self.numbers(repository.unsent(batch)) == [0, 1, 2, 3, 4]
        repository.update_all({name(0): DELIVERED, name(2): CONFIRMED})
        repository.handed_over(batch.only(lambda each: each.message.message_id == name(4)))
        assert self.numbers(repository.unsent(batch)) == [1, 3]
        assert self.numbers(repository.unsent(batch.only(lambda each: each.message.message_id < name(3)))) == [1]
        repository.release(batch)
        assert self.numbers(repository.unsent(batch)) == []

    def test_a_batch_is_not_lost_when_all_of_it_was_reported_on(self, repository: Repository) -> None:
        repository.save_all(entries(range(3)))
        batch = repository.claim(2, 0.0).batch
        assert batch is not None
        repository.update_all({name(0): DELIVERED, name(1): CONFIRMED})
        left = repository.unsent(batch)
        assert (len(left), repository.holds(left)) == (0, True)

    def test_parts_of_a_batch_are_handed_over_by_themselves(self, repository: Repository) -> None:
        repository.save_all([entry(number) for number in range(4)])
        batch = repository.claim(4, 0.0).batch
        assert batch is not None
        assert repository.holds(batch)
        repository.handed_over(batch.only(lambda each: each.message.message_id in (name(0), name(2))))
        assert repository.backlog() == 2
        repository.release(batch.only(lambda each: each.message.message_id in (name(1), name(3))))
        assert self.numbers(repository.claim(4, 0.0).batch) == [1, 3]
        assert repository.get(name(0)) is ACCEPTED

    def test_what_is_gone_can_be_handed_over_and_released_again_without_harm(self, repository: Repository) -> None:
        repository.save_all([entry(1)])
        batch = repository.claim(1, 0.0).batch
        assert batch is not None
        for _ in range(2):
            repository.handed_over(batch)
            repository.release(batch)
        assert (repository.backlog(), repository.claim(1, 0.0).batch) == (0, None)

    @pytest.mark.parametrize("update", [CONFIRMED, DELIVERED, Reason.ATTEMPTS])
    def test_a_report_that_overtakes_the_hand_over_keeps_its_effect(
        self, repository: Repository, update: MessageStatus | Reason
    ) -> None:
        repository.save_all([entry(1), entry(2)])
        batch = repository.claim(2, 0.0).batch
        assert batch is not None
        repository.update_all({name(1): update})
        repository.handed_over(batch)
        assert repository.get(name(1)) is (update if isinstance(update, MessageStatus) else FAILED)
        assert (repository.get(name(2)), repository.backlog()) == (ACCEPTED, 0)

    def test_many_threads_claim_every_message_once_and_only_full_batches(self, repository: Repository) -> None:
        claimed: list[list[int]] = []
        done = threading.Event()
        start = threading.Barrier(8)

        def save(thread: int) -> None:
            start.wait(HANG)
            for group in range(5):
                first = thread * 350 + group * 70
                new = entries(range(first, first + 70), linger=math.inf)
                assert repository.save_all(new) == [None] * 70

        def claim() -> None:
            start.wait(HANG)
            while not done.is_set():
                found = self.numbers(repository.claim(7, math.inf).batch)
                if found:
                    claimed.append(found)
                    if sum(map(len, claimed)) >= 1_400:
                        done.set()

        threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
        threads += [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        done.set()
        assert {len(batch) for batch in claimed} == {7}
        assert sorted(number for batch in claimed for number in batch) == list(range(1_400))

    # Cancelling and expiring

    def test_a_message_that_waits_can_be_cancelled_and_is_never_sent(self, repository: Repository) -> None:
        repository.save_all(entries(range(3), linger=50.0))
        assert repository.cancel(name(1)) is Cancelled.NOW
        assert (repository.get(name(1)), repository.reason(name(1))) == (FAILED, Reason.CANCELLED)
        assert repository.backlog() == 2
        assert repository.cancel(name(1)) is Cancelled.BEFORE
        assert self.numbers(repository.claim(5, 0.0, flush=True).batch) == [0, 2]

    def test_what_is_in_a_batch_handed_over_final_or_unknown_is_not_cancelled(self, repository: Repository) -> None:
        repository.save_all(entries(range(4)))
        batch = repository.claim(2, 0.0).batch
        assert batch is not None
        repository.handed_over(batch.only(lambda each: each.message.message_id == name(0)))
        repository.update_all({name(2): DELIVERED, name(3): Reason.REJECTED})
        assert [repository.cancel(name(number)) for number in range(5)] == [None] * 5
        statuses = [repository.get(name(number)) for number in range(5)]
        assert statuses == [ACCEPTED, ACCEPTED, DELIVERED, FAILED, NOT_FOUND]
        assert not any(repository.cancel(message_id) for message_id in ODD_IDS)

    def test_of_those_who_cancel_a_message_at_the_same_time_one_is_told_that_it_was_he(
        self, repository: Repository
    ) -> None:
        told: list[tuple[int, Cancelled | None]] = []
        start = threading.Barrier(4)

        def cancel() -> None:
            start.wait(HANG)
            told.extend((number, repository.cancel(name(number))) for number in range(50))

        repository.save_all(entries(range(50)))
        threads = [threading.Thread(target=cancel) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        for when, times in (Cancelled.NOW, 1), (Cancelled.BEFORE, 3):
            found = sorted(number for number, each in told if each is when)
            assert found == sorted([*range(50)] * times)

    def test_of_a_cancel_and_a_claim_one_gets_the_message(self, repository: Repository) -> None:
        cancelled: list[int] = []
        claimed: list[int] = []
        start = threading.Barrier(2)

        def cancel() -> None:
            start.wait(HANG)
            cancelled.extend(number for number in range(200) if repository.cancel(name(number)))

        def claim() -> None:
            start.wait(HANG)
            while batch := repository.claim(7, 0.0).batch:
                claimed.extend(self.numbers(batch))

        repository.save_all(entries(range(200)))
        threads = [threading.Thread(target=cancel), threading.Thread(target=claim)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        assert sorted(claimed + cancelled) == list(range(200))
        assert all(repository.reason(name(number)) is Reason.CANCELLED for number in cancelled)
        assert all(repository.get(name(number)) is ACCEPTED for number in claimed)

    def test_what_waits_too_long_expires_and_what_is_claimed_does_not(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        assert repository.expire()[0] == []
        repository.save_all([entry(1), entry(2, linger=20.0, max_age=40.0), entry(3, linger=30.0, max_age=60.0)])
        repository.save_all([entry(4, linger=30.0)])
        assert self.numbers(repository.claim(1, 0.0).batch) == [1]
        expired, wait = repository.expire()
        assert (expired, wait <= 42.0) == ([], True)
        age(41.0)
        expired, wait = repository.expire()
        assert (expired, wait <= 21.0) == ([name(2)], True)
        assert (repository.get(name(2)), repository.reason(name(2))) == (FAILED, Reason.EXPIRED)
        batch = repository.claim(2, 0.0).batch
        assert self.numbers(batch) == [3, 4]
        assert batch is not None
        age(60.0)
        assert repository.expire()[0] == []
        assert self.numbers(repository.unsent(batch)) == [3, 4]
        repository.release(batch)
        assert (repository.expire()[0], repository.backlog()) == ([name(3)], 2)

    def test_many_that_expire_together_do_so_a_few_at_a_time(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all([entry(number, linger=10.0, max_age=20.0) for number in range(1_200)])
        age(30.0)
        expired, calls = set(), 0
        while found := repository.expire()[0]:
            expired.update(found)
            calls += 1
        assert (len(expired), calls >= 2, repository.backlog()) == (1_200, True, 0)

    # Forgetting

    @pytest.mark.parametrize("update", [None, CONFIRMED, DELIVERED, FAILED])
    def test_a_message_is_forgotten_some_time_after_its_last_change(
        self, repository: Repository, age: Callable[[float], None], update: MessageStatus | None
    ) -> None:
        repository.save(name(1))
        age(0.9 * RETENTION)
        if update:
            repository.update_all({name(1): update})
            age(0.9 * RETENTION)
            repository.forget()
        assert repository.get(name(1)) is not NOT_FOUND
        age(0.2 * RETENTION)
        assert repository.get(name(1)) is NOT_FOUND
        assert isinstance(repository.update_all({name(1): FAILED})[name(1)], UnknownMessageError)
        repository.forget()
        assert (repository.get(name(1)), repository.reason(name(1))) == (NOT_FOUND, None)
        assert repository.save_all([entry(1)]) == [None]

    def test_an_id_that_was_forgotten_starts_anew(self, repository: Repository, age: Callable[[float], None]) -> None:
        repository.save_all([entry(1, "old", fingerprint=b"old" * 5)])
        repository.update_all({name(1): Reason.EXPIRED})
        age(1.1 * RETENTION)
        assert repository.save_all([entry(1, "new")]) == [None]
        assert (repository.get(name(1)), repository.reason(name(1))) == (ACCEPTED, None)
        [error] = repository.save_all([entry(1)])
        assert isinstance(error, DuplicateMessageError)
        assert error.fingerprint is None
        batch = repository.claim(1, 0.0).batch
        assert batch is not None
        assert [each.message.message for each in batch.entries] == ["new"]
        age(1.1 * RETENTION)
        repository.forget()
        assert repository.get(name(1)) is ACCEPTED

    def test_the_end_of_an_old_request_does_not_hand_over_what_was_accepted_anew(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all(entries(range(3)))
        old = repository.claim(3, 0.0).batch
        assert old is not None
        repository.update_all({name(0): DELIVERED, name(1): CONFIRMED})
        age(1.1 * RETENTION)
        repository.forget()
        assert repository.save_all([entry(0, "new"), entry(1, "new")]) == [None, None]
        assert self.numbers(repository.claim(1, 0.0).batch) == [0]
        repository.handed_over(old)
        assert repository.backlog() == 2
        assert self.numbers(repository.claim(3, 0.0).batch) == [1]
        assert [repository.get(name(number)) for number in range(3)] == [ACCEPTED] * 3
        age(1.1 * RETENTION)
        assert [repository.get(name(number)) for number in range(3)] == [ACCEPTED, ACCEPTED, NOT_FOUND]

    def test_what_waits_in_the_outbox_is_never_forgotten(
        self, repository: Repository, age: Callable[[float], None]
    ) -> None:
        repository.save_all([entry(1), entry(2)])
        batch = repository.claim(1, 0.0).batch
        age(10 * RETENTION)
        repository.forget()
        assert repository.get(name(1)) is repository.get(name(2)) is ACCEPTED
        assert batch is not None
        repository.handed_over(batch)
        assert repository.get(name(1)) is ACCEPTED

    def test_forgetting_says_when_to_come_again(self, repository: Repository, age: Callable[[float], None]) -> None:
        wait = repository.forget()
        assert wait is not None
        assert 0 < wait <= RETENTION
        repository.save(name(1))
        age(1.1 * RETENTION)
        for _ in range(5):
            wait = repository.forget()
        assert wait is not None
        assert 0 < wait <= RETENTION

    def test_a_check_of_a_repository_that_is_well_says_nothing(self, repository: Repository) -> None:
        repository.check()
