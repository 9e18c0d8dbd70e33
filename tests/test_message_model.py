"""Statuses, values and what is refused."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

import fastsmsing
from base_repository import Claim
from batch_scheduler import Look, SmsProxyConfig
from client_statistics import Statistics
from message_model import (
    FINAL_STATUSES,
    TRANSITIONS,
    Batch,
    ClientResult,
    Entry,
    MessageStatus,
    SendMessage,
    UnknownStatusError,
    ValidationError,
    map_to_internal_status,
)  # fmt: skip

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus
NUMBER = "48123456789"
HELLO = SendMessage(NUMBER, "hello")


def test_the_transitions_are_total_and_those_of_the_contract() -> None:
    assert {
        ACCEPTED: {CONFIRMED, FAILED, DELIVERED}, CONFIRMED: {FAILED, DELIVERED},
        NOT_FOUND: set(), FAILED: set(), DELIVERED: set(),
    } == TRANSITIONS  # fmt: skip
    assert {FAILED, DELIVERED} == FINAL_STATUSES


@pytest.mark.parametrize("status", [*fastsmsing.MessageStatus, "CONFIRMED", "FAILED", "DELIVERED"])
def test_a_status_of_the_provider_is_mapped_as_a_member_and_as_a_string(status: str) -> None:
    assert map_to_internal_status(status) is MessageStatus(status)


UNKNOWN: list[tuple[object, str]] = [  # and what is said of it: a word is named, anything else may be a number
    ("ACCEPTED", "ACCEPTED"), ("confirmed", "confirmed"), ("on_its_way", "on_its_way"), (f"lost {NUMBER}", "str"),
    (f"A{NUMBER}", "str"), ("X" * 31, "str"), ("", "str"), ("żółw", "str"), (None, "NoneType"), (1, "int"),
    (b"FAILED", "bytes"), (["FAILED"], "list"), ({}, "dict"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "said"), UNKNOWN)
def test_any_other_status_is_unknown_and_named_only_if_it_looks_like_one(status: object, said: str) -> None:
    with pytest.raises(UnknownStatusError, match=f"^unknown status {said}$"):
        map_to_internal_status(status)


def test_values_are_frozen_and_slotted_and_no_repr_shows_a_number_or_a_text() -> None:
    entry = Entry(HELLO.to_message("a"), b"fingerprint")
    result = ClientResult((entry.message,), None, 1, None)
    claim: Claim[Batch] = Claim()
    for value in (HELLO, Batch((entry,)), result, SmsProxyConfig(), Statistics(), claim, Look(1, 2.0)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)
        assert (hasattr(value, "__dict__"), NUMBER in repr(value), "hello" in repr(value)) == (False, False, False)


@pytest.mark.parametrize("number", ["0", "1" * 15])
@pytest.mark.parametrize("text", ["x", " ", "\0", "\U0001f4e6" * 1600])
def test_a_message_within_the_limits_is_valid(number: str, text: str) -> None:
    SendMessage(number, text).validate()


def test_a_message_may_say_how_long_it_lingers_and_lasts() -> None:
    for max_delay, max_age in ((0, 0.001), (604_800, 604_800.0), (None, 1), (2.5, None)):
        dataclasses.replace(HELLO, max_delay=max_delay, max_age=max_age).validate()


BAD: dict[str, list[Any]] = {
    "phone_number": ["", "1" * 16, "+48123", "48 123", "1-2", "1\n", "\u0661", "\u00b2", "a", None, 48, b"48", ["1"]],
    "message": ["", "x" * 1601, "a\ud800b", "\udfff", None, 1, b"hello", ["a"]],
    "max_delay": [-1, 604_801, True, "5", math.nan, math.inf, [1]],
    "max_age": [0, -1, 604_801, True, "5", math.nan, math.inf],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_message_that_cannot_be_sent_is_refused_by_field_without_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        dataclasses.replace(HELLO, **{field: value}).validate()
    assert raised.value.field == field
    assert str(raised.value) == f"{field} {raised.value.problem}"
    assert not isinstance(value, str) or not value or value not in raised.value.problem
