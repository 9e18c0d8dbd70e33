"""The official library takes what the webhook sends. It is installed in tox's `tools` environment only."""
from __future__ import annotations

import time
from typing import Any

import pytest

from change_outbox import Change, ChangeBody
from message_model import MessageStatus, Reason
from receivers import SECRETS, VERIFY_WITH_LIBRARY, Receiver, secret_line, verifier
from webhook_message import WebhookTarget, content_of, signed_headers
from webhook_sender import WebhookSender

standardwebhooks: Any = pytest.importorskip("standardwebhooks")

CHANGES = [Change("a", MessageStatus.DELIVERED), Change("\u0142", MessageStatus.FAILED, Reason.EXPIRED)]
BODY = ChangeBody.made(CHANGES, 1.8e9, float("inf"))


@pytest.mark.parametrize("secrets", [SECRETS[:1], SECRETS, SECRETS[::-1]])
def test_the_library_takes_a_request_signed_with_any_of_the_secrets(secrets: tuple[bytes, ...]) -> None:
    with Receiver() as receiver:
        assert WebhookSender(WebhookTarget.of(receiver.url()), secrets).post(BODY).ok
    (told,) = receiver.told
    for secret in secrets:
        parsed = standardwebhooks.Webhook(secret_line(secret)).verify(told.body.decode(), told.headers)
        assert parsed["data"]["Messages"][1] == {"ID": "\u0142", "Status": "FAILED", "Reason": "expired"}
        verifier(VERIFY_WITH_LIBRARY)(secret_line(secret), told.headers, told.body)


@pytest.mark.parametrize(("secret", "content", "at"), [
    (SECRETS[1], content_of(BODY), 0), (SECRETS[0], content_of(BODY) + b" ", 0),
    (SECRETS[0], content_of(BODY), -600)])  # fmt: skip
def test_the_library_refuses_another_secret_another_body_and_an_old_one(secret: bytes, content: bytes, at: int) -> None:
    headers = signed_headers(BODY.id, content_of(BODY), SECRETS[:1], time.time() + at)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        verifier(VERIFY_WITH_LIBRARY)(secret_line(secret), headers, content)
