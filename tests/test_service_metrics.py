"""Metrics and their text."""
from __future__ import annotations

import pytest

from helpers import Clock, together
from service_metrics import KINDS, Age, Counter, Gauge, Histogram, KindCounter, Metric, Metrics


def test_every_series_is_there_from_the_start_at_0() -> None:
    metrics = Metrics()
    samples = [line for line in metrics.text() if not line.startswith("#")]
    assert {line.rsplit(" ", 1)[1] for line in samples} == {"0"}
    assert 'smsproxy_refused_total{reason="queue_full"} 0' in samples
    assert 'smsproxy_messages_given_up_total{reason="cancelled"} 0' in samples
    named = [metric for metric in vars(metrics).values() if isinstance(metric, Metric)]
    assert len({metric.name for metric in named}) == len(named)
    helps = [line for line in metrics.text() if line.startswith("# HELP")]
    ages = {metric.name for metric in named if isinstance(metric, Age)}  # of what has not happened yet
    assert len(helps) == len(named) - len(ages)


def test_a_counter_counts_by_the_value_of_its_label_from_many_threads() -> None:
    counter = Counter("x_total", "Counts.", "result", ("good", "bad"))

    def count(number: int) -> None:
        for _ in range(500):
            counter.add(2, "good")

    together(8, count)
    counter.add(1, "bad")
    assert list(counter.text()) == [
        "# HELP x_total Counts.", "# TYPE x_total counter", 'x_total{result="good"} 8000', 'x_total{result="bad"} 1',
    ]  # fmt: skip
    assert (counter.total, counter.count("bad")) == (8_001, 1)


def test_a_gauge_without_a_value_is_left_out() -> None:
    gauge = Gauge("x", "Is.")
    gauge.value = 2.5
    assert list(gauge.text()) == ["# HELP x Is.", "# TYPE x gauge", "x 2.5"]
    gauge.value = None
    assert list(gauge.text()) == []


def test_an_age_counts_from_the_last_time_and_is_left_out_before_the_first() -> None:
    clock = Clock(100.0)
    age = Age("x_seconds", "Since.", clock=clock)
    assert list(age.text()) == []
    for _ in range(2):
        clock.advance(7.0)
        age.happened()
    clock.advance(2.5)
    assert list(age.text()) == ["# HELP x_seconds Since.", "# TYPE x_seconds gauge", "x_seconds 2.5"]


def test_kinds_that_nobody_knows_before_are_a_bounded_number_of_series_and_quote_nothing() -> None:
    counter = KindCounter("x_total", "Counts.", "error")
    unfit = ('say "48123456789"', "a\nb", "", "é" * 101)
    for kind in (*unfit, *(f"Error {number}" for number in range(KINDS + 5)), "Error 3"):
        counter.add(1, kind)
    lines = list(counter.text())[2:]
    assert lines[0] == 'x_total{error="other"} 9'
    assert lines[1:] == [f'x_total{{error="Error {each}"}} {1 + (each == 3)}' for each in range(KINDS)]


def test_a_histogram_takes_over_what_was_counted_elsewhere() -> None:
    histogram = Histogram("x", "Takes.", (1, 2), "route", ("a", "b"))
    histogram.load({"a": [3, 1, 0, 4.5]})
    assert (histogram.total, "".join(histogram.text()).count("x_count{")) == (4, 2)
    assert 'x_sum{route="a"} 4.5' in histogram.text()


@pytest.mark.parametrize(("value", "counts"), [(0, "1 1 1"), (1, "1 1 1"), (1.5, "0 1 1"), (2, "0 1 1"), (3, "0 0 1")])
def test_a_value_counts_in_every_bucket_that_holds_it_and_in_the_sum(value: float, counts: str) -> None:
    histogram = Histogram("x", "Takes.", (1, 2), "result", ("ok",))
    histogram.observe([value], "ok")
    one, two, more = counts.split()
    assert list(histogram.text())[2:] == [
        f'x_bucket{{result="ok",le="1"}} {one}', f'x_bucket{{result="ok",le="2"}} {two}',
        f'x_bucket{{result="ok",le="+Inf"}} {more}', f'x_sum{{result="ok"}} {value}', 'x_count{result="ok"} 1',
    ]  # fmt: skip
    assert histogram.total == 1
