"""What the webhook sends: addresses, secrets, bodies and signatures."""
from __future__ import annotations

import base64
import json
import time
from email.utils import formatdate

import pytest

from change_outbox import Change, ChangeBody
from message_model import MessageStatus, Reason, ValidationError
from receivers import SECRETS, VERIFY, secret_line, verified, verifier
from webhook_message import (
    LONGEST_WAIT,
    WebhookConfig,
    WebhookTarget,
    content_of,
    retry_after,
    signed_headers,
    webhook_secrets,
)  # fmt: skip

NOW = 1_795_658_523.456
BODY = ChangeBody("msg_1", NOW, (
    Change("a", MessageStatus.DELIVERED), Change("b", MessageStatus.FAILED, Reason.EXPIRED),
    Change("c", MessageStatus.CONFIRMED)))  # fmt: skip


# Where to


@pytest.mark.parametrize(("url", "shown", "path", "authorization"), [
    ("http://shop.example", "http://shop.example:80", "/", None),
    ("https://shop.example/hook?a=b&c", "https://shop.example:443", "/hook?a=b&c", None),
    ("HTTP://[::1]:8080/x#part", "http://[::1]:8080", "/x", None),
    ("https://shop:hunter2@shop.example:8443/", "https://shop.example:8443", "/", b"shop:hunter2"),
    ("https://sh%40p:h%2Fnter%3A2@shop.example", "https://shop.example:443", "/", b"sh@p:h/nter:2"),
    ("https://token@shop.example", "https://shop.example:443", "/", b"token:")])  # fmt: skip
def test_a_url_is_taken_apart_and_only_its_host_is_shown(
    url: str, shown: str, path: str, authorization: bytes | None
) -> None:
    target = WebhookTarget.of(url)
    basic = None if authorization is None else f"Basic {base64.b64encode(authorization).decode()}"
    assert (str(target), target.path, target.authorization) == (shown, path, basic)
    text = repr(WebhookConfig(target, SECRETS))
    assert [each for each in ("hunter2", "nter", "token", "/hook", "secrets") if each in text] == []


@pytest.mark.parametrize("url", [
    "", "shop.example", "//shop.example", "ftp://shop.example", "https://", "https:///hook", "https://:443/",
    "http://u:p@",
    "https://shop.example:0/", "https://shop.example:65536/", "https://shop.example:x/", "https://sh op.example/",
    "https://shop.example/ü", "https://shop.example/a b", "https://shop.example/\r\nX: y",
    f"https://{'a' * 64}.example/", "https://a..b/", "http://[::1", "mailto:hunter2@shop.example"])  # fmt: skip
def test_what_is_no_url_of_a_receiver_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError) as error:
        WebhookTarget.of(url)
    assert str(error.value) == "webhook_url must be an http:// or https:// URL with a host, in ASCII"
    assert error.value.__cause__ is None


# Secrets


@pytest.mark.parametrize("size", [24, 32, 64])
def test_a_file_has_one_secret_or_two(size: int) -> None:
    first, second = secret_line(b"a" * size), secret_line(b"b" * size)
    assert webhook_secrets(first) == (b"a" * size,)
    assert webhook_secrets(f"# rotated in May\n{second} \r\n\n{first}\n") == (b"b" * size, b"a" * size)


@pytest.mark.parametrize(("text", "problem"), [
    ("", "must have one secret"), ("# none\n", "must have one secret"),
    ("\n".join(secret_line(bytes([each] * 24)) for each in range(3)), "must have one secret"),
    (secret_line(b"q" * 23), "line 1 must be whsec_"), (f"#\n{secret_line(b'q' * 65)}", "line 2 must be"),
    ("cXFx" * 8, "line 1"), ("whsec_" + "cXFx" * 8 + "!", "line 1"), ("whsec_" + "cXFx" * 8 + "c", "line 1"),
    ("whsec_" + "cXFxü" * 8, "line 1"), ("whsec_ " + "cXFx" * 8, "line 1"),
    ("WHSEC_" + "cXFx" * 8, "line 1")])  # fmt: skip
def test_a_wrong_secret_is_refused_and_not_repeated(text: str, problem: str) -> None:
    with pytest.raises(ValidationError) as error:
        webhook_secrets(text)
    assert error.value.problem.startswith(problem)
    assert "cXF" not in str(error.value)


# What


def test_a_body_says_what_became_of_each_message() -> None:
    assert json.loads(content_of(BODY)) == {
        "type": "sms.status",
        "timestamp": "2026-11-26T02:02:03.456Z",
        "data": {"Messages": [
            {"ID": "a", "Status": "DELIVERED"}, {"ID": "b", "Status": "FAILED", "Reason": "expired"},
            {"ID": "c", "Status": "CONFIRMED"}]},
    }  # fmt: skip


def test_a_body_has_the_same_bytes_whenever_it_is_made() -> None:
    made = ChangeBody.made(BODY.changes, 1_795_658_523.4564999, 7.0)
    again = ChangeBody(made.id, made.timestamp, tuple(Change(*change) for change in made.changes))
    assert content_of(made) == content_of(again)
    assert b'"2026-11-26T02:02:03.456Z"' in content_of(made)


def test_the_signature_is_that_of_the_specifications_example() -> None:
    # From the libraries' own tests, which all have the same secret, message and signature.
    (secret,) = webhook_secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', (secret,), 1614265330.9)
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_with_two_secrets_a_receiver_that_knows_either_takes_it_and_no_other_does() -> None:
    headers = signed_headers("msg_1", b"{}", SECRETS, time.time())
    assert [verified(headers, b"{}", secret) for secret in (*SECRETS, b"x" * 24)] == [True, True, False]
    assert [verified(headers, b"{ }", secret) for secret in SECRETS] == [False, False]
    assert not verified(signed_headers("msg_1", b"{}", SECRETS, time.time() - 600), b"{}")
    assert len(headers["webhook-signature"].split(" ")) == 2


def test_the_receiver_of_the_documentation_has_ten_lines() -> None:
    verifier(VERIFY)
    assert len([line for line in VERIFY.splitlines() if line and '"""' not in line]) <= 10


# How long to wait


@pytest.mark.parametrize(("value", "seconds"), [
    (None, 0.0), ("", 0.0), ("0", 0.0), ("7", 7.0), (" 120 ", 120.0), ("3601", LONGEST_WAIT), ("9" * 15, LONGEST_WAIT),
    ("9" * 16, LONGEST_WAIT), ("9" * 9_999, LONGEST_WAIT), ("0" * 20, 0.0),
    ("-1", 0.0), ("1.5", 0.0), ("soon", 0.0), ("\u0661", 0.0), ("Fri, 99 Foo 2026", 0.0),
    (formatdate(int(NOW) + 90, usegmt=True), 89.544), (formatdate(int(NOW) - 90, usegmt=True), 0.0),
    (formatdate(int(NOW) + 90, localtime=False), 89.544), (formatdate(NOW + 86_400, usegmt=True), LONGEST_WAIT),
    ("Thu, 26 Nov 99999 01:02:03 GMT", 0.0)])  # fmt: skip
def test_retry_after_is_seconds_or_a_date_and_an_hour_at_the_most(value: str | None, seconds: float) -> None:
    assert retry_after(value, NOW) == pytest.approx(seconds, abs=0.01)
