"""No part of a password gets out, whatever form the URL has."""
from __future__ import annotations

import logging
import traceback

import pytest

from message_model import RepositoryUnavailableError
from postgres import PostgresRepository, check_database, describe_url

SECRETS = ("5ecret", "w0rd")  # the parts of a password that a misread URL could tear apart
READABLE = {
    "postgresql://shop:5ecretw0rd@db.example:6543/sms?sslmode=require": "postgresql://db.example:6543/sms",
    "postgres://shop:5ecret[w0rd@db.example/sms": "postgresql://db.example/sms",
    "postgresql://shop:5ecretäw0rd@db.example/sms": "postgresql://db.example/sms",
    "postgresql://shop:5ecret:w0rd@db.example/sms": "postgresql://db.example/sms",
    "postgresql://shop:5ecret?w0rd#@db.example/sms": "postgresql://db.example/sms",
    "postgresql://shop:5ecret%2Fw0rd%40@[::1]:5432/sms": "postgresql://[::1]:5432/sms",
    "postgresql://shop:5ecretw0rd@a,b:1/sms": "postgresql://a,b:1/sms",
    "postgresql://a:1,b:2/sms?user=shop&password=5ecretw0rd": "postgresql://a:1,b:2/sms",
    "postgresql:///sms?host=/run/postgresql&password=5ecretw0rd": "postgresql:///run/postgresql/sms",
    "host=a,b port=5432 dbname=sms password='5ecret w0rd'": "postgresql://a:5432,b:5432/sms",
    "": "postgresql:///",
}
MISREAD = [
    "postgresql://shop:5ecret/w0rd@db.example/sms",  # the host "shop", the port "5ecret", the database "w0rd@..."
    "postgresql://shop:5432/5ecretw0rd@db.example/sms",  # a port that could be one
    "postgresql://shop:5432/5ecret?w0rd=@db.example/sms",
    "postgresql://shop:5ecret@w0rd@db.example/sms",
    "postgresql://shop:5ecret%w0rd@db.example/sms",
    "postgresql://shop:5ecretw0rd",
    "postgresql://shop:5ecret\0w0rd@db.example/sms",
    "postgresql://shop:5ecret\ud800w0rd@db.example/sms",
    "postgresql://shop:5ecretw0rd@[::1/sms",
    "postgresql://db.example/sms?pasword=5ecretw0rd",
    "host=db.example password=5ecret w0rd",
    "host=db.example port=5ecretw0rd",
    "Postgresql://shop:5ecretw0rd@db.example/sms",
]


@pytest.mark.parametrize("url", READABLE)
def test_host_port_and_database_are_told(url: str) -> None:
    assert describe_url(url) == READABLE[url]


@pytest.mark.parametrize("url", MISREAD)
def test_of_a_url_that_may_be_misread_nothing_is_told(url: str) -> None:
    assert describe_url(url) == "postgresql://?"


@pytest.mark.parametrize("url", [*READABLE, *MISREAD])
def test_no_error_and_no_log_has_a_part_of_the_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = url.replace("db.example", "127.0.0.1").replace("5432", "1").replace("6543", "1")
    for use in (PostgresRepository, check_database):
        with pytest.raises(RepositoryUnavailableError) as caught:
            use(url)
        shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb)) + caplog.text
        assert not [secret for secret in SECRETS if secret in shown]
        assert not [place for place in ("127.0.0.1", "port", "/run") if place in str(caught.value)]


@pytest.mark.parametrize(("url", "why"), [
    ("postgresql://127.0.0.1:1/sms", "connection refused"),
    ("postgresql:///sms?host=/nowhere", "connection refused"),
    ("postgresql://no.host.invalid/sms", "the host's name cannot be resolved"),
    ("postgresql://127.0.0.1:1/sms?sslmode=perhaps", "a value in the URL is not valid"),
])  # fmt: skip
def test_why_a_connection_failed_is_told_without_the_place(url: str, why: str) -> None:
    with pytest.raises(RepositoryUnavailableError) as caught:
        check_database(url)
    assert str(caught.value) == f"cannot connect to PostgreSQL: {why}"
