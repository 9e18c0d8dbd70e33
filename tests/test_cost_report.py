"""The cost report's optimum, table and picture, on arrivals that can be checked by hand; and what the README says."""
from __future__ import annotations

import runpy
import threading
import xml.etree.ElementTree
from pathlib import Path

import pytest

import cost_report
from cost_report import Policy, Trace, optimum, optimum_by_due, replay, shops_day


def test_messages_linger_until_others_come() -> None:
    cost = replay(Trace([2.0 * number for number in range(30)]), Policy(10, 5.0))
    assert cost.requests == 10
    assert cost.waits == (1.0,) * 10 + (3.0,) * 10 + (5.0,) * 10
    assert cost.by_message == (5.0, 3.0, 1.0) * 10
    assert (cost.wait(0.5), cost.wait(0.99)) == (3.0, 5.0)


def test_a_full_batch_leaves_at_once_and_the_rest_lingers() -> None:
    cost = replay(Trace([0.0] * 45), Policy(10, 5.0))
    assert (cost.requests, cost.waits) == (5, (0.0,) * 40 + (5.0,) * 5)


def test_failed_requests_are_counted_and_their_messages_wait_for_the_one_that_hands_them_over() -> None:
    cost = replay(Trace([0.0] * 10, fails=lambda now, rng: now < 1.0), Policy(10, 5.0))
    assert cost.requests > 2
    assert len(set(cost.waits)) == 1
    assert cost.waits[0] >= 1.0


def test_a_replay_is_repeatable_and_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    trace = cost_report.traces(300, seed=3)["20/s, 5 % of requests fail"]
    assert replay(trace, Policy(latency=2.0)) == replay(trace, Policy(latency=2.0))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("longest_wait", "batch_size", "requests"),
    [(0.0, 100, 4), (1.0, 100, 3), (2.0, 100, 2), (10.0, 100, 1), (10.0, 3, 2), (0.0, 1, 5)],
)
def test_the_optimum_covers_every_message_in_time(longest_wait: float, batch_size: int, requests: int) -> None:
    assert optimum([0.0, 1.0, 2.0, 2.0, 4.0], longest_wait, batch_size) == requests


@pytest.mark.parametrize("name", list(cost_report.traces(1, 1)))
def test_the_default_policy_is_near_the_optimum_at_its_own_p99(name: str) -> None:
    trace = cost_report.traces(20_000 if "away" in name else 2_000, seed=2)[name]
    cost = replay(trace, Policy())
    most = 1.15 if "away" in name else 1.1  # the probes of the outage
    assert cost.requests <= most * optimum(trace.arrivals, cost.wait(0.99), Policy.batch_size)


def test_the_report_is_a_table_of_every_policy_on_every_trace_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "docs" / "cost.svg"
    monkeypatch.setattr(cost_report, "shops_day", lambda seed: shops_day(seed, hours=1.5, newsletters=1, readers=150))
    cost_report.main(["--messages", "100", "--seed", "5", "--svg", str(picture.parent)])
    out, progress = capsys.readouterr()
    table, _, day = out.partition("\n\n")
    head, rule, *rows = table.splitlines()
    total = len(cost_report.traces(100, 5)) * len(cost_report.POLICIES)
    assert len(rows) == total
    assert {line.count("|") for line in (head, rule, *rows)} == {9}
    assert rows[0].endswith("| 1 | 0 s | 0.3 s | 1000 | 0.00 s | 0.00 s | 100% |")
    assert progress.endswith(f"{total} of {total}\r")
    words = " ".join(xml.etree.ElementTree.parse(picture).getroot().itertext())
    assert all(name in words for name in cost_report.traces(1, 1))
    names = [line.split("|")[1].strip() for line in day.splitlines()[2:]]
    words = " ".join(xml.etree.ElementTree.parse(picture.parent / "day.svg").getroot().itertext())
    assert len(names) == 5
    assert all(name in words for name in names)


@pytest.mark.parametrize(("batch_size", "requests"), [(100, 3), (2, 4), (1, 7)])
def test_the_optimum_by_due_covers_every_message_when_it_is_due(batch_size: int, requests: int) -> None:
    trace = Trace([0.0, 0.0, 1.0, 2.0, 50.0, 60.0, 61.0], [10.0, 100.0, 1.0, 100.0, 3.0, 30.0, 100.0])
    assert optimum_by_due(trace, batch_size) == requests


def test_a_shops_day_costs_what_the_optimum_does_and_every_code_is_in_time() -> None:
    one_of_5, one_of_1, three, own, optimum = cost_report.day_rows(shops_day(1))
    assert (one_of_5[2], one_of_1[2], three[2], own[2]) == (False, True, True, True)
    assert own[1] <= 1.03 * optimum[1]
    assert own[1] < three[1] < one_of_5[1] < one_of_1[1]


def test_the_picture_of_the_flow_is_the_one_that_its_script_draws() -> None:
    docs = Path(__file__).parent.parent / "docs"
    drawn: str = runpy.run_path(str(docs / "flow.py"))["draw"]()
    assert (docs / "flow.svg").read_text() == drawn
    xml.etree.ElementTree.fromstring(drawn)
