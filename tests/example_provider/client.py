"""A complete `FastSmsingClient` over HTTP, on the standard library alone: copy it and fit it to your provider.

The provider it talks to takes `Authorization: Bearer <token>` and offers

    POST /messages  {"Messages": [{"ID": "...", "To": "48123456789", "Text": "Hi"}, ...]}
        202 when it took all of them: one paid request
    GET /reports?after=<cursor>
        200 {"Reports": [{"ID": "...", "Status": "sent"}, ...], "Next": "<cursor>"}; oldest first, kept until
        a later cursor acknowledges them, so an empty cursor fetches what an earlier process has missed

Polling needs no port that the provider can reach. No error text holds a number, a text or the token.
"""
from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlencode, urlsplit

from fastsmsing import FastSmsingError, Message, MessageStatus, RejectedError

__all__ = ["HttpClient", "make_client"]

log = logging.getLogger("smsproxy.provider")

TRY_AGAIN = {408, 425, 429}  # the 4xx that speak of the moment, not of the batch (RFC 9110, 15.5.9; RFC 8470; RFC 6585)
LARGEST_ANSWER = 1024 * 1024  # bytes; reports come in pages, so a larger answer is none of ours
LONGEST_WAIT = 3_600.0  # seconds; whatever a Retry-After says
STATUSES = {"sent": MessageStatus.CONFIRMED, "delivered": MessageStatus.DELIVERED, "undeliverable": MessageStatus.FAILED}
Updates = queue.Queue[Mapping[str, object] | None] if False else queue.Queue  # subscriptable at run time only for mypy
