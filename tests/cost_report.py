"""What a policy costs: replays arrivals through the real batching client in virtual time, and prints a table.

    python tests/cost_report.py [--messages 20000] [--seed 1]

Every row is one policy on one trace of arrivals. *Requests* are those the provider is paid for, per 1,000
messages. *Wait* is the time from a message's arrival to the start of the request that carries it.

*Of the minimum* compares with the fewest requests that any policy could have made, even one that knows the
future and is never held up by a slow provider, if no message is to wait longer than this row's p99 wait W and no
request may hold more than the row's largest batch. It is found by greedy covering: the first message not yet covered
has to leave by its arrival + W, and its request may as well leave only then and take along everything that has
arrived by that moment, up to the largest batch; then on with the first message that is left. No cover has
fewer requests, because each of them takes the first message left over and nothing reaches further than it does. A
share above 100 % is possible, as one message in a hundred does wait longer than W.
"""
from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import math
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smsproxy  # noqa: E402
from fastsmsing import InMemoryClient, Message  # noqa: E402
from smsproxy import InMemoryRepository, SendMessage, SimpleBatchingClient, SmsProxyConfig  # noqa: E402

HANG = 30.0  # real seconds after which a thread that should run never will
HOURS = (1, 1, 1, 1, 1, 2, 4, 7, 10, 12, 13, 13, 14, 13, 12, 12, 13, 14, 16, 18, 17, 12, 6, 3)  # a shop's day


# Virtual time


class World(types.ModuleType):
    """Virtual time, and a stand-in for the module `threading` in which it passes.

    Of its threads one runs at a time, until it waits; then the next one that can run does. When none
    can, the clock jumps to the earliest end of a wait. So a run depends on nothing but its input.
    """

    def __init__(self) -> None:
        super().__init__("virtual threading")
        self.now = 0.0
        self.Thread = functools.partial(_Thread, self)
        self.Condition = functools.partial(_Condition, self)
        self.Event = functools.partial(_Event, self)
        self._current = self._main = _Turn()
        self._ready: deque[_Turn] = deque()
        self._timers: list[tuple[float, int, _Turn, int]] = []
        self._count = itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)  # what needs no time, such as Lock, is the real one

    def clock(self) -> float:
        """The virtual time in seconds."""
        return self.now

    def wait(self, seconds: float | None) -> bool:
        """Lets the others run until someone wakes this thread (True) or the time is over (False)."""
        turn = self._current
        if seconds is not None:
            heapq.heappush(self._timers, (self.now + max(0.0, seconds), next(self._count), turn, turn.waits))
        self.hand_over()
        turn.take()
        return turn.woken

    def wake(self, turn: _Turn) -> None:
        """Ends a thread's wait; it runs when its turn comes."""
        turn.waits, turn.woken = turn.waits + 1, True
        self._ready.append(turn)

    def hand_over(self) -> None:
        """Lets the next thread run; if none ever can, the main one, with an error."""
        if self._ready:
            turn = self._ready.popleft()
        else:
            while self._timers:
                when, _, turn, waits = heapq.heappop(self._timers)
                if waits == turn.waits:  # otherwise it was woken before
                    self.now = max(self.now, when)
                    turn.waits, turn.woken = turn.waits + 1, False
                    break
            else:
                turn = self._main
                turn.stuck = True
        self._current = turn
        turn.go.release()

    def current(self) -> _Turn:
        """The thread that runs."""
        return self._current


class _Turn:
    """A thread as the world sees it."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)  # released when it may run
        self.waits = 0  # that have ended
        self.woken = self.stuck = False

    def take(self) -> None:
        if not self.go.acquire(timeout=HANG) or self.stuck:
            raise RuntimeError("every thread waits for another one")


class _Condition:
    def __init__(self, world: World, lock: Any = None) -> None:
        self._world, self._lock = world, lock or threading.RLock()
        self._waiting: deque[_Turn] = deque()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def acquire(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("a lock was held while virtual time passed")

    def wait(self, timeout: float | None = None) -> bool:
        turn = self._world.current()
        self._waiting.append(turn)
        self._lock.release()
        if not (woken := self._world.wait(timeout)):
            self._waiting.remove(turn)
        self.acquire()
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        end = math.inf if timeout is None else self._world.now + timeout
        while not (result := predicate()) and self._world.now < end:
            self.wait(None if timeout is None else end - self._world.now)
        return result

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiting))):
            self._world.wake(self._waiting.popleft())

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class _Event:
    def __init__(self, world: World) -> None:
        self._condition, self._flag = _Condition(world), False

    def is_set(self) -> bool:
        return self._flag

    def set(self) -> None:
        with self._condition:
            self._flag = True
            self._condition.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        with self._condition:
            return bool(self._condition.wait_for(self.is_set, timeout))


class _Thread(threading.Thread):
    def __init__(self, world: World, **options: Any) -> None:
        super().__init__(**options)
        self._world, self._turn, self._over = world, _Turn(), _Event(world)

    def start(self) -> None:
        self._world.wake(self._turn)
        super().start()

    def run(self) -> None:
        self._turn.take()
        try:
            super().run()
        finally:
            self._over.set()
            self._world.hand_over()

    def join(self, timeout: float | None = None) -> None:
        if self._over.wait(timeout):
            super().join(HANG)


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


def traces(messages: int, seed: int) -> dict[str, list[float]]:
    """The arrivals by name of the trace."""
    shapes = {
        "steady, 1/s": [(3600.0, 1.0)],
        "steady, 20/s": [(3600.0, 20.0)],
        "bursts of 400": [(590.0, 0.2), (10.0, 40.0)],
        "a day of a shop": [(3600.0, messages / 24 / 3600 * share * 24 / sum(HOURS)) for share in HOURS],
    }
    rngs = {name: random.Random(seed) for name in shapes}
    return {name: list(itertools.islice(arrivals(rngs[name], shapes[name]), messages)) for name in shapes}


# Replaying


@dataclass(frozen=True)
class Policy:
    """When batches leave, and how long the provider takes for each."""

    batch_size: int
    growth: int  # the largest batch is so many times the batch size
    linger: float
    latency: float = 0.3


@dataclass(frozen=True)
class Cost:
    """What a policy made of a trace."""

    requests: int
    waits: tuple[float, ...]  # ascending

    def wait(self, share: float) -> float:
        """The wait that so large a share of the messages does not exceed."""
        return self.waits[max(0, math.ceil(share * len(self.waits)) - 1)]


def replay(trace: Sequence[float], policy: Policy) -> Cost:
    """Sends every message at its time through the real batching client."""
    world, requests = World(), 0
    waits: list[float] = []

    class Provider(InMemoryClient):
        def send(self, messages: Sequence[Message]) -> None:
            nonlocal requests
            requests += 1
            waits.extend(world.now - trace[int(message.message_id)] for message in messages)
            world.wait(policy.latency)

    config = SmsProxyConfig(
        batch_size=policy.batch_size,
        max_batch_size=policy.batch_size * policy.growth,
        max_delay=policy.linger,
        max_pending=max(policy.batch_size, len(trace)),
    )
    with mock.patch.object(smsproxy, "threading", world):
        client = SimpleBatchingClient(InMemoryRepository(0), Provider(), config, clock=world.clock)
        for number, time in enumerate(trace):
            world.wait(time - world.now)
            client.send(SendMessage("48123456789", "Hi"), str(number))
        world.wait(policy.linger)  # so that the last batch leaves as any other
        left = client.stop()
    if left or len(waits) != len(trace):
        raise RuntimeError(f"{left} messages left, {len(waits)} of {len(trace)} sent")
    return Cost(requests, tuple(sorted(waits)))


def minimum(trace: Sequence[float], longest_wait: float, largest_batch: int) -> int:
    """The fewest requests by which every message can leave in time; see the top of this file."""
    requests = covered = 0
    while covered < len(trace):
        requests += 1
        last, end = trace[covered] + longest_wait + 1e-9, covered + largest_batch
        while covered < min(end, len(trace)) and trace[covered] <= last:
            covered += 1
    return requests


POLICIES = (
    Policy(1, 1, 0.0),
    Policy(10, 1, 5.0), Policy(10, 10, 5.0),  # the latter as the command does it by default
    Policy(10, 1, 5.0, 2.0), Policy(10, 10, 5.0, 2.0),
    Policy(50, 2, 5.0),
    Policy(100, 1, 1.0), Policy(100, 1, 5.0), Policy(100, 1, 5.0, 2.0), Policy(100, 1, 30.0),
)  # fmt: skip


def report(traces: dict[str, list[float]], policies: Sequence[Policy] = POLICIES) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield ("| arrivals | batch size | largest batch | linger, s | provider, s"
           " | requests per 1,000 | p50 wait, s | p99 wait, s | of the minimum |")  # fmt: skip
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, trace in traces.items():
        for policy in policies:
            cost = replay(trace, policy)
            p50, p99, largest = cost.wait(0.5), cost.wait(0.99), policy.batch_size * policy.growth
            yield (f"| {name} | {policy.batch_size} | {largest} | {policy.linger:g} | {policy.latency:g}"
                   f" | {1000 * cost.requests / len(trace):.0f} | {p50:.2f} | {p99:.2f}"
                   f" | {minimum(trace, p99, largest) / cost.requests:.0%} |")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What a batching policy costs and how long messages wait for it.")
    parser.add_argument("--messages", type=int, default=20_000, help="in each trace (default: 20000)")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default: 1)")
    options = parser.parse_args(argv)
    for line in report(traces(options.messages, options.seed)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
