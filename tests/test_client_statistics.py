"""How well the provider does."""
from __future__ import annotations

from client_statistics import ClientStatistics, Statistics
from fastsmsing import RejectedError
from helpers import together
from message_model import ClientResult, SendMessage

NUMBER = "48123456789"
HELLO = SendMessage(NUMBER, "hello")


def result(error: BaseException | None = None, messages: int = 1, attempt: int = 1) -> ClientResult:
    return ClientResult(tuple(HELLO.to_message(f"m{number}") for number in range(messages)), error, attempt, 3)


def test_statistics_add_up_batches_messages_and_attempts_from_many_threads() -> None:
    statistics = ClientStatistics()
    before = statistics.get_statistics()
    results = result(messages=10), result(RejectedError(NUMBER), 5, 3), result(attempt=2), result()
    together(8, lambda _: [*map(statistics.send, results * 100)])
    after = statistics.get_statistics()
    assert (before, before.success_percentage) == (Statistics(), 100.0)
    assert (after, after.success_percentage) == (Statistics(2_400, 800, 13_600, 5_600, "RejectedError"), 75.0)
