"""Counts of responses: by route and status, and how long they took."""
from __future__ import annotations

from response_counts import DURATIONS, ResponseCounts


def test_responses_count_by_route_and_status_and_their_durations_by_route() -> None:
    counts = ResponseCounts()
    counts.new.update({("/sms", 202, 10.0): 3, ("/sms", 400, 10.0): 1, ("/metrics", 200, 9.0): 2})
    counts.count(10.5)
    counts.new["/sms", 202, 10.75] = 2
    counts.count(31.0)
    assert (counts.by_status(), counts.new) == ({("/sms", 202): 5, ("/sms", 400): 1, ("/metrics", 200): 2}, {})
    sms, metrics = counts.durations()["/sms"], counts.durations()["/metrics"]
    assert (sms[DURATIONS.index(0.5)], sms[-2], sms[-1]) == (4, 2, 4 * 0.5 + 2 * 20.25)
    assert (metrics[DURATIONS.index(2.5)], metrics[-1]) == (2, 3.0)
    assert [sum(row[:-1]) for row in (sms, metrics)] == [6, 2]
    assert len(sms) == len(metrics) == len(DURATIONS) + 2
