"""The cost report's virtual time, its minimum and its table, on arrivals small enough to check by hand."""
from __future__ import annotations

import threading

import pytest

import cost_report
from cost_report import Policy, World, minimum, replay


def test_messages_linger_for_company_in_virtual_time() -> None:
    cost = replay([2.0 * number for number in range(30)], Policy(10, 1, linger=5.0))
    assert cost.requests == 10
    assert cost.waits == (1.0,) * 10 + (3.0,) * 10 + (5.0,) * 10
    assert (cost.wait(0.5), cost.wait(0.99)) == (3.0, 5.0)


def test_a_full_batch_leaves_at_once_and_the_rest_lingers() -> None:
    cost = replay([0.0] * 45, Policy(10, 1, linger=5.0))
    assert (cost.requests, cost.waits) == (5, (0.0,) * 40 + (5.0,) * 5)


def test_batches_grow_while_the_provider_is_slow() -> None:
    fixed, growing = (replay([0.0] * 100, Policy(10, growth, 5.0, latency=2.0)) for growth in (1, 10))
    assert (fixed.requests, fixed.waits) == (10, (0.0,) * 40 + (2.0,) * 40 + (4.0,) * 20)
    assert (growing.requests, growing.waits) == (5, (0.0,) * 40 + (2.0,) * 60)


def test_a_replay_is_repeatable_and_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    trace = cost_report.traces(300, seed=3)["bursts of 400"]
    policy = Policy(10, 10, 5.0, latency=2.0)
    assert replay(trace, policy) == replay(trace, policy)
    assert threading.active_count() == before


def test_threads_that_all_wait_for_each_other_are_an_error_and_no_hang() -> None:
    with pytest.raises(RuntimeError, match="every thread waits"):
        World().wait(None)


@pytest.mark.parametrize(
    ("longest_wait", "largest_batch", "requests"),
    [(0.0, 100, 4), (1.0, 100, 3), (2.0, 100, 2), (10.0, 100, 1), (10.0, 3, 2), (0.0, 1, 5)],
)
def test_the_minimum_covers_every_message_in_time(longest_wait: float, largest_batch: int, requests: int) -> None:
    assert minimum([0.0, 1.0, 2.0, 2.0, 4.0], longest_wait, largest_batch) == requests


def test_the_report_is_a_markdown_table_of_every_policy_on_every_trace(capsys: pytest.CaptureFixture[str]) -> None:
    cost_report.main(["--messages", "100", "--seed", "5"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(cost_report.traces(100, 5)) * len(cost_report.POLICIES)
    assert {line.count("|") for line in (head, rule, *rows)} == {10}
    assert rows[0].endswith("| 1 | 1 | 0 | 0.3 | 1000 | 0.00 | 0.00 | 100% |")
