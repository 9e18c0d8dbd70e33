"""What a policy costs: replays arrivals through the real batching client in virtual time; tables and pictures.

    python tests/cost_report.py [--messages 20000] [--seed 1] [--svg docs] [--day]

**One linger for all.** Every row is one policy on one trace of arrivals. *Requests* are those the provider is paid for,
failed ones included, per 1,000 messages. *Wait* is the time from a message's arrival to the start of the request that
hands it over.

*Of the optimum* compares with the fewest requests that any policy could have made, even one that knows the
future, is never held up by a slow provider and never meets a failure, if no message is to wait longer than this row's
p99 wait W and no request may hold more than the row's batch size. It is found by greedy covering: the first message
not yet covered has to leave by its arrival + W, and its request may as well leave only then and take along
everything that has arrived by that moment, up to the batch size; then on with the first message that is left. No
cover has fewer requests, because each of them takes the first message left over and nothing reaches further than it
does. A share above 100 % is possible, as one message in a hundred does wait longer than W.

**Each message its own linger.** A shop's day: password codes that have 1 s, order updates that have 60 s, and two
newsletters that have an hour. The optimum is the same covering in order of due: the first message that is due leaves
then, with the most urgent others that have arrived. Put off any plan's first request to that time and swap its
messages for these, and the plan still keeps every due time.
"""
from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastsmsing import FastSmsingError
from simulation import Request, Shop, World

HOURS = (1, 1, 1, 1, 1, 2, 4, 7, 10, 12, 13, 13, 14, 13, 12, 12, 13, 14, 16, 18, 17, 12, 6, 3)  # a shop's day


# Arrivals: times in seconds, ascending


def arrivals(rng: random.Random, rates: Sequence[tuple[float, float]]) -> Iterator[float]:
    """A Poisson process: for each pair so many seconds with so many messages a second, over and over."""
    start = 0.0
    for seconds, rate in itertools.cycle(rates):
        time = start + rng.expovariate(rate)
        start += seconds
        while time < start:
            yield time
            time += rng.expovariate(rate)


@dataclass(frozen=True)
class Trace:
    """When messages arrive, in seconds, and whether a request that starts at a moment fails."""

    arrivals: Sequence[float]
    lingers: Sequence[float] = ()  # of each message; without, each has the policy's
    fails: Callable[[float, random.Random], bool] = lambda now, rng: False


def traces(messages: int, seed: int) -> dict[str, Trace]:
    """The traces by name."""
    shapes = {
        "steady, 1/s": [(3600.0, 1.0)],
        "steady, 20/s": [(3600.0, 20.0)],
        "steady, 30/s": [(3600.0, 30.0)],
        "bursts of 400": [(590.0, 0.2), (10.0, 40.0)],
        "a day of a shop": [(3600.0, messages / 24 / 3600 * share * 24 / sum(HOURS)) for share in HOURS],
    }
    arrived = {
        name: list(itertools.islice(arrivals(random.Random(seed), shape), messages)) for name, shape in shapes.items()
    }
    return {
        **{name: Trace(each) for name, each in arrived.items()},
        "20/s, 5 % of requests fail": Trace(arrived["steady, 20/s"], fails=lambda now, rng: rng.random() < 0.05),
        "30/s, away for 5 minutes": Trace(arrived["steady, 30/s"], fails=lambda now, rng: 60 <= now < 360),
    }


# Replaying


@dataclass(frozen=True)
class Policy:
    """When batches leave, and how long the provider takes for each; times in seconds."""

    batch_size: int = 100
    linger: float = 5.0
    latency: float = 0.3


@dataclass(frozen=True)
class Cost:
    """What a policy made of a trace."""

    requests: int
    waits: tuple[float, ...]  # ascending
    by_message: tuple[float, ...]  # the same in order of arrival

    def wait(self, share: float) -> float:
        """The wait that so large a share of the messages does not exceed."""
        return self.waits[max(0, math.ceil(share * len(self.waits)) - 1)]


def replay(trace: Trace, policy: Policy) -> Cost:
    """Sends every message at its time through the real batching client."""
    world, rng = World(), random.Random(0)

    def judge(request: Request) -> None:
        if request in doomed:
            raise FastSmsingError(503)

    def latency(request: Request) -> float:
        if trace.fails(world.now, rng):
            doomed.add(request)
        return policy.latency

    doomed: set[Request] = set()
    shop = Shop(world, judge, latency=latency, ids="{}", batch_size=policy.batch_size, max_delay=policy.linger)
    lingers: Sequence[float | None] = trace.lingers or [None] * len(trace.arrivals)
    for time, linger in zip(trace.arrivals, lingers, strict=True):
        world.wait(time - world.now)
        shop.post(max_delay=linger)
    world.wait(max((linger or 0.0 for linger in trace.lingers), default=policy.linger) + policy.linger)
    left = shop.stop()
    started = {message_id: request.start for request in shop.requests if request.ok for message_id in request.ids}
    if left or len(started) != len(trace.arrivals):
        raise RuntimeError(f"{left} messages left, {len(started)} of {len(trace.arrivals)} sent")
    waits = tuple(started[str(number)] - time for number, time in enumerate(trace.arrivals))
    return Cost(len(shop.requests), tuple(sorted(waits)), waits)


def optimum(arrivals: Sequence[float], longest_wait: float, batch_size: int) -> int:
    """The fewest requests by which every message can leave in time; see the top of this file."""
    requests = covered = 0
    while covered < len(arrivals):
        requests += 1
        last, end = arrivals[covered] + longest_wait + 1e-9, covered + batch_size
        while covered < min(end, len(arrivals)) and arrivals[covered] <= last:
            covered += 1
    return requests


# Each message its own linger

CODE, UPDATE, NEWSLETTER = 1.0, 60.0, 3600.0  # seconds that each class of messages has
LATE = 0.1  # seconds after its due time that a message counts as in time


def shops_day(seed: int, hours: float = 10, newsletters: int = 2, readers: int = 2000) -> Trace:
    """Password codes and order updates, most of them at noon, and newsletters that are each handed in at one moment."""
    rng, end, messages = random.Random(seed), hours * 3600, []
    for rate, linger in ((0.05, CODE), (0.15, UPDATE)):
        now = 0.0
        while (now := now + rng.expovariate(rate)) < end:
            if rng.random() < 0.3 + 0.7 * math.sin(math.pi * now / end):
                messages.append((now, linger))
    for _ in range(newsletters):
        messages += [(rng.uniform(0, end - NEWSLETTER - 100), NEWSLETTER)] * readers
    messages.sort()
    return Trace([time for time, _ in messages], [linger for _, linger in messages])


def optimum_by_due(trace: Trace, batch_size: int) -> int:
    """The fewest requests by which every message can leave when it is due; see the top of this file."""
    arriving = sorted(zip(trace.arrivals, trace.lingers, strict=True))
    waiting: list[float] = []  # a heap of due times
    requests = position = 0
    while position < len(arriving) or waiting:
        while position < len(arriving) and (not waiting or arriving[position][0] <= waiting[0]):
            time, linger = arriving[position]
            heapq.heappush(waiting, time + linger)
            position += 1
        requests += 1
        for _ in range(min(batch_size, len(waiting))):
            heapq.heappop(waiting)
    return requests


def day_rows(trace: Trace) -> Iterator[tuple[str, int, bool]]:
    """Of each way to send the day: its name, the requests, and whether every code left in time."""

    def in_time(cost: Cost, part: Trace) -> bool:
        waits = [wait for wait, linger in zip(cost.by_message, part.lingers, strict=True) if linger == CODE]
        return not waits or max(waits) <= CODE + LATE

    for linger in (5.0, 1.0):
        cost = replay(Trace(trace.arrivals), Policy(linger=linger))
        yield f"one linger of {linger:g} s for all", cost.requests, in_time(cost, trace)
    requests, good = 0, True
    for linger in sorted(set(trace.lingers)):
        times = [time for time, each in zip(trace.arrivals, trace.lingers, strict=True) if each == linger]
        part = Trace(times, [linger] * len(times))
        cost = replay(part, Policy(linger=linger))
        requests, good = requests + cost.requests, good and in_time(cost, part)
    yield "three services side by side, each with its own linger", requests, good
    cost = replay(trace, Policy())
    yield "each message its own linger", cost.requests, in_time(cost, trace)
    yield "the optimum", optimum_by_due(trace, Policy.batch_size), True


POLICIES = (
    Policy(1, 0.0), Policy(10), *(Policy(linger=linger) for linger in (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)),
    Policy(linger=5.0, latency=2.0),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One policy on one trace; requests per 1,000 messages, waits in seconds."""

    trace: str
    policy: Policy
    requests: float
    optimum: float
    p50: float
    p99: float

    def __str__(self) -> str:
        policy = self.policy
        return (f"| {self.trace} | {policy.batch_size} | {policy.linger:g} s | {policy.latency:g} s"
                f" | {self.requests:.0f} | {self.p50:.2f} s | {self.p99:.2f} s"
                f" | {self.optimum / self.requests:.0%} |")  # fmt: skip


HEAD = """\
| arrivals | batch size | linger | provider | requests per 1,000 | p50 wait | p99 wait | of the optimum |
|---|---:|---:|---:|---:|---:|---:|---:|"""


def rows(traces: Mapping[str, Trace], policies: Sequence[Policy] = POLICIES) -> Iterator[Row]:
    """What every policy makes of every trace, one by one."""
    for name, trace in traces.items():
        for policy in policies:
            cost, per_mille = replay(trace, policy), 1000 / len(trace.arrivals)
            p99 = cost.wait(0.99)
            fewest = optimum(trace.arrivals, p99, policy.batch_size)
            yield Row(name, policy, cost.requests * per_mille, fewest * per_mille, cost.wait(0.5), p99)


# The picture

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 460, 70, 50, 260, 60  # pixels
X_TICKS, Y_TICKS = (0.5, 1, 2, 5, 10, 30), (10, 20, 50, 100, 200, 500, 1000)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#444444")  # also for the colour-blind
TITLE = "Paid requests per 1,000 messages over p99 wait"


def svg(height: float) -> str:
    """The first element of a picture."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
            ' font-family="sans-serif" font-size="13">')  # fmt: skip


def draw(rows: Sequence[Row]) -> str:
    """An SVG: requests per 1,000 messages over p99 wait, one line a trace, and the optimum, dashed, beside it."""
    rows = [row for row in rows if row.policy.batch_size == 100 and row.policy.latency == Policy.latency]

    def scale(value: float, ticks: Sequence[float], start: float, end: float) -> float:
        low, high = math.log(ticks[0] * 0.9), math.log(ticks[-1] * 1.1)
        return start + (math.log(max(value, ticks[0] * 0.9)) - low) / (high - low) * (end - start)

    def x(value: float) -> str:
        return f"{scale(min(value, X_TICKS[-1]), X_TICKS, LEFT, WIDTH - RIGHT):.1f}"

    def y(value: float) -> str:
        return f"{scale(value, Y_TICKS, HEIGHT - BOTTOM, TOP):.1f}"

    parts = [
        svg(HEIGHT),
        "<title>Paid requests per 1,000 messages over the p99 wait, by the linger, for each trace of arrivals</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="26" font-size="16" font-weight="bold">{TITLE}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">p99 wait in seconds</text>',
    ]
    parts += [
        f'<path d="M{x(tick)} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>'
        f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>'
        for tick in X_TICKS
    ]
    parts += [
        f'<path d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{y(tick)}" dy="4" text-anchor="end">{tick:g}</text>'
        for tick in Y_TICKS
    ]
    for number, name in enumerate(dict.fromkeys(row.trace for row in rows)):
        colour = COLOURS[number]
        line = sorted((row for row in rows if row.trace == name), key=lambda row: row.policy.linger)
        for dash, values in (("4 4", [row.optimum for row in line]), ("", [row.requests for row in line])):
            points = " ".join(f"{x(row.p99)},{y(value)}" for row, value in zip(line, values, strict=True))
            style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{points}" {style}/>')
        parts += [
            f'<circle cx="{x(row.p99)}" cy="{y(row.requests)}"'
            f' r="{6 if row.policy == Policy() else 3}" fill="{colour}"/>'
            for row in line
        ]
        parts.append(f'<text x="{WIDTH - RIGHT + 24}" y="{TOP + 20 + 24 * number}" fill="{colour}">{name}</text>')
    note = TOP + 36 + 24 * len(dict.fromkeys(row.trace for row in rows))
    parts += [
        f'<text x="{WIDTH - RIGHT + 24}" y="{note + 20 * line}" fill="#555">{words}</text>'
        for line, words in enumerate(("dashed: the optimum", "large dot: the default, 5 s"))
    ]
    return "\n".join((*parts, "</svg>", ""))


def draw_day(rows: Sequence[tuple[str, int, bool]]) -> str:
    """An SVG: the requests of each way to send the day, as bars."""
    height, bar, most = 60 + 44 * len(rows), 24, max(requests for _, requests, _ in rows)
    parts = [
        svg(height),
        "<title>Paid requests for a shop's day, by the way it is sent</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="20" y="26" font-size="16" font-weight="bold">Paid requests for a shop\'s day</text>',
    ]
    for number, (name, requests, in_time) in enumerate(rows):
        y, length = 50 + 44 * number, requests / most * (WIDTH - 420)
        colour = COLOURS[2] if in_time else COLOURS[1]
        note = "" if in_time else ", codes late"
        parts.append(f'<text x="340" y="{y + 17}" text-anchor="end">{name}</text>'
                     f'<rect x="350" y="{y}" width="{length:.1f}" height="{bar}" fill="{colour}"/>'
                     f'<text x="{356 + length:.1f}" y="{y + 17}">{requests:,}{note}</text>')  # fmt: skip
    return "\n".join((*parts, "</svg>", ""))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, line by line as it is computed, and draws the picture."""
    parser = argparse.ArgumentParser(description="What a batching policy costs and how long messages wait for it.")
    parser.add_argument("--messages", type=int, default=20_000, help="in each trace (default: 20000)")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default: 1)")
    parser.add_argument("--svg", type=Path, help="directory to draw the pictures into: cost.svg and day.svg")
    parser.add_argument("--day", action="store_true", help="the shop's day alone, which takes some seconds")
    options = parser.parse_args(argv)
    given, done = traces(options.messages, options.seed), []
    if not options.day:
        print(HEAD)
        for row in rows(given):
            done.append(row)
            print(row, flush=True)
            print(f"{len(done)} of {len(given) * len(POLICIES)}", end="\r", file=sys.stderr, flush=True)
        print()
    day = shops_day(options.seed)
    days = list(day_rows(day))
    print(f"| a shop's day of {len(day.arrivals):,} messages | requests | codes in time |\n|---|---:|---|")
    for name, requests, in_time in days:
        print(f"| {name} | {requests:,} | {'yes' if in_time else 'no'} |")
    if options.svg:
        options.svg.mkdir(exist_ok=True)
        if done:
            (options.svg / "cost.svg").write_text(draw(done))
        (options.svg / "day.svg").write_text(draw_day(days))


if __name__ == "__main__":
    main()
