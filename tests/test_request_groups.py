"""Groups of what requests ask for, and the lanes where that blocks. Steps are taken by hand: no threads."""
from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from request_groups import Group

Call = tuple[Callable[..., None], tuple[Any, ...]]


class Steps:
    """A front whose calls wait until a test takes them."""

    def __init__(self) -> None:
        self.ending: list[Callable[[Any], None]] = []
        self.submitted: list[Call] = []
        self.called: list[Call] = []

    def at_end(self, call: Callable[[Any], None]) -> None:
        self.ending.append(call)

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        self.submitted.append((work, args))

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        self.called.append((call, args))

    def end(self) -> None:
        """The end of an iteration."""
        ending, self.ending = self.ending, []
        for call in ending:
            call(self)

    def work(self) -> None:
        """A worker carries out the first group, and the loop gets its results."""
        for calls in (self.submitted, self.called):
            call, args = calls.pop(0)
            call(*args)


class Asked:
    """An exchange that keeps what it got."""

    def __init__(self, front: Steps) -> None:
        self.front, self.got = front, list[object]()

    def defer(self, holder: object) -> None:
        """Needs nothing."""

    def fail(self, error: BaseException) -> None:
        self.got.append(error)

    failed = fail


def double(numbers: Sequence[int]) -> list[int | Exception]:
    return [2 * number for number in numbers]


def answer(exchange: Any, number: int, result: int) -> None:
    exchange.got.append((number, result))


def group_of(ask: Callable[[Sequence[int]], Sequence[int | Exception]] = double, **options: Any) -> Group[int, int]:
    return Group(ask, answer, **{"blocking": True, "lanes": 2, **options})


def ask(front: Any, group: Group[int, int], *numbers: int) -> list[Any]:
    """What came in one iteration, which ends."""
    asked: list[Any] = [Asked(front) for _ in numbers]
    for exchange, number in zip(asked, numbers, strict=True):
        group.add(exchange, number)
    front.end()
    return asked


def test_what_came_in_an_iteration_is_asked_for_as_one_group() -> None:
    front, groups = Steps(), list[Sequence[int]]()

    def note(numbers: Sequence[int]) -> list[int | Exception]:
        groups.append(numbers)
        return double(numbers)

    group = group_of(note, blocking=False)
    asked = ask(front, group, 1, 2, 3) + ask(front, group, 4)
    assert (groups, group.busy) == ([[1, 2, 3], [4]], False)
    assert [exchange.got for exchange in asked] == [[(1, 2)], [(2, 4)], [(3, 6)], [(4, 8)]]


def test_no_more_groups_than_lanes_are_under_way_and_what_comes_meanwhile_shares_the_next_one() -> None:
    front, freed = Steps(), list[object]()
    group = group_of(freed=freed.append)
    asked = ask(front, group, 1)
    assert not group.busy
    asked += ask(front, group, 2)
    assert group.busy
    asked += ask(front, group, 3) + ask(front, group, 4)
    for under_way in (2, 2, 1, 0):  # 1 and 2; 2, and 3 with 4; 3 with 4; none
        assert (len(front.submitted), group.busy) == (under_way, under_way == 2)
        if under_way:
            front.work()
    assert freed == [front] * 3
    assert [exchange.got for exchange in asked] == [[(number, 2 * number)] for number in (1, 2, 3, 4)]


def test_a_group_that_is_under_way_again_and_again_never_takes_another_lane() -> None:
    front, group = Steps(), group_of(lanes=1)
    for number in range(5):
        ask(front, group, number)
        ask(front, group, number)
        assert len(front.submitted) == 1
        front.work()


@pytest.mark.parametrize("error", [ArithmeticError("a bug"), SystemExit(1), asyncio.CancelledError()])
def test_an_error_is_the_response_to_all_of_its_group_and_to_no_other(error: Any) -> None:
    front = Steps()

    def fail(numbers: Sequence[int]) -> list[int | Exception]:
        if 0 in numbers:
            raise error
        return [error if number == 1 else number for number in numbers]

    group = group_of(fail, blocking=False)
    asked = ask(front, group, 0, 2) + ask(front, group, 1, 3)
    assert [exchange.got for exchange in asked] == [[error], [error], [error], [(3, 3)]]


def test_what_waits_for_a_lane_can_be_withdrawn_and_what_is_under_way_cannot() -> None:
    front, group = Steps(), group_of(lanes=1)
    asked = ask(front, group, 1) + ask(front, group, 2, 3, 4)
    assert [group.withdraw(asked[place]) for place in (0, 2, 2)] == [False, True, False]
    front.work()
    front.work()
    assert [exchange.got for exchange in asked] == [[(1, 2)], [(2, 4)], [], [(4, 8)]]


def test_what_is_more_than_a_group_may_have_waits_for_the_next_one() -> None:
    front, groups = Steps(), list[Sequence[int]]()

    def note(numbers: Sequence[int]) -> list[int | Exception]:
        groups.append(numbers)
        return double(numbers)

    asked = ask(front, group_of(note, blocking=False, most=2), 1, 2, 3, 4, 5)
    assert (groups, [exchange.got for exchange in asked]) == (
        [[1, 2], [3, 4], [5]], [[(number, 2 * number)] for number in range(1, 6)])  # fmt: skip


def test_a_group_whose_end_failed_is_asked_for_again() -> None:
    front, group = Steps(), group_of(lambda numbers: [], blocking=False, most=1)
    with pytest.raises(ValueError, match="zip"):
        ask(front, group, 1, 2)
    assert len(group.waiting) == 1
    with pytest.raises(ValueError, match="zip"):
        ask(front, group, 3)
