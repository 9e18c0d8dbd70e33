"""What the circuit breaker stops, and for how long, as events at moments."""
from __future__ import annotations

import pytest

from batch_scheduler import SmsProxyConfig
from circuit_breaker import PROBE_PATIENCE, CircuitBreaker


def breaker_of(config: SmsProxyConfig) -> CircuitBreaker:
    return CircuitBreaker(lambda failures: config.backoff(failures, 1.0))


def test_the_breaker_doubles_its_wait_for_probes_only() -> None:
    breaker = breaker_of(SmsProxyConfig(backoff_base=1.0, backoff_max=100.0))
    assert breaker.wait(0.0) == 0.0
    assert breaker.failed("a", 0.0, 0.0) is True
    assert breaker.wait(0.0) == 1.0
    assert breaker.failed("b", 0.0, 0.5) is False  # it was under way: it says nothing new
    assert breaker.wait(0.5) == 0.5
    breaker.begin("probe", 1.0)
    assert breaker.wait(1.0) == PROBE_PATIENCE
    breaker.failed("probe", 0.0, 2.0)
    assert breaker.wait(2.0) == 2.0
    breaker.begin("next", 4.0)
    breaker.ended("next")  # without a request
    assert breaker.wait(4.0) == 0.0
    assert breaker.answered(5.0) == (5.0, 3)
    assert breaker.answered(5.0) is None
    assert breaker.wait(5.0) == 0.0


def test_the_breaker_does_not_double_its_wait_while_one_batch_alone_fails() -> None:
    breaker = breaker_of(SmsProxyConfig(backoff_base=1.0))
    waits = []
    for now, batch in enumerate(("a", "a", "a", "b", "b", "a", "a")):
        breaker.begin(batch, 100.0 * now)
        breaker.failed(batch, 0.0, 100.0 * now)
        waits.append(breaker.wait(100.0 * now))
    assert waits == [1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_the_breaker_says_for_how_long_it_has_been_open() -> None:
    breaker = breaker_of(SmsProxyConfig())
    breaker.failed("a", 0.0, 10.0)
    assert (breaker.open_for(10.0), breaker.open_for(13.0)) == (0.001, 3.0)  # 0.0 is closed
    assert breaker.answered(13.0) == (3.0, 1)


def test_a_breaker_that_never_opened_has_counted_nothing_and_holds_up_nobody() -> None:
    breaker = breaker_of(SmsProxyConfig())
    assert (breaker.open, breaker.requests, breaker.wait(0.0), breaker.open_for(0.0)) == (False, 0, 0.0, 0.0)


@pytest.mark.parametrize(("asked", "wait"), [(0.0, 1.0), (0.25, 1.0), (7.0, 7.0)])
def test_a_drain_shortens_the_wait_of_the_breaker_but_not_what_fastsmsing_asked_for(asked: float, wait: float) -> None:
    breaker = breaker_of(SmsProxyConfig(backoff_base=30.0))
    breaker.failed("a", asked, 0.0)
    breaker.hasten(0.0)
    assert breaker.wait(0.0) == wait
    breaker.hasten(wait - 0.5)
    assert breaker.wait(wait - 0.5) == 0.5  # it is never put off


def test_after_three_failed_probes_the_next_are_suspicious_until_fastsmsing_answers() -> None:
    breaker = breaker_of(SmsProxyConfig())
    found = []
    for now in range(0, 1000, 100):
        found.append(breaker.suspicious)
        breaker.begin(now, now)
        breaker.failed(now, 0.0, now)
    assert found == [False] * 4 + [True] * 6
    breaker.answered(1000.0)
    assert not breaker.suspicious
