"""IDs: in order of time, unguessable, and those that stand for a key."""
from __future__ import annotations

import uuid

import pytest

import message_ids
from message_model import SendMessage
from providers import Recorder
from smsproxy import SmsProxy

HELLO = SendMessage("48123456789", "hello")


def id_of(key: str | None = None) -> str:
    return SmsProxy(Recorder()).entry(HELLO, key).message.message_id


@pytest.mark.parametrize(("key", "version"), [(None, 7), ("a key", 8)])
def test_an_id_is_a_uuid_of_its_version(key: str | None, version: int) -> None:
    for number in range(200):  # the variant's digit differs
        message_id = id_of(key and f"{key} {number}")
        parsed = uuid.UUID(message_id)
        assert (str(parsed), parsed.version, parsed.variant) == (message_id, version, uuid.RFC_4122)


def test_an_id_begins_with_the_time_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, new_id = [], message_ids.NewIds()
    for now in (1, 1_764_000_000_123, 2**48 - 1):
        monkeypatch.setattr("time.time_ns", lambda: now * 1_000_000 + 999_999)  # noqa: B023
        ids.append(new_id())
        assert message_ids.time_of(ids[-1]) == now / 1000
    assert ids == sorted(ids)


@pytest.mark.parametrize("other", ["", "m1", "x" * 36, "xxxxxxxx-xxxx-7xxx-8xxx-xxxxxxxxxxxx", "\ud800" * 36])
def test_an_id_of_another_kind_tells_no_time(other: str) -> None:
    assert message_ids.time_of(other) is message_ids.time_of(id_of("a key")) is None


def test_any_string_can_be_a_key() -> None:
    with SmsProxy(Recorder()) as proxy:
        first, again = (proxy.send(HELLO, "\ud800") for _ in range(2))
    assert first == again


def test_no_two_ids_are_the_same_but_those_of_one_key() -> None:
    proxy = SmsProxy(Recorder())
    assert len({proxy.entry(HELLO).message.message_id for _ in range(2_000)}) == 2_000
    assert id_of("a key") == id_of("a key") != id_of("a key ")


def test_only_an_id_as_they_are_made_here_is_ours() -> None:
    assert message_ids.is_ours(id_of())
    assert message_ids.is_ours(id_of("a key"))
    others = ["", "48123456789", id_of().upper(), id_of() + "0", "x" * 36, None, 48123456789]
    others += ["xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", f"{id_of()}\n{id_of()}"]
    assert not any(map(message_ids.is_ours, others))
