"""What the log says of errors and IDs."""
from __future__ import annotations

import logging
import urllib.error
from typing import Any

import pytest

from fastsmsing import FastSmsingError
from helpers import Clock
from incident_log import Incident, Incidents, counted, describe, named

NUMBER = "48123456789"
OURS = "01a21087-c443-7ce3-b466-{:012x}"


class Odd(Exception):
    """An error that can have any attributes."""


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError(NUMBER)

    __repr__ = __str__
    errno = retry_after = property(__str__)


class Argless(FastSmsingError):
    def __init__(self, *args: object) -> None:
        """Forgets its base class."""

    args = property(Mute.__str__)


def having(error: Exception, **attributes: object) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *[(ValueError(*args), "ValueError") for args in ((), (NUMBER,), (int(NUMBER),), (True,), (NUMBER, 112))],
        (ValueError(503, NUMBER), "ValueError 503"),
        (OSError(28, NUMBER, NUMBER), "OSError 28"),
        *[(having(Odd(NUMBER), **{name: 7}), "Odd 7") for name in ("errno", "code", "status")],
        (having(Odd(), code=int(NUMBER), status=NUMBER, errno=[NUMBER]), "Odd"),
        (having(Odd(), code=-1, status=1000, errno=0), "Odd"),
        (Mute(NUMBER), "Mute"),
        (Argless(NUMBER), "Argless"),
        (having(FastSmsingError(NUMBER), __cause__=TimeoutError(NUMBER)), "FastSmsingError from TimeoutError"),
        (urllib.error.URLError(ConnectionRefusedError(111, NUMBER)), "URLError from ConnectionRefusedError"),
        (urllib.error.URLError(NUMBER), "URLError"),
        (SystemExit(3), "SystemExit 3"),
    ],
)  # fmt: skip
def test_an_error_is_described_by_type_number_and_cause_and_never_by_its_text(
    error: BaseException, expected: str
) -> None:
    assert describe(error) == expected


def test_an_incident_is_logged_when_it_begins_once_a_minute_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    incident = Incident(logging.getLogger("smsproxy"), "cannot write", clock=clock)
    incident.ended()
    for seconds in (0, 10, 49, 1, 59, 2):
        clock.advance(seconds)
        incident.failed("disk full")
    incident.ended()
    incident.ended()
    incident.failed("disk full")
    assert caplog.messages == [
        "cannot write: disk full",
        "cannot write: disk full (4 times in 60 s)",
        "cannot write: disk full (6 times in 121 s)",
        "cannot write: over after 121.0 s and 6 errors",
        "cannot write: disk full",
    ]


@pytest.mark.parametrize(("ids", "expected"), [
    ([OURS.format(1), OURS.format(2)], f"{OURS.format(1)} {OURS.format(2)}"),
    ([OURS.format(1), NUMBER, None], f"{OURS.format(1)} (and 2 more)"),
    ([NUMBER], "1 other ID"),
    ([NUMBER, 48123456789], "2 other IDs"),
    ([OURS.format(1)] * 1000, " ".join([OURS.format(1)] * 100) + " (and 900 more)"),
])  # fmt: skip
def test_at_most_100_ids_are_named_and_only_our_own(ids: list[Any], expected: str) -> None:
    assert named(ids) == expected


@pytest.mark.parametrize(("number", "expected"), [
    (0, "0 messages"), (1, "1 message"), (1.0, "1 message"), (2, "2 messages")])  # fmt: skip
def test_a_noun_has_its_plural(number: float, expected: str) -> None:
    assert counted(number, "message") == expected


def raised(kind: type[Exception]) -> Exception:
    try:
        raise kind(NUMBER)
    except Exception as error:
        return error


def test_errors_of_different_places_are_different_incidents(caplog: pytest.LogCaptureFixture) -> None:
    incidents = Incidents(logging.getLogger("test"), "requests fail", clock=lambda: 0.0)
    for kind in (KeyError, KeyError, ZeroDivisionError, ZeroDivisionError):
        incidents.failed(f"GET /{kind.__name__}", raised(kind))
    incidents.failed("GET /", OSError())  # which was never raised
    assert caplog.messages == [f"requests fail: GET /{name}" for name in ("KeyError", "ZeroDivisionError", "")]
