"""Delivery reports that the provider pushes: what the client's `receive` gets, and what its errors become."""
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest

import pushed_reports
from helpers import HANG, Peer, RestServer, exchange, raw, request, serving
from providers import Receiver, Recorder
from request_groups import LANES
from smsproxy import MessageStatus, SmsProxy, SmsProxyConfig

MIB = 1024 * 1024
SECRET = "48123456789"
GOOD = {"PhoneNumber": SECRET, "Content": "Hi"}


@contextlib.contextmanager
def service(client: Recorder, **options: Any) -> Iterator[RestServer]:
    proxy = SmsProxy(client, SmsProxyConfig(max_delay=None))
    with contextlib.ExitStack() as stack:
        stack.callback(proxy.stop, HANG)
        proxy.start()
        receiver = client if isinstance(client, Receiver) else None
        yield stack.enter_context(serving(proxy, receiver=receiver, **options))


def test_receive_gets_the_query_the_headers_and_the_body_without_an_api_key() -> None:
    client = Receiver()
    with service(client, api_keys={"shop": "a-key-of-16-chars"}) as server:
        status, doc, headers = request(server, "POST", "/reports?token=a%20b&id=1", b"\0\xff", {"X-Signature": "v1"})
        assert (status, doc, "Content-Length" in headers, "Content-Type" in headers) == (204, b"", False, False)
        for path in ("/reports", "/reports?"):
            assert request(server, "POST", path, b"")[0] == 204
    assert [(query, body) for query, _, body in client.received] == [
        ("token=a%20b&id=1", b"\0\xff"), ("", b""), ("", b"")]  # fmt: skip
    assert client.received[0][1]["x-signature"] == "v1"


def test_reports_that_receive_puts_into_updates_are_applied() -> None:
    class Pushed(Receiver):
        def receive(self, query: str, headers: Any, body: bytes) -> None:
            self.report({body.decode(): "DELIVERED"})
            for updates in self.subscribers:
                updates.join()

    with service(Pushed()) as server:
        message_id = request(server, "POST", "/sms", GOOD)[1]["ID"]
        assert request(server, "POST", "/reports", message_id.encode())[0] == 204
        assert server.proxy.get_status(message_id) is MessageStatus.DELIVERED


ERRORS: list[tuple[BaseException, int, str]] = [
    (ValueError(SECRET), 400, "the client cannot read this report"),
    (UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), 400, "the client cannot read this report"),
    (PermissionError(SECRET), 401, "the client does not trust this report"),
    (RuntimeError(SECRET), 500, "internal error"), (SystemExit(SECRET), 500, "internal error"),
    (asyncio.CancelledError(SECRET), 500, "internal error"), (KeyboardInterrupt(SECRET), 500, "internal error"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "status", "text"), ERRORS)
def test_what_receive_raises_is_told_by_its_kind_and_logged_once_by_its_type(
    error: BaseException, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with service(Receiver(error)) as server:
        for _ in range(LANES + 1):  # and no lane stays occupied
            assert request(server, "POST", f"/reports?{SECRET}", SECRET.encode())[:2] == (status, {"Error": text})
        assert request(server, "POST", "/sms", GOOD)[0] == 202
    lines = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert [line for line in lines if "receive" in line] == [f"the client's receive raises: {type(error).__name__}"]
    assert SECRET not in caplog.text


def test_without_receive_there_is_no_such_path() -> None:
    with service(Recorder()) as server:
        assert request(server, "POST", "/reports", b"x")[0] == 404


def test_a_report_has_the_limits_of_a_large_body_and_no_web_page_sends_one() -> None:
    client = Receiver()
    with service(client) as server:
        assert request(server, "POST", "/reports", bytes(MIB))[0] == 204
        assert request(server, "POST", "/reports", bytes(MIB + 1))[0] == 413
        assert request(server, "POST", "/reports", b"x", {"Origin": "http://evil.example"})[0] == 403
        assert request(server, "GET", "/reports")[0] == 405
    assert [len(body) for *_, body in client.received] == [MIB]


def test_a_receive_that_blocks_slows_nobody_else_and_what_waits_for_it_is_bounded(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushed_reports, "WAITING", 5)
    client = Receiver(waits=True)
    with service(client) as server, contextlib.ExitStack() as stack:
        stack.callback(client.opened.set)
        peers = [stack.enter_context(Peer(server)) for _ in range(LANES + 5)]
        for place, peer in enumerate(peers):
            peer.send(raw("POST", "/reports", b"x"))
            if place < LANES:
                assert client.entered.acquire(timeout=HANG)
        message_id = request(server, "POST", "/sms", GOOD)[1]["ID"]
        assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, {"Status": "ACCEPTED"})
        assert request(server, "POST", "/sms/bulk", {"Messages": [GOOD]})[0] == 202
        status, _, headers = exchange(server, raw("POST", "/reports", b"x"))
        assert (status, headers["Retry-After"], client.received) == (503, "5", [])
        client.opened.set()
        assert [peer.receive()[0] for peer in peers] == [204] * (LANES + 5)
    assert len(client.received) == LANES + 5
