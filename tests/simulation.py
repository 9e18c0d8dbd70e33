"""A shop in virtual time: the real batching client without its threads, on a clock that jumps from event to event.

    world = World()
    shop = Shop(world, away(20.0, 50.0), latency=0.3, max_delay=5.0)
    shop.post(3)
    world.wait(60.0)

What the threads would do is done in order: the dispatcher's steps by `Dispatcher.advance`, a request by `Sender.begin`
when it starts and `Sender.end` when it ends. So hours pass in milliseconds, and a run depends on nothing but its input.
"""
from __future__ import annotations

import heapq
import itertools
import math
import queue
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from base_repository import Repository
from batch_scheduler import Job, SmsProxyConfig
from batching_client import SimpleBatchingClient
from fastsmsing import FastSmsingError, InMemoryClient, Message
from memory_repository import InMemoryRepository
from message_model import Batch, MessageStatus, Reason, SendMessage
from service_metrics import Metrics

__all__ = ["Judge", "Request", "Shop", "World", "away"]


class Party(Protocol):
    """Somebody who acts in the world."""

    def advance(self) -> float:
        """Does all that is to be done now; returns the time of the next step."""


class World:
    """Virtual time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.shops: list[Party] = []
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()

    def clock(self) -> float:
        """The virtual time."""
        return self.now

    def at(self, time: float, call: Callable[[], object]) -> None:
        """Calls it at that time."""
        heapq.heappush(self._events, (time, next(self._count), call))

    def wait(self, seconds: float) -> None:
        """Lets so many seconds pass."""
        self.run(self.now + seconds, lambda: False)

    def run(self, end: float, enough: Callable[[], bool]) -> None:
        """Lets time pass until then, or until it is enough."""
        while True:
            following = min((shop.advance() for shop in self.shops), default=math.inf)
            if enough():
                return
            time = min(following, self._events[0][0] if self._events else math.inf)
            if time > end:
                self.now = max(self.now, end)
                return
            self.now = max(self.now, time)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()


class Request:
    """One request to the provider: when it began, and its messages."""

    def __init__(self, start: float, messages: Sequence[Message]) -> None:
        self.start, self.messages = start, list(messages)
        self.ok = False

    @property
    def ids(self) -> list[str]:
        return [message.message_id for message in self.messages]


Judge = Callable[[Request], Any]  # returns the refusals or None, or raises; asked when the request ends


class Shop:
    """A batching client with its repository and provider. `latency` is what a request takes, or tells it of one."""

    def __init__(
        self, world: World, judge: Judge = lambda request: None, *, latency: float | Callable[[Request], float] = 0.0,
        seed: int = 0, repository: Repository | None = None, ids: str = "m{}", **config: Any,
    ) -> None:  # fmt: skip
        self.world, self.judge, self._id = world, judge, ids
        self.latency: Callable[[Request], float] = latency if callable(latency) else lambda request: latency
        self.requests: list[Request] = []
        self.under_way: list[Request] = []
        self.most_under_way = 0
        self.repository = repository or InMemoryRepository(0, clock=world.clock)
        self.metrics = Metrics()
        self.accepted: list[str] = []
        self.client = SimpleBatchingClient(
            self.repository, InMemoryClient(), SmsProxyConfig(**config), metrics=self.metrics, clock=world.clock,
            rng=random.Random(seed).random, remind=self._remind, autostart=False,
        )  # fmt: skip
        if self.client.config.max_delay is not None:
            self.repository.hasten(self.client.config.max_delay)
        world.shops.append(self)

    # What threads do

    def advance(self) -> float:
        """Does all that is to be done now; returns the time of the next step."""
        while True:
            wait = self.client.dispatcher.advance()
            try:
                job = self.client.dispatcher.jobs.get_nowait()
            except queue.Empty:
                return self.world.now + wait
            while job is not None:
                self._begin(job)
                job = None if self.client.dispatcher.jobs.empty() else self.client.dispatcher.jobs.get_nowait()

    def _begin(self, job: Job[Batch]) -> None:
        if not self.client.sender.prepare(job):
            self.client.dispatcher.ended(job, ())
            return
        self.client.sender.begin(job)
        request = Request(self.world.now, job.sent)
        self.requests.append(request)
        self.under_way.append(request)
        self.most_under_way = max(len(self.under_way), self.most_under_way)
        self.world.at(self.world.now + self.latency(request), lambda: self._end(job, request))

    def _end(self, job: Job[Batch], request: Request) -> None:
        self.under_way.remove(request)
        error, answer = None, None
        try:
            answer = self.judge(request)
            request.ok = True
        except Exception as raised:
            error = raised
        self.client.sender.end(job, error, answer)
        self.client.dispatcher.ended(job, self.client.sender.conclude(job))

    def _remind(self, seconds: float) -> None:
        self.world.at(self.world.now + seconds, self._expire)

    def _expire(self) -> None:
        retries, wait = self.client.expire()
        self.repository.update_all(dict.fromkeys(retries, Reason.EXPIRED))
        if wait != math.inf:
            self.world.at(self.world.now + wait, self._expire)

    # What tests do

    def post(self, count: int = 1, content: str = "Hi", **terms: Any) -> list[str]:
        """Accepts messages at this moment; returns their IDs."""
        ids = [self._id.format(len(self.accepted) + number) for number in range(count)]
        message = SendMessage("48123456789", content, **terms)
        assert self.client.accept_all([self.client.config.entry(message, each) for each in ids]) == [None] * count
        self.accepted += ids
        return ids

    def load(self, seconds: float, rate: float = 10.0, count: int = 10) -> None:
        """Accepts so many messages at a time, `rate` times a second, for so long."""
        for _ in range(round(seconds * rate)):
            self.post(count)
            self.world.wait(1 / rate)

    def stop(self, timeout: float = math.inf) -> int:
        """Stops as the client does, in virtual time."""
        self.client.drain()
        self.world.run(self.world.now + timeout, lambda: self.client.dispatcher.quiet)
        self.client.dispatcher.put_back()
        self.world.shops.remove(self)
        return self.client.stop(0)

    def statuses(self) -> Counter[str]:
        """How many messages have which status; those handed over that nothing was reported on are ACCEPTED."""
        return Counter(self.repository.get(message_id).value for message_id in self.accepted)

    def reasons(self, ids: Sequence[str] | None = None) -> set[Reason | None]:
        """Why these messages, or all, were given up."""
        return {self.repository.reason(message_id) for message_id in (ids or self.accepted)}

    @property
    def failed(self) -> set[str]:
        """The messages that are FAILED."""
        return {each for each in self.accepted if self.repository.get(each) is MessageStatus.FAILED}

    @property
    def taken(self) -> list[str]:
        """What the provider took, in order."""
        return [message_id for request in self.requests if request.ok for message_id in request.ids]

    def delivered_once(self) -> bool:
        """Whether the provider took every message, and none twice."""
        return sorted(self.taken) == sorted(self.accepted)

    def measured(self) -> Metrics:
        """The metrics of this moment."""
        self.client.measure()
        return self.metrics

    @property
    def open(self) -> bool:
        """Whether the circuit breaker is."""
        return bool(self.measured().breaker_open.value)

    @property
    def next_try(self) -> float:
        """Seconds until the next request, if it is open."""
        return self.measured().next_try.value or 0.0

    @property
    def sizes(self) -> list[int]:
        """Of the requests."""
        return [len(request.messages) for request in self.requests]

    @property
    def starts(self) -> list[float]:
        """Of the requests."""
        return [round(request.start, 6) for request in self.requests]


def away(start: float, end: float, error: BaseException | None = None) -> Judge:
    """A provider that is away for a while."""

    def judge(request: Request) -> Mapping[str, str] | None:
        if start <= request.start < end:
            raise error or FastSmsingError(503)
        return None

    return judge
