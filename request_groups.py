"""What the requests of an iteration of the loop ask of the domain, asked as groups; in workers where that blocks."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Generic, TypeVar

from http_exchange import Exchange, Front

__all__ = ["Group"]

LANES = 4  # groups that are worked on at a time where that blocks; their waits overlap then
MOST = 1_000  # items of a group
Item = TypeVar("Item")
Result = TypeVar("Result")


class Group(Generic[Item, Result]):
    """What the requests of one iteration of the loop ask for, asked for together at its end. In the loop's thread.

    If that may block it is done in a worker, `lanes` groups at a time; what comes while all lanes are busy shares the
    next group, of `most` items at the most. `freed` is called when a lane has become free.
    """

    def __init__(
        self, ask: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        respond: Callable[[Exchange, Item, Result], None], *, blocking: bool, lanes: int = LANES, most: int = MOST,
        freed: Callable[[Front], None] = lambda front: None,
    ) -> None:  # fmt: skip
        self._ask_all, self._respond, self._most, self._freed = ask, respond, most, freed
        self.lanes = lanes if blocking else 0
        self.waiting: dict[Exchange, Item] = {}  # for the end of the iteration, or for a lane; in order of arrival
        self._at_end = False  # it is asked at the end of this iteration
        self._under_way = 0

    def add(self, exchange: Exchange, item: Item) -> None:
        """Defers the exchange until `respond` gets the result for the item."""
        exchange.defer(self)
        if not self._at_end:
            self._at_end = True
            exchange.front.at_end(self.ask)
        self.waiting[exchange] = item

    def withdraw(self, exchange: Exchange) -> bool:
        """See `Holder`: what waits is not asked for any more."""
        waited = exchange in self.waiting
        if waited:
            del self.waiting[exchange]
        return waited

    def ask(self, front: Front) -> None:
        """Asks for what waits, as groups."""
        self._at_end = False
        while self.waiting and not (self.lanes and self._under_way >= self.lanes):
            waiting, self.waiting = self.waiting, {}
            if len(waiting) > self._most:
                items = iter(waiting.items())
                waiting, self.waiting = dict(islice(items, self._most)), dict(items)
            if self.lanes:
                self._under_way += 1
                front.submit(self._work, front, waiting)
            else:
                self._finish(waiting, self._results(waiting))

    @property
    def busy(self) -> bool:
        """Whether what is added now has to wait for something else."""
        return bool(self.waiting) or 0 < self.lanes <= self._under_way

    def _work(self, front: Front, waiting: Mapping[Exchange, Item]) -> None:
        front.call_soon(self._done, front, waiting, self._results(waiting))

    def _results(self, waiting: Mapping[Exchange, Item]) -> Sequence[Result | BaseException]:
        try:
            return self._ask_all([*waiting.values()])
        except BaseException as error:  # the boundary: each of them gets a response
            return [error] * len(waiting)

    def _done(
        self, front: Front, waiting: Mapping[Exchange, Item], results: Sequence[Result | BaseException]
    ) -> None:
        self._under_way -= 1
        self.ask(front)  # first of all, so that the disk does not wait for the responses
        self._freed(front)
        self._finish(waiting, results)

    def _finish(self, waiting: Mapping[Exchange, Item], results: Sequence[Result | BaseException]) -> None:
        for (exchange, item), result in zip(waiting.items(), results, strict=True):
            try:  # in place of `Exchange.finish`, whose calls cost a hundredth of a POST
                if isinstance(result, BaseException):
                    exchange.fail(result)
                else:
                    self._respond(exchange, item, result)
            except (Exception, SystemExit) as error:
                exchange.failed(error)
