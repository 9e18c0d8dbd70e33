"""What the webhook sends, and where to: the receiver's address, the body, the signatures. Values and rules only.

The format is that of https://www.standardwebhooks.com, version 1.0.0: a body is signed together with its ID and the
time of the attempt, so that a receiver can tell who sent it, and refuse what somebody replays later.
"""
from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import unquote_to_bytes, urlsplit

from change_outbox import ChangeBody
from message_model import ValidationError

__all__ = ["WebhookConfig", "WebhookTarget", "content_of", "retry_after", "signed_headers", "webhook_secrets"]

LONGEST_WAIT = 3_600.0  # seconds; bounds what a receiver can ask for with Retry-After
PORTS = {"http": 80, "https": 443}
SECRET = "whsec_"
SHORTEST_SECRET, LONGEST_SECRET = 24, 64  # bytes, as the specification recommends
MOST_SECRETS = 2  # the old one and the new one, while receivers change over


@dataclass(frozen=True, slots=True)
class WebhookTarget:
    """Where the requests go. Its `str` and `repr` show neither a password nor the path, which may hold a token."""

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)  # with the query
    authorization: str | None = field(repr=False)  # for `user:password@` in the URL

    @classmethod
    def of(cls, url: str) -> WebhookTarget:
        """The parts of a URL; raises `ValidationError`, which does not repeat it."""
        problem = ValidationError("webhook_url", "must be an http:// or https:// URL with a host, in ASCII")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host.encode("idna")  # as the look-up of the name does
        except ValueError:  # their texts quote the URL
            raise problem from None
        if not (re.fullmatch("[!-~]+", url) and parts.scheme in PORTS and host and port != 0):
            raise problem
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        basic = unquote_to_bytes(user) + b":" + unquote_to_bytes(password)
        authorization = f"Basic {base64.b64encode(basic).decode()}" if "@" in parts.netloc else None
        return cls(parts.scheme, host, port or PORTS[parts.scheme], path, authorization)

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class WebhookConfig:
    """Whom the webhook tells, and what it signs with."""

    target: WebhookTarget
    secrets: tuple[bytes, ...] = field(repr=False)


def webhook_secrets(text: str) -> tuple[bytes, ...]:
    """The secrets in a file: one or two lines, each `whsec_` and Base64; a line that begins with # is a comment.

    Raises `ValidationError`, which shows nothing of them.
    """
    secrets = []
    for place, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        prefix, secret = line.strip()[: len(SECRET)], line.strip()[len(SECRET) :]
        try:
            key = base64.b64decode(secret, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if prefix != SECRET or not SHORTEST_SECRET <= len(key) <= LONGEST_SECRET:
            bounds = f"{SHORTEST_SECRET} to {LONGEST_SECRET} bytes"
            raise ValidationError("webhook_secret_file", f"line {place} must be {SECRET} and the Base64 of {bounds}")
        secrets.append(key)
    if not 0 < len(secrets) <= MOST_SECRETS:
        raise ValidationError("webhook_secret_file", "must have one secret, or two while receivers change over")
    return tuple(secrets)


def content_of(body: ChangeBody) -> bytes:
    """The JSON text of a body, the same whenever it is made."""
    made = datetime.fromtimestamp(body.timestamp, timezone.utc).isoformat(timespec="milliseconds")
    messages = []
    for change in body.changes:
        message = {"ID": change.message_id, "Status": change.status.value}
        if change.reason is not None:
            message["Reason"] = change.reason.value
        messages.append(message)
    event = {"type": "sms.status", "timestamp": made.replace("+00:00", "Z"), "data": {"Messages": messages}}
    return json.dumps(event, separators=(",", ":")).encode()


def signed_headers(message_id: str, content: bytes, secrets: tuple[bytes, ...], now: float) -> dict[str, str]:
    """The headers of one attempt, at this time of the wall clock: with a signature for each secret."""
    timestamp = str(int(now))
    signed = f"{message_id}.{timestamp}.".encode() + content
    digests = [hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def retry_after(value: str | None, now: float) -> float:
    """The seconds that a Retry-After asks for (RFC 9110, 10.2.3: seconds, or a date), an hour at the most; 0.0 for
    what cannot be understood. `now` is the wall clock's."""
    text = (value or "").strip()
    if re.fullmatch("[0-9]+", text):
        return min(LONGEST_WAIT, float(text))
    try:
        date = parsedate_to_datetime(text)
        at = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return min(LONGEST_WAIT, max(0.0, at - now))
