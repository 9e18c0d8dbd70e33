"""When a batch leaves and what follows a failure, as events at moments: no threads, no waiting."""
from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from base_repository import Claim, look
from batch_scheduler import Job, Look, Scheduler, SmsProxyConfig, Verdict, horizon
from circuit_breaker import PROBE_PATIENCE
from cost_report import Trace, optimum_by_due
from fastsmsing import Message
from message_model import Batch, Entry, SendMessage, ValidationError


def scheduler_of(*, durable: bool = False, poll: float | None = None, **config: Any) -> Scheduler[Batch]:
    made: Scheduler[Batch] = Scheduler(SmsProxyConfig(**config), lambda: 1.0, durable=durable, poll=poll)
    assert isinstance(made.next(0.0), Look)  # there may be messages from before the start
    made.claimed(Claim(), 0.0)
    return made


def batch(*ids: str, expires_at: float = math.inf) -> Batch:
    return Batch(tuple(Entry(Message("48123", "Hi", each), expires_at=expires_at) for each in ids))


def save(scheduler: Scheduler[Batch], *lingers: float, now: float = 0.0) -> bool:
    assert scheduler.saving()
    return scheduler.saved(lingers or (0.0,), now)


def claim(scheduler: Scheduler[Batch], now: float, *ids: str, waiting: int = 0) -> Job[Batch]:
    """The look that is the next step finds these messages; returns the job that follows."""
    assert isinstance(scheduler.next(now), Look)
    scheduler.claimed(Claim(batch(*ids), waiting), now)
    return begin(scheduler, now, *ids)


def begin(scheduler: Scheduler[Batch], now: float, *ids: str) -> Job[Batch]:
    job = scheduler.next(now)
    assert isinstance(job, Job)
    assert job.batch.ids == list(ids)
    job.attempt += 1
    return job


def expired(scheduler: Scheduler[Batch], now: float) -> tuple[list[str], float]:
    batches, following = scheduler.expire(now)
    assert all(set(ids) <= set(before.ids) for before, ids in batches)
    return [message_id for _, ids in batches for message_id in ids], following


def fail(scheduler: Scheduler[Batch], job: Job[Batch], now: float, retry_after: float = 0.0) -> bool:
    opened = scheduler.failed(job, retry_after, now)
    scheduler.ended(job, [job], now)
    return opened


def succeed(scheduler: Scheduler[Batch], job: Job[Batch], now: float) -> None:
    scheduler.answered(job, now)
    scheduler.ended(job, (), now)


# The settings


@pytest.mark.parametrize(("config", "message", "expected"), [
    ({}, {}, (5.0, True, math.inf)),
    ({}, {"max_delay": 60.0}, (60.0, False, math.inf)),
    ({}, {"max_delay": 60.0, "max_age": 20.0}, (10.0, False, 20.0)),  # half of its age at the most
    ({}, {"max_age": 4.0}, (2.0, True, 4.0)),
    ({"max_age": 6.0}, {}, (3.0, True, 6.0)),
    ({"max_delay": None}, {}, (math.inf, True, math.inf)),
    ({"max_delay": None, "max_age": 50.0}, {}, (25.0, True, 50.0)),
    ({"max_delay": None, "max_age": 50.0}, {"max_delay": 0, "max_age": 900}, (0, False, 900)),
])  # fmt: skip
def test_the_linger_of_a_message(config: dict[str, Any], message: dict[str, Any], expected: tuple[Any, ...]) -> None:
    entry = SmsProxyConfig(**config).entry(SendMessage("48123", "Hi", **message), "id")
    assert (entry.linger, entry.default_linger, entry.max_age) == expected


def test_a_queue_may_be_as_small_as_a_batch() -> None:
    assert SmsProxyConfig(batch_size=5, max_pending=5).max_pending == 5


WRONG: dict[str, list[Any]] = {
    "batch_size": [True, 1.5, "2", None, math.nan],
    "max_delay": [-1, -1e-9, math.nan, math.inf, "1", True, 10**400],
    "senders": [0, -1, True, 1.0, None],
    "max_pending": [0, -1, 99, 100.0, None],
    "max_attempts": [1.5, True, "1"],
    "backoff_base": [30.5, -1, math.nan, math.inf, None, "1", True],
    "backoff_max": [-1, math.nan, math.inf, None, "1", True],
    "max_age": [0, -1, math.nan, math.inf, "1", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        SmsProxyConfig(**{name: value})
    assert raised.value.field == name
    assert [field.name for field in dataclasses.fields(SmsProxyConfig)] == list(WRONG), "every setting is here"


@pytest.mark.parametrize("value", [1, 0, -1, -1000])
def test_a_batch_size_and_attempts_below_one_count_as_one_and_some_settings_may_be_none(value: int) -> None:
    config = SmsProxyConfig(batch_size=value, max_attempts=value, max_delay=None, max_age=None)
    assert (config.batch_size, config.max_attempts, config.max_delay, config.max_age) == (1, 1, None, None)
    assert SmsProxyConfig(max_attempts=None).max_attempts is None


WRONG_TYPES: dict[str, dict[str, Any]] = {"senders": {"senders": "5"}, "max_delay": {"max_delay": "5"}}


@pytest.mark.parametrize(
    ("field", "problem"), [("senders", "must be a whole number"), ("max_delay", "must be a number")]
)
def test_a_setting_of_another_type_is_told_its_type(field: str, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SmsProxyConfig(**WRONG_TYPES[field])
    assert caught.value.problem == problem


# The horizon


@pytest.mark.parametrize(("config", "waiting", "expected"), [
    ({}, 0, 5.0),
    ({}, 2_000, 5.0 + 20 * 0.8 / 4),
    ({"senders": 1, "batch_size": 10, "max_delay": 0.0}, 100, 8.0),
    ({}, 49_999, pytest.approx(5.0 + 499.99 * 0.2)),
    ({}, 50_000, math.inf),  # half of what may be pending
    ({"max_delay": None}, 1, math.inf),
])  # fmt: skip
def test_the_horizon_grows_by_the_time_that_the_senders_need_for_what_waits(
    config: dict[str, Any], waiting: int, expected: float
) -> None:
    assert horizon(SmsProxyConfig(**config), waiting, 0.8) == expected


def test_a_request_takes_a_second_until_one_was_answered_and_then_what_it_takes_lately() -> None:
    scheduler = scheduler_of(max_delay=1.0, senders=1, batch_size=10)
    save(scheduler, *[0.0] * 100)
    look = scheduler.next(0.0)
    assert look == Look(10, 11.0)
    scheduler.claimed(Claim(batch("a"), 100), 0.0)
    succeed(scheduler, begin(scheduler, 0.0, "a"), 0.5)
    assert scheduler.next(0.5) == Look(10, 6.0)
    scheduler.claimed(Claim(batch("b"), 100), 0.5)
    succeed(scheduler, begin(scheduler, 0.5, "b"), 2.0)
    assert scheduler.next(2.0) == Look(10, 8.5)


# When to look


def test_without_messages_there_is_nothing_to_do() -> None:
    assert scheduler_of().next(0.0) == math.inf


def test_a_message_is_looked_for_when_it_is_due_and_not_before() -> None:
    scheduler = scheduler_of()
    assert scheduler.next(0.0) == math.inf
    assert save(scheduler, 5.0, now=1.0)
    assert scheduler.next(1.0) == 5.0
    assert isinstance(scheduler.next(6.0), Look)


def test_only_what_changes_the_next_look_is_news() -> None:
    scheduler = scheduler_of(batch_size=4, max_delay=5.0)
    for linger, news in ((5.0, True), (60.0, False), (5.0, False), (1.0, True), (600.0, False), (5.0, True)):
        scheduler.next(0.0)
        assert save(scheduler, linger) is news
    assert isinstance(scheduler.next(0.0), Look)
    assert not save(scheduler, 0.0)  # during a look, and what follows it is asked for anyway


def test_news_are_told_once() -> None:
    scheduler = scheduler_of()
    scheduler.next(0.0)
    assert [save(scheduler, linger) for linger in (5.0, 4.0, 3.0)] == [True, False, False]
    assert scheduler.next(0.0) == 3.0
    assert save(scheduler, 2.0)


def test_no_message_is_news_while_no_request_may_start() -> None:
    scheduler = scheduler_of(senders=1, batch_size=1)
    save(scheduler, 0.0)
    job = claim(scheduler, 0.0, "a")
    assert scheduler.next(0.0) == math.inf
    assert not save(scheduler, 0.0)
    fail(scheduler, job, 0.0)
    assert scheduler.next(0.0) == 0.5
    assert not save(scheduler, 0.0)
    begin(scheduler, 0.5, "a")


def test_a_code_is_looked_for_before_the_newsletter_that_came_before_it() -> None:
    scheduler = scheduler_of()
    save(scheduler, *[3600.0] * 500)
    scheduler.next(0.0)
    assert save(scheduler, 1.0, now=10.0)
    assert scheduler.next(10.0) == 1.0


def test_patient_messages_make_no_batch_full_before_their_time() -> None:
    scheduler = scheduler_of(batch_size=10, max_delay=5.0, senders=1)
    save(scheduler, *[3600.0] * 20)
    assert scheduler.next(0.0) == 3600.0 - 7.0  # the horizon: 5 s, and 1 s for each of two batches
    assert save(scheduler, *[3600.0] * 50)
    assert scheduler.next(0.0) == 3600.0 - 12.0
    scheduler = scheduler_of(batch_size=10, max_delay=5.0, senders=1)
    save(scheduler, *[3600.0] * 9)
    assert scheduler.next(0.0) == 3600.0  # no full batch
    save(scheduler, 3600.0)
    assert scheduler.next(0.0) == 3600.0 - 6.0


def test_a_look_that_finds_no_batch_is_repeated_when_there_may_be_one() -> None:
    scheduler = scheduler_of(batch_size=3, max_delay=5.0)
    save(scheduler, 1.0, 60.0, 60.0)
    assert isinstance(scheduler.next(1.0), Look)
    scheduler.claimed(Claim(None, waiting=3, due_in=50.0, full_in=47.5, near=0), 1.0)  # somebody else took it
    assert scheduler.next(1.0) == 47.5
    scheduler.next(48.5)
    scheduler.claimed(Claim(None, waiting=2, due_in=2.5), 48.5)
    assert scheduler.next(48.5) == 2.5


def test_what_is_saved_during_a_look_counts_on_top_of_what_it_finds() -> None:
    scheduler = scheduler_of(batch_size=3, max_delay=5.0)
    save(scheduler, 5.0)
    assert isinstance(scheduler.next(5.0), Look)
    save(scheduler, 1.0, now=5.0)
    scheduler.claimed(Claim(), 5.5)
    assert scheduler.next(5.5) == 0.5
    assert isinstance(scheduler.next(6.0), Look)
    save(scheduler, 5.0, 5.0, now=6.0)
    scheduler.claimed(Claim(None, 1, 5.0, near=1), 6.5)
    assert isinstance(scheduler.next(6.5), Look)  # three may be near


def test_behind_a_batch_it_looks_again_only_if_messages_are_left() -> None:
    scheduler = scheduler_of(batch_size=2)
    save(scheduler, 0.0, 0.0, 0.0)
    claim(scheduler, 0.0, "a", "b", waiting=1)
    assert isinstance(scheduler.next(0.0), Look)
    scheduler.claimed(Claim(batch("c")), 0.0)
    begin(scheduler, 0.0, "c")
    assert scheduler.next(0.0) == math.inf


def test_half_of_what_may_be_pending_leaves_however_patient() -> None:
    scheduler = scheduler_of(batch_size=10, max_pending=40)
    save(scheduler, *[3600.0] * 19)
    assert isinstance(scheduler.next(0.0), float)
    assert save(scheduler, 3600.0)
    assert scheduler.next(0.0) == Look(10, math.inf)
    scheduler.claimed(Claim(None, 9, 3600.0, near=9), 0.0)
    assert scheduler.next(0.0) == 3600.0


def test_of_several_patient_messages_the_first_may_make_a_batch_full() -> None:
    scheduler = scheduler_of(batch_size=2, max_delay=5.0, senders=1)
    save(scheduler, 3600.0, 1800.0, 7200.0)
    assert scheduler.next(0.0) == 1800.0 - 6.5


def test_a_count_that_is_too_high_does_not_make_it_look_again_at_once() -> None:
    scheduler = scheduler_of(max_delay=None, poll=1.0)
    assert isinstance(scheduler.next(1.5), Look)
    scheduler.claimed(Claim(None, waiting=500, near=3), 1.5)  # a shared outbox was counted a moment ago
    assert scheduler.next(1.5) == 1.5


def test_messages_of_other_processes_are_looked_for_at_random_times() -> None:
    scheduler = scheduler_of(poll=1.0)
    assert scheduler.next(0.0) == 1.5  # with the random number 1.0
    assert isinstance(scheduler.next(1.5), Look)


def test_no_more_jobs_are_under_way_than_there_are_senders() -> None:
    scheduler = scheduler_of(batch_size=1, senders=2)
    save(scheduler, 0.0, 0.0, 0.0)
    first, _ = claim(scheduler, 0.0, "a", waiting=2), claim(scheduler, 0.0, "b", waiting=1)
    assert scheduler.next(0.0) == math.inf
    scheduler.ended(first, (), 1.0)
    assert isinstance(scheduler.next(1.0), Look)


def test_what_is_put_back_into_the_outbox_is_looked_for() -> None:
    scheduler = scheduler_of()
    scheduler.next(1.0)
    assert scheduler.waits([7.0], 1.0)
    assert scheduler.next(1.0) == 6.0


# The circuit breaker


def test_one_bad_batch_in_the_night_does_not_hold_up_a_code() -> None:
    scheduler = scheduler_of(batch_size=1)
    save(scheduler)
    bad, now = claim(scheduler, 0.0, "bad"), 0.0
    for _ in range(12):
        fail(scheduler, bad, now)
        now += 30.0
        bad = begin(scheduler, now, "bad")
    fail(scheduler, bad, now)
    save(scheduler, 1.0, now=now)
    claim(scheduler, now + 1.0, "code")


def test_a_probe_that_hangs_gives_up_its_place() -> None:
    scheduler = scheduler_of(batch_size=1, backoff_base=1.0)
    save(scheduler, 0.0, 0.0)
    fail(scheduler, claim(scheduler, 0.0, "a", waiting=1), 0.0)
    hanging = begin(scheduler, 1.0, "a")
    assert scheduler.next(1.0) == PROBE_PATIENCE
    probe = claim(scheduler, 1.0 + PROBE_PATIENCE, "b")
    assert scheduler.next(62.0) == PROBE_PATIENCE - 1.0
    scheduler.failed(hanging, 0.0, 63.0)  # it is no probe any more
    assert scheduler.next(63.0) == PROBE_PATIENCE - 2.0
    succeed(scheduler, probe, 64.0)
    assert not scheduler.breaker.open


def test_the_provider_may_ask_for_a_longer_wait_until_it_answers() -> None:
    scheduler = scheduler_of(batch_size=1)
    save(scheduler, 0.0, 0.0, 0.0)
    slow = claim(scheduler, 0.0, "slow", waiting=2)
    failed = claim(scheduler, 0.0, "a", waiting=1)
    fail(scheduler, failed, 1.0, retry_after=50.0)
    assert scheduler.next(2.0) == 49.0
    succeed(scheduler, slow, 3.0)
    assert scheduler.next(3.0) is failed  # and it waits only for its own backoff
    assert fail(scheduler, failed, 4.0) is False
    assert scheduler.next_try_in(4.0) == 0.0  # an hour that was asked for before is forgotten


def test_new_batches_and_those_that_failed_take_turns_as_the_probe() -> None:
    scheduler = scheduler_of(batch_size=1, backoff_base=1.0, backoff_max=1.0)
    save(scheduler, *[0.0] * 10)
    order = []
    job, now = claim(scheduler, 0.0, "new 0", waiting=9), 0.0
    for number in range(1, 8):
        fail(scheduler, job, now)
        now += 1.0
        step = scheduler.next(now)
        if isinstance(step, Look):
            scheduler.claimed(Claim(batch(f"new {number}"), 9), now)
            step = scheduler.next(now)
        assert isinstance(step, Job)
        job, job.attempt = step, step.attempt + 1
        order += step.batch.ids
    assert order == ["new 0", "new 2", "new 2", "new 4", "new 4", "new 6", "new 6"]  # the fewest tries first


def test_a_batch_that_fails_again_while_others_succeed_opens_no_breaker() -> None:
    scheduler = scheduler_of(batch_size=1)
    save(scheduler, 0.0, 0.0, 0.0)
    bad = claim(scheduler, 0.0, "bad", waiting=2)
    assert fail(scheduler, bad, 0.0) is True
    fail(scheduler, begin(scheduler, 0.5, "bad"), 1.0)
    assert scheduler.breaker.open  # nothing else was answered yet
    succeed(scheduler, claim(scheduler, 2.0, "good", waiting=1), 2.1)
    fail(scheduler, begin(scheduler, 10.0, "bad"), 11.0)
    assert not scheduler.breaker.open
    succeed(scheduler, claim(scheduler, 12.0, "good, too"), 12.0)
    fail(scheduler, begin(scheduler, 50.0, "bad"), 51.0)
    assert not scheduler.breaker.open
    fail(scheduler, begin(scheduler, 100.0, "bad"), 101.0)
    assert scheduler.breaker.open  # nothing was answered since it failed before


def test_a_batch_that_fails_while_another_one_is_taken_opens_no_breaker_either() -> None:
    scheduler = scheduler_of(batch_size=1)
    save(scheduler, 0.0, 0.0)
    bad = claim(scheduler, 0.0, "bad", waiting=1)
    good = claim(scheduler, 0.0, "good")
    fail(scheduler, bad, 2.0)
    succeed(scheduler, good, 3.0)
    bad = begin(scheduler, 4.0, "bad")
    good_too = (save(scheduler, 0.0, now=4.0), claim(scheduler, 4.0, "good, too"))[1]
    succeed(scheduler, good_too, 5.0)
    fail(scheduler, bad, 6.0)
    fail(scheduler, begin(scheduler, 7.0, "bad"), 8.0)
    assert not scheduler.breaker.open


def test_after_three_failed_probes_a_probe_carries_one_message_until_fastsmsing_answers() -> None:
    scheduler = scheduler_of(batch_size=2, backoff_base=1.0, backoff_max=1.0)
    save(scheduler, 0.0, 0.0)
    job, alone = claim(scheduler, 0.0, "a", "b"), []
    for now in range(1, 7):
        fail(scheduler, job, now)
        job = begin(scheduler, now + 1.0, "a", "b")
        alone.append(job.single)
    assert alone == [False, False, False, True, False, True]  # and every other one is whole
    scheduler.answered(job, 10.0)
    scheduler.ended(job, [job.part(batch("b"))], 10.0)
    rest = begin(scheduler, 10.0, "b")
    assert not rest.single
    fail(scheduler, rest, 11.0)
    fail(scheduler, begin(scheduler, 12.0, "b"), 12.0)  # opens the breaker, since nothing was answered meanwhile
    assert scheduler.breaker.open
    assert not begin(scheduler, 13.0, "b").single


def fail_of_its_own(scheduler: Scheduler[Batch], job: Job[Batch], *moments: float) -> None:
    """Each time the job under way fails, then another one is taken, and the job begins again, two seconds later."""
    for now in moments:
        fail(scheduler, job, now)
        scheduler.breaker.answered(now + 1.0)
        assert begin(scheduler, now + 2.0, *job.batch.ids) is job


def test_a_batch_with_several_failures_of_its_own_sends_single_messages_and_is_to_blame_if_these_are_taken() -> None:
    scheduler = scheduler_of(batch_size=4, backoff_base=1.0, backoff_max=1.0)
    save(scheduler, 0.0)
    job, singles = claim(scheduler, 0.0, *"abcd"), []
    for now in range(0, 8, 2):
        fail_of_its_own(scheduler, job, now)
        singles.append(job.single)
    assert singles == [False, False, False, True]
    rest = take_single(scheduler, job, 8.0)
    assert rest is begin(scheduler, 9.0, *"bcd")
    fail_of_its_own(scheduler, rest, 10.0)
    assert rest.single  # it is not halved yet, since it may have been chance
    last = take_single(scheduler, rest, 12.0)
    assert last is begin(scheduler, 13.0, *"cd")
    fail(scheduler, last, 14.0)
    assert last.verdict is Verdict.TO_BLAME


def take_single(scheduler: Scheduler[Batch], job: Job[Batch], now: float) -> Job[Batch]:
    """The job's request carries its first message, which is taken; returns the rest."""
    first, *others = job.batch.ids
    job.batch = batch(first)
    scheduler.set_aside(job, batch(*others))
    assert scheduler.next(now) == PROBE_PATIENCE  # the rest waits for it, but not for ever
    scheduler.answered(job, now + 1.0)
    rest = scheduler.take_back(job)
    assert rest is not None
    scheduler.ended(job, [rest], now + 1.0)
    return rest


def test_where_batches_are_taken_in_spite_of_their_failures_it_takes_more_of_them_to_suspect_one() -> None:
    scheduler = scheduler_of(batch_size=2, backoff_base=1.0, backoff_max=1.0)
    save(scheduler, 0.0)
    lucky = claim(scheduler, 0.0, "a", "b")
    fail_of_its_own(scheduler, lucky, *range(0, 4, 2))
    assert lucky.own_failures == 1
    succeed(scheduler, lucky, 5.0)

    def suspicious_after(now: float) -> int:
        save(scheduler, 0.0, now=now)
        job = claim(scheduler, now, "c", "d")
        while not job.single:
            fail_of_its_own(scheduler, job, now)
            now += 2
        scheduler.ended(job, (), now)
        return job.own_failures

    assert suspicious_after(6.0) == 5
    save(scheduler, 0.0, now=40.0)
    alone = claim(scheduler, 40.0, "alone")
    alone.own_failures = 50
    succeed(scheduler, alone, 40.0)  # which tells nothing of batches
    save(scheduler, 0.0, now=50.0)
    bad = claim(scheduler, 50.0, "bad")
    fail_of_its_own(scheduler, bad, *range(50, 58, 2))
    assert bad.found
    scheduler.ended(bad, (), 58.0)
    assert suspicious_after(60.0) == 4


def test_a_single_message_that_fails_is_part_of_its_batch_again_which_is_sent_as_a_whole() -> None:
    scheduler = scheduler_of(batch_size=2, backoff_base=1.0, backoff_max=1.0)
    save(scheduler, 0.0)
    job = claim(scheduler, 0.0, "a", "b")
    fail_of_its_own(scheduler, job, *range(0, 8, 2))
    assert job.single
    job.batch = batch("a")
    scheduler.set_aside(job, batch("b"))
    scheduler.failed(job, 0.0, 9.0)
    rest = scheduler.take_back(job)
    assert rest is not None
    job.batch = batch("a", "b")
    scheduler.ended(job, [job], 9.0)
    assert not scheduler.breaker.open
    assert not begin(scheduler, 10.0, "a", "b").single
    assert job.verdict is Verdict.NONE


@pytest.mark.parametrize("gone", ["expired", "sent"])
def test_what_was_set_aside_cannot_be_taken_back_when_it_is_gone(gone: str) -> None:
    scheduler = scheduler_of(batch_size=2)
    save(scheduler, 0.0)
    job = claim(scheduler, 0.0, "a", "b")
    job.batch = batch("a")
    scheduler.set_aside(job, batch("b", expires_at=50.0))
    if gone == "expired":
        assert expired(scheduler, 50.0) == (["b"], math.inf)
    else:
        begin(scheduler, 60.0, "b")
    assert scheduler.take_back(job) is None


def test_one_sender_is_kept_for_batches_without_failures_of_their_own() -> None:
    scheduler = scheduler_of(batch_size=1, senders=2, backoff_base=1.0, backoff_max=1.0)
    save(scheduler, 0.0, 0.0)
    for job in [claim(scheduler, 0.0, "a", waiting=1), claim(scheduler, 0.0, "b")]:
        fail(scheduler, job, 1.0)
    scheduler.breaker.answered(1.5)
    for job in [begin(scheduler, 2.0, "a"), begin(scheduler, 2.0, "b")]:
        fail(scheduler, job, 3.0)
    begin(scheduler, 4.0, "a")
    assert scheduler.next(4.0) == math.inf  # the second one that fails does not get the last sender
    good = claimed_now(scheduler, 4.0)
    scheduler.answered(good, 5.0)
    assert scheduler.ended(good, (), 5.0)
    assert scheduler.next(5.0) == math.inf
    scheduler.drain(5.0)
    begin(scheduler, 5.0, "b")


def test_the_end_of_a_request_is_news_for_a_batch_that_waits_for_a_second_sender() -> None:
    scheduler = scheduler_of(batch_size=1, senders=3)
    save(scheduler, 0.0)
    again = [Job(batch(name), own_failures=1) for name in "abc"]
    scheduler.ended(claim(scheduler, 0.0, "x"), again, 1.0)
    first = begin(scheduler, 1.0, "a")
    begin(scheduler, 1.0, "b")
    assert scheduler.next(1.0) == math.inf
    assert scheduler.ended(first, (), 2.0)
    begin(scheduler, 2.0, "c")


def test_a_bad_message_that_was_found_opens_the_breaker_no_more_and_goes_last() -> None:
    scheduler = scheduler_of(batch_size=1, backoff_base=1.0, backoff_max=1.0)
    save(scheduler, 0.0)
    bad = claim(scheduler, 0.0, "bad")
    fail_of_its_own(scheduler, bad, *range(0, 8, 2))
    assert bad.found
    assert fail(scheduler, bad, 9.0, retry_after=3600.0) is False
    others = Job(batch("c"), attempt=50)
    scheduler.ended(claimed_now(scheduler, 10.0), [others], 10.0)
    assert begin(scheduler, 10.0, "c") is others


def claimed_now(scheduler: Scheduler[Batch], now: float) -> Job[Batch]:
    save(scheduler, 0.0, now=now)
    assert isinstance(scheduler.next(now), Look)
    scheduler.claimed(Claim(batch("y")), now)
    return begin(scheduler, now, "y")


def test_a_part_of_a_batch_keeps_its_tries_and_has_a_backoff_of_its_own() -> None:
    scheduler = scheduler_of(batch_size=2, backoff_base=1.0, backoff_max=64.0)
    save(scheduler, 0.0)
    whole = claim(scheduler, 0.0, "a", "b")
    whole.attempt = 7
    scheduler.failed(whole, 0.0, 0.0)
    scheduler.breaker.answered(1.0)
    part = whole.part(batch("a"))
    scheduler.ended(whole, [part], 0.0)
    assert begin(scheduler, 2.0, "a") is part
    assert part.attempt == 8
    fail(scheduler, part, 2.0)
    assert scheduler.next(2.0) == 1.0


def test_the_halves_of_a_rejected_batch_follow_at_once() -> None:
    scheduler = scheduler_of(batch_size=2)
    save(scheduler, 0.0, 0.0)
    whole = claim(scheduler, 0.0, "a", "b")
    halves = [Job(batch("a")), Job(batch("b"))]
    scheduler.answered(whole, 0.0)
    scheduler.ended(whole, halves, 0.0)
    assert [scheduler.next(0.0), scheduler.next(0.0), scheduler.next(0.0)] == [*halves, math.inf]


def test_what_expires_is_taken_out_of_batches_that_wait_for_a_retry() -> None:
    scheduler = scheduler_of(batch_size=3)
    save(scheduler, 0.0, 0.0)
    scheduler.next(0.0)
    short, long = batch("a", expires_at=10.0), batch("b", expires_at=20.0)
    scheduler.claimed(Claim(Batch((*short.entries, *long.entries))), 0.0)
    job = begin(scheduler, 0.0, "a", "b")
    assert expired(scheduler, 15.0) == ([], math.inf)  # what is in a request is not touched
    fail(scheduler, job, 1.0)
    assert expired(scheduler, 9.0) == ([], 10.0)
    assert expired(scheduler, 10.0) == (["a"], 20.0)
    assert expired(scheduler, 20.0) == (["b"], math.inf)
    assert scheduler.next(30.0) == math.inf


def test_of_several_batches_the_first_expiry_counts() -> None:
    scheduler = scheduler_of(batch_size=1)
    save(scheduler, 0.0, 0.0, 0.0)
    jobs = []
    for name, expires_at in (("a", 30.0), ("b", 20.0), ("c", math.inf)):
        scheduler.next(0.0)
        scheduler.claimed(Claim(batch(name, expires_at=expires_at), waiting=1), 0.0)
        jobs.append(begin(scheduler, 0.0, name))
    for job in jobs:
        fail(scheduler, job, 1.0)
    assert expired(scheduler, 1.0) == ([], 20.0)
    assert expired(scheduler, 25.0) == (["b"], 30.0)


# The end


def test_a_drain_looks_for_what_lingers_also_when_it_begins_during_a_look() -> None:
    scheduler = scheduler_of(batch_size=3, max_delay=1e6)
    save(scheduler, 0.0, 1e6)
    assert isinstance(scheduler.next(0.0), Look)
    scheduler.drain(0.0)
    scheduler.claimed(Claim(None, 1, 1e6), 0.0)
    look = scheduler.next(0.0)
    assert isinstance(look, Look)
    assert look.flush
    scheduler.claimed(Claim(batch("a")), 0.0)
    begin(scheduler, 0.0, "a")
    assert scheduler.next(0.0) == math.inf


def test_in_a_durable_drain_no_message_is_news() -> None:
    scheduler = scheduler_of(durable=True)
    assert scheduler.next(0.0) == math.inf
    scheduler.drain(0.0)
    assert scheduler.next(0.0) == math.inf
    assert not scheduler.waits([5.0], 0.0)


def test_what_came_during_a_look_and_what_the_look_left_are_both_waited_for() -> None:
    scheduler = scheduler_of(batch_size=3, max_delay=5.0)
    save(scheduler, 0.0)
    assert isinstance(scheduler.next(0.0), Look)
    save(scheduler, 60.0)
    scheduler.claimed(Claim(None, 1, 30.0), 0.0)
    assert (scheduler.next(0.0), scheduler.quiet) == (30.0, False)


def test_when_requests_take_longer_a_batch_is_looked_for_that_comes_within_the_longer_horizon() -> None:
    """Said as the request ends, since nothing else may happen before the first message is due."""
    scheduler = scheduler_of(batch_size=2, max_delay=1.0)
    save(scheduler, 0.0)
    job = claim(scheduler, 0.0, "a")
    save(scheduler, 7.0, 7.0)
    assert scheduler.next(0.0) == pytest.approx(7.0 - horizon(SmsProxyConfig(batch_size=2, max_delay=1.0), 2, 1.0))
    scheduler.answered(job, 5.0)
    assert scheduler.ended(job, (), 5.0)
    assert isinstance(scheduler.next(5.0), Look)


def test_the_end_of_a_request_is_news_only_if_something_waited_for_it() -> None:
    scheduler = scheduler_of(senders=2, batch_size=1)
    save(scheduler, 0.0, 0.0)
    first = claim(scheduler, 0.0, "a", waiting=1)
    second = claim(scheduler, 0.0, "b")
    assert scheduler.next(0.0) == math.inf
    for job, news in ((first, True), (second, False)):
        scheduler.answered(job, 0.0)
        assert scheduler.ended(job, (), 0.0) is news
        assert scheduler.next(0.0) == math.inf


def test_a_durable_drain_starts_nothing_and_is_quiet_when_requests_have_ended() -> None:
    scheduler = scheduler_of(durable=True, batch_size=1)
    save(scheduler, 0.0, 0.0)
    job = claim(scheduler, 0.0, "a", waiting=1)
    scheduler.drain(0.0)
    assert (scheduler.next(0.0), scheduler.quiet) == (math.inf, False)
    scheduler.ended(job, (), 0.0)
    assert (scheduler.next(0.0), scheduler.quiet) == (math.inf, True)


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_look_into_an_outbox_that_would_be_lost_is_waited_for(durable: bool) -> None:
    scheduler = scheduler_of(durable=durable)
    save(scheduler)
    assert isinstance(scheduler.next(0.0), Look)
    scheduler.drain(0.0)
    assert scheduler.quiet is durable


def test_a_drain_shortens_the_backoff_of_a_batch_that_fails_alone() -> None:
    scheduler = scheduler_of(batch_size=1, backoff_base=30.0)
    save(scheduler, 0.0, 0.0)
    fail(scheduler, claim(scheduler, 0.0, "bad", waiting=1), 0.0)
    fail(scheduler, begin(scheduler, 30.0, "bad"), 30.0)
    succeed(scheduler, claim(scheduler, 60.0, "good"), 61.0)
    fail(scheduler, begin(scheduler, 61.0, "bad"), 62.0)
    assert scheduler.next(70.0) == 22.0
    scheduler.drain(70.0)
    assert scheduler.next(70.0) == 1.0


def test_a_drain_shortens_backoffs() -> None:
    scheduler = scheduler_of(batch_size=1, backoff_base=30.0)
    save(scheduler)
    fail(scheduler, claim(scheduler, 0.0, "a"), 0.0)
    assert scheduler.next(0.0) == 30.0
    scheduler.drain(0.0)
    assert scheduler.next(0.0) == 1.0
    begin(scheduler, 1.0, "a")


def test_a_closed_scheduler_refuses_messages_and_waits_for_those_being_saved() -> None:
    scheduler = scheduler_of()
    assert scheduler.saving()
    scheduler.closed = True
    assert (scheduler.saving(), scheduler.quiet) == (False, False)
    scheduler.saved((), 0.0)
    assert scheduler.quiet


def test_what_is_left_is_all_that_did_not_end() -> None:
    scheduler = scheduler_of(batch_size=1)
    save(scheduler, *[0.0] * 4)
    jobs = [claim(scheduler, 0.0, name, waiting=1) for name in ("ended", "failed", "lost", "hanging")]
    succeed(scheduler, jobs[0], 0.0)
    fail(scheduler, jobs[1], 0.0)
    scheduler.abandoned(jobs[2], 0.0)
    assert scheduler.left() == ([jobs[1]], [jobs[3], jobs[2]])
    assert scheduler.in_flight == 1


# All of it


class Model:
    """An outbox as a sorted list, a provider that takes a while, and a scheduler between them."""

    def __init__(self, rng: random.Random, **config: Any) -> None:
        self.rng, self.config = rng, SmsProxyConfig(**config)
        self.scheduler: Scheduler[Batch] = Scheduler(self.config, rng.random)
        self.waiting: list[Entry] = []
        self.under_way: list[tuple[float, Job[Batch]]] = []
        self.late = 0.0
        self.looks = 0

    def accept(self, lingers: Iterable[float], now: float) -> None:
        new = [Entry(Message("", "", ""), linger=linger, accepted_at=now, due=now + linger) for linger in lingers]
        assert self.scheduler.saving()
        self.waiting = sorted([*self.waiting, *new], key=lambda entry: entry.due)
        self.scheduler.saved([entry.linger for entry in new], now)

    def run(self, now: float, latency: float) -> float:
        """Takes the steps of this moment; returns when the next one comes."""
        while not isinstance(step := self.scheduler.next(now), float):
            if isinstance(step, Job):
                self.late = max(self.late, now - step.batch.entries[0].due)
                self.under_way.append((now + latency, step))
                continue
            dues = [entry.due for entry in self.waiting]
            found = look(dues[: step.size], now, step.size, step.horizon, len(dues), step.flush)
            if found is None:
                taken = Batch(tuple(self.waiting[: step.size]))
                del self.waiting[: step.size]
                found = Claim(taken, len(self.waiting))
            self.looks += 1
            self.scheduler.claimed(found, now)
        return min([now + step, *(end for end, _ in self.under_way)])

    def end(self, now: float) -> int:
        """Ends the requests whose time is over; returns how many."""
        over = [each for each in self.under_way if each[0] <= now]
        for each in over:
            self.under_way.remove(each)
            succeed(self.scheduler, each[1], now)
        return len(over)


    def play(self, arrivals: Iterable[tuple[float, Sequence[float]]], latency: float) -> int:
        """Accepts messages with these lingers at these times, and waits until all have left; returns the requests."""
        now, requests = 0.0, 0
        for time, lingers in (*arrivals, (math.inf, ())):
            while (step := self.run(now, latency)) < time:
                now = step
                requests += self.end(now)
            if time < math.inf:
                now = time
                self.accept(lingers, now)
        assert (self.waiting, self.under_way) == ([], [])
        return requests


def arrivals(rng: random.Random, lingers: Sequence[float], count: int = 150) -> list[tuple[float, list[float]]]:
    """Random moments with a few messages each."""
    now, found = 0.0, []
    for _ in range(count):
        now += rng.expovariate(2.0)
        found.append((now, [rng.choice(lingers) for _ in range(rng.choice([1, 1, 3, 12]))]))
    return found


LINGERS = [0.0, 1.0, 2.0, 5.0, 30.0, 200.0]  # seconds


@pytest.mark.parametrize("block", range(10))
def test_no_message_is_late_and_none_is_left_under_random_lingers(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        rng = random.Random(seed)
        model = Model(rng, batch_size=rng.choice([5, 20]), max_delay=rng.choice([0.0, 2.0, 5.0]), senders=8)
        model.play(arrivals(rng, LINGERS[: rng.randrange(1, 7)], 40), 0.05)
        assert model.late <= 0.1, seed


@pytest.mark.parametrize("seed", range(50))
def test_without_a_horizon_no_policy_makes_fewer_requests(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([1, 5, 20])
    given = arrivals(rng, LINGERS[: rng.randrange(1, 7)])
    model = Model(rng, batch_size=size, max_delay=0.0, senders=10**9)
    messages = [(time, linger) for time, lingers in given for linger in lingers]
    trace = Trace([time for time, _ in messages], [linger for _, linger in messages])
    assert model.play(given, 0.0) == optimum_by_due(trace, size)


def test_looks_are_few() -> None:
    rng = random.Random(1)
    model = Model(rng)
    requests = model.play(arrivals(rng, [1.0, 5.0, 60.0, 3600.0], 1_000), 0.3)
    assert model.looks <= 4 * requests
