"""Virtual time: threads that run one at a time, on a clock that jumps to the next moment at which one of them can.

    world = World()
    with mock.patch.object(batching_client, "threading", world):
        ...  # what is made here waits in virtual time

So hours pass in milliseconds, and a run depends on nothing but its input.
"""
from __future__ import annotations

import functools
import heapq
import itertools
import math
import threading
import types
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["World"]

HANG = 30.0  # real seconds after which a thread that should run never will


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
        self._current = self._main = _Task()
        self._ready: deque[_Task] = deque()
        self._timers: list[tuple[float, int, _Task, int]] = []
        self._count = itertools.count()
        self.switches = 0  # how often a thread began to run

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)  # what needs no time, such as Lock, is the real one

    def clock(self) -> float:
        """The virtual time in seconds."""
        return self.now

    def wait(self, seconds: float | None) -> bool:
        """Lets the others run until someone wakes this thread (True) or the time is over (False)."""
        task = self._current
        if seconds is not None:
            heapq.heappush(self._timers, (self.now + max(0.0, seconds), next(self._count), task, task.waits))
        self.hand_over()
        task.take()
        return task.woken

    def wake(self, task: _Task) -> None:
        """Ends a thread's wait; it runs when its turn comes."""
        task.waits, task.woken = task.waits + 1, True
        self._ready.append(task)

    def hand_over(self) -> None:
        """Lets the next thread run; if none ever can, the main one, with an error."""
        if self._ready:
            task = self._ready.popleft()
        else:
            while self._timers:
                when, _, task, waits = heapq.heappop(self._timers)
                if waits == task.waits:  # otherwise it was woken before
                    self.now = max(self.now, when)
                    task.waits, task.woken = task.waits + 1, False
                    break
            else:
                task = self._main
                task.stuck = True
        self._current = task
        self.switches += 1
        task.go.release()

    def current(self) -> _Task:
        """The thread that runs."""
        return self._current


class _Task:
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
        self._waiting: deque[_Task] = deque()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def acquire(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("a lock was held while virtual time passed")

    def wait(self, timeout: float | None = None) -> bool:
        task = self._world.current()
        self._waiting.append(task)
        self._lock.release()
        if not (woken := self._world.wait(timeout)):
            self._waiting.remove(task)
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
        self._world, self._task, self._over = world, _Task(), _Event(world)

    def start(self) -> None:
        self._world.wake(self._task)
        super().start()

    def run(self) -> None:
        self._task.take()
        try:
            super().run()
        finally:
            self._over.set()
            self._world.hand_over()

    def join(self, timeout: float | None = None) -> None:
        if self._over.wait(timeout):
            super().join(HANG)
