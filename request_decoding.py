"""JSON in: the body of a request to the message that its sender wants sent. Strict about names, since a setting that is
silently ignored costs money or sends a stale code; about values the domain decides.
"""
from __future__ import annotations

import difflib
import json
import math
import re
from http import HTTPStatus
from typing import Any

from http_protocol import HttpError
from smsproxy import SendMessage

__all__ = ["FIELDS", "decode"]

# The domain's names and ours.
FIELDS = {"phone_number": "PhoneNumber", "message": "Content", "max_delay": "MaxDelay", "max_age": "MaxAge"}
FIELD_OF = {key: name for name, field in FIELDS.items() for key in (field, field.lower())}  # as written, or normalized
FORM = re.compile(r"[A-Za-z_]+=")
SPACE = " \t\n\r"  # RFC 8259, 2
QUOTED = 50  # characters of a client's field name that an error quotes

# Objects become tuples of name and value, which tells them from arrays; what is inside a field that is not ours is
# never looked at. Integers of any length become floats: the digits of a giant one would cost quadratic time. NaN is
# refused with the field that has it.
_decode = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float, parse_constant=float).raw_decode


def parse_object(body: bytes) -> tuple[tuple[str, Any], ...]:
    """The names and values of a JSON object. Raises `HttpError`."""
    problem = "the body must be a JSON object in UTF-8"
    try:
        text = body.decode()
        doc, end = _decode(text, 0 if text[:1] == "{" else len(text) - len(text.lstrip(SPACE)))
        if end < len(text) and (behind := text[end:].lstrip(SPACE)):
            raise json.JSONDecodeError("Extra data", text, len(text) - len(behind))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        if not body.strip():
            problem = "the body is empty; it must be a JSON object"
        elif FORM.match(body.decode("latin-1")):
            problem = "the body is form-encoded; it must be a JSON object"
        elif isinstance(error, json.JSONDecodeError):
            problem += f": {error.msg} at line {error.lineno}, column {error.colno}"
        raise HttpError(HTTPStatus.BAD_REQUEST, problem) from None
    if not isinstance(doc, tuple):
        raise HttpError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
    return doc


def decode(body: bytes) -> SendMessage:
    """The message of a request, its values as they are: the domain judges them. Raises `HttpError`.

    Names are matched without regard to case and underscores. One that we do not know, or one given twice, is refused: a
    setting that is silently ignored costs money.
    """
    found: dict[str, Any] = {}
    for name, value in parse_object(body):
        field = FIELD_OF.get(name) or FIELD_OF.get(name.replace("_", "").lower())
        if field is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, _unknown(name))
        if field in found:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"{FIELDS[field]} is given twice")
        found[field] = math.nan if value is None else value  # null is no value: None would stand for the default
    try:
        return SendMessage(found["phone_number"], found["message"], found.get("max_delay"), found.get("max_age"))
    except KeyError as error:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"{FIELDS[error.args[0]]} is missing") from None


def _unknown(name: str) -> str:
    """What is said of a field that is not ours. No digits are quoted: they may be a phone number."""
    quoted = re.sub(r"\d", "*", name[:QUOTED]) + ("..." if len(name) > QUOTED else "")
    known = [field.lower() for field in FIELDS.values()]
    near = difflib.get_close_matches(name[:QUOTED].replace("_", "").lower(), known, 1)
    return f"unknown field {quoted}" + (f"; did you mean {FIELDS[FIELD_OF[near[0]]]}?" if near else "")
