"""One request to a receiver, whatever the receiver does."""
from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from change_outbox import Change, ChangeBody
from helpers import HANG, every_thread_ends, returned_by
from message_model import MessageStatus
from receivers import SECRETS, Behaviour, Receiver, answer, away, garbage, hanging, reset, trickle, verified
from webhook_message import WebhookTarget, content_of
from webhook_sender import TIMEOUT, Answer, WebhookSender

__all__ = ["every_thread_ends"]

BODY = ChangeBody.made([Change("a", MessageStatus.DELIVERED)], 1.8e9, float("inf"))
SOON = 0.2  # seconds; a timeout that a test can wait for


def post(receiver: Receiver | str, secrets: tuple[bytes, ...] = SECRETS[:1], *, timeout: float = HANG) -> Answer:
    url = receiver if isinstance(receiver, str) else receiver.url()
    answered = returned_by(lambda: WebhookSender(WebhookTarget.of(url), secrets, timeout=timeout).post(BODY))
    assert isinstance(answered, Answer)
    return answered


def test_a_request_is_as_standard_webhooks_says() -> None:
    with Receiver() as receiver:
        assert post(receiver.url("/hook?shop=7", "us%65r:pass@")) == Answer(True, "status 204")
        port = receiver.server_address[1]
    (told,) = receiver.told
    assert told.line == "POST /hook?shop=7 HTTP/1.1"
    assert told.headers["host"] == f"127.0.0.1:{port}"
    assert told.headers["content-type"] == "application/json"
    assert told.headers["authorization"] == f"Basic {base64.b64encode(b'user:pass').decode()}"
    assert (told.id, told.body) == (BODY.id, content_of(BODY))
    assert abs(time.time() - int(told.headers["webhook-timestamp"])) < HANG
    assert verified(told.headers, told.body)
    assert json.loads(told.body)["type"] == "sms.status"


def test_a_repeat_has_the_same_id_and_body_and_is_signed_anew() -> None:
    now = time.time() - 100
    with Receiver() as receiver:
        sender = WebhookSender(WebhookTarget.of(receiver.url()), SECRETS[:1], wall_clock=lambda: now)
        sender.post(BODY)
        now, sender.secrets = now + 100, SECRETS
        sender.post(BODY)
    first, second = receiver.told
    assert (first.id, first.body) == (second.id, second.body)
    assert int(second.headers["webhook-timestamp"]) == int(first.headers["webhook-timestamp"]) + 100
    assert [verified(each.headers, each.body, secret) for each in (first, second) for secret in SECRETS] == [
        True, False, True, True,
    ]  # fmt: skip
    assert "authorization" not in first.headers


@pytest.mark.parametrize("status", [200, 204, 299])
def test_a_2xx_is_success(status: int) -> None:
    with Receiver(usually=answer(status, body=b"thank you")) as receiver:
        assert post(receiver) == Answer(True, f"status {status}")


@pytest.mark.parametrize("status", [300, 304, 400, 401, 404, 410, 429, 500, 503, 999])
def test_everything_else_is_a_failure(status: int) -> None:
    with Receiver(usually=answer(status, "Retry-After: 7", body=b"48123456789")) as receiver:
        assert post(receiver) == Answer(False, f"status {status}", 7.0)


@pytest.mark.parametrize("interim", [[100], [102], [103], [103, 100, 102, 199]])
def test_interim_responses_are_passed_over(interim: list[int]) -> None:
    before = b"".join(f"HTTP/1.1 {status} Wait\r\nLink: </a>\r\nRetry-After: 9\r\n\r\n".encode() for status in interim)
    for status, ok in (200, True), (503, False):
        final = f"HTTP/1.1 {status} Told\r\nContent-Length: 2\r\n\r\nhi"
        with Receiver(garbage(before + final.encode())) as receiver:
            assert post(receiver) == Answer(ok, f"status {status}")


def test_a_change_of_protocol_is_a_failure() -> None:
    with Receiver(garbage(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n")) as receiver:
        assert post(receiver) == Answer(False, "status 101")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with Receiver() as elsewhere, Receiver(answer(status, f"Location: {elsewhere.url()}")) as receiver:
        assert post(receiver) == Answer(False, f"status {status}")
    assert (len(receiver.told), elsewhere.told) == (1, [])


@pytest.mark.parametrize(("behaviour", "said"), [
    (reset, "ConnectionResetError 104"), (garbage(b""), "RemoteDisconnected"),
    (garbage(b"48123456789\r\n"), "BadStatusLine"),
    (garbage(b"HTTP/1.1 200 OK\r\n" + b"X: 48123456789\r\n" * 200 + b"\r\n"), "HTTPException"),
    (garbage(b"HTTP/1.1 200 " + b"x" * 100_000), "LineTooLong")])  # fmt: skip
def test_of_an_answer_that_is_none_only_the_type_is_said(behaviour: Behaviour, said: str) -> None:
    with Receiver(behaviour) as receiver:
        assert post(receiver) == Answer(False, said)


def test_a_receiver_that_is_away_is_a_failure() -> None:
    with away() as url:
        assert post(url) == Answer(False, "ConnectionRefusedError 111")
    assert post("http://nobody.invalid/").said.startswith("gaierror")


def resolved(monkeypatch: pytest.MonkeyPatch, *addresses: Any) -> None:
    """Every name has these addresses, whatever the port."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)


def test_of_several_addresses_the_first_that_can_be_reached_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as receiver, socket.socket() as closed, socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        closed.bind(("127.0.0.1", 0))
        with socket.create_connection(full.getsockname()):  # its backlog takes no other one, and answers nothing
            resolved(monkeypatch, closed.getsockname(), full.getsockname(), receiver.server_address)
            assert post("http://shop.example/hook", timeout=4 * SOON) == Answer(True, "status 204")
            resolved(monkeypatch, receiver.server_address, closed.getsockname())
            assert post("http://shop.example:8080/hook") == Answer(True, "status 204")
            resolved(monkeypatch, full.getsockname(), closed.getsockname())
            assert post("http://shop.example/hook", timeout=SOON) == Answer(False, "ConnectionRefusedError 111")
            resolved(monkeypatch, full.getsockname())
            assert post("http://shop.example/hook", timeout=SOON) == Answer(False, "TimeoutError")
    assert [told.headers["host"] for told in receiver.told] == ["shop.example", "shop.example:8080"]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n"


@pytest.mark.parametrize("behaviour", [hanging, trickle(b""), trickle(b"HTTP/1.1 200 "), trickle(HEAD + b"X: ")])
def test_the_deadline_holds_also_against_a_receiver_that_hangs_or_trickles(behaviour: Behaviour) -> None:
    began = time.monotonic()
    with Receiver(behaviour) as receiver:
        answered = post(receiver, timeout=SOON)
    assert answered == Answer(False, "TimeoutError")
    assert SOON - 0.01 <= time.monotonic() - began < HANG / 3


def test_the_deadline_holds_also_against_a_receiver_that_sends_nothing_but_interim_responses() -> None:
    def behave(handler: Any) -> None:
        with contextlib.suppress(OSError):
            while not handler.server.over.is_set():
                handler.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100)

    with Receiver(behave) as receiver:
        assert post(receiver, timeout=SOON) == Answer(False, "TimeoutError")


def test_the_status_counts_also_when_the_content_never_ends() -> None:
    with Receiver(trickle(HEAD + b"\r\n")) as receiver:
        assert post(receiver, timeout=SOON) == Answer(True, "status 200")


def test_the_default_is_15_seconds() -> None:
    assert TIMEOUT == 15.0


def test_the_secrets_may_change_while_a_request_is_under_way() -> None:
    gate = threading.Event()

    def behave(handler: object) -> None:
        gate.wait(HANG)
        answer(204)(handler)  # type: ignore[arg-type]

    with Receiver(behave) as receiver:
        sender = WebhookSender(WebhookTarget.of(receiver.url()), SECRETS[:1])
        thread = threading.Thread(target=sender.post, args=(BODY,))
        thread.start()
        receiver.wait_for(lambda told: len(told) == 1)
        sender.secrets = SECRETS[1:]
        gate.set()
        thread.join(HANG)
        sender.post(BODY)
    assert [verified(each.headers, each.body, SECRETS[1]) for each in receiver.told] == [False, True]


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl makes the certificate")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=receiver",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", f"{path}.crt"],
                   check=True, capture_output=True, timeout=HANG)  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_https_works_where_the_certificate_is_trusted_and_nowhere_else(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=f"{certificate}.crt")
    with Receiver(context=context) as receiver:
        target = WebhookTarget.of(receiver.url())
        assert WebhookSender(target, SECRETS, context=trusting).post(BODY) == Answer(True, "status 204")
        assert post(receiver).said.startswith("SSLCertVerificationError")
    (told,) = receiver.told
    assert verified(told.headers, told.body)


def test_a_handshake_that_hangs_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system connects, and nobody says anything
        assert post(f"https://127.0.0.1:{silent.getsockname()[1]}/", timeout=SOON) == Answer(False, "TimeoutError")
