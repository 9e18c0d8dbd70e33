"""Metrics and their text."""
from __future__ import annotations

import pytest

from helpers import together
from service_metrics import Counter, Gauge, Histogram, Metric, Metrics


def test_every_series_is_there_from_the_start_at_0() -> None:
    metrics = Metrics()
    samples = [line for line in metrics.text() if not line.startswith("#")]
    assert {line.rsplit(" ", 1)[1] for line in samples} == {"0"}
    assert 'smsproxy_refused_total{reason="queue_full"} 0' in samples
    assert 'smsproxy_messages_given_up_total{reason="cancelled"} 0' in samples
    named = [metric for metric in vars(metrics).values() if isinstance(metric, Metric)]
    assert len({metric.name for metric in named}) == len(named)
    helps = [line for line in metrics.text() if line.startswith("# HELP")]
    assert len(helps) == len(named)


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
