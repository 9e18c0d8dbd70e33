"""JSON in: the body of a request to the messages that its sender wants sent. Strict about names, since a setting that
is silently ignored costs money or sends a stale code; about values the domain decides.
"""
from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from http_protocol import HttpError
from smsproxy import LONGEST_LIST, SendMessage

__all__ = ["NAMES", "decode", "decode_list", "idempotency_key", "message_of"]

# The domain's names and ours.
FIELDS = {"phone_number": "PhoneNumber", "message": "Content", "max_delay": "MaxDelay", "max_age": "MaxAge"}
NAMES = {**FIELDS, "messages": "Messages"}
FIELD_OF = {key: name for name, field in FIELDS.items() for key in (field, field.lower())}  # as written, or normalized
FORM = re.compile(r"[A-Za-z_]+=")
SPACE = " \t\n\r"  # RFC 8259, 2
LONGEST_FORM_NAME = 1_000  # characters
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
LIST = "messages"
STEP = 8 * 1024  # characters of a list that are decoded at a time: some fifty messages, a fraction of a millisecond
PIECE = 64 * 1024  # characters of the longest value in a list, a message for example
LONGEST_ESCAPE = 12  # characters: of a pair of surrogates; the words of JSON are shorter
CUT = 3  # characters: a number that ends nearer to the end of a piece may go on, as 1 does in "1.", "1e" and "1e+"
NO_DEFAULTS: Mapping[str, Any] = {}
SPACES = re.compile(r"[ \t\n\r]*")  # RFC 8259, 2
QUOTED = 50  # characters of a client's field name that an error quotes

# Objects become tuples of name and value, which tells them from arrays; what is inside a field that is not ours is
# never looked at. Integers of any length become floats: the digits of a giant one would cost quadratic time. NaN is
# refused with the field that has it.
_decode = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float, parse_constant=float).raw_decode


def parse_object(body: bytes) -> tuple[tuple[str, Any], ...]:
    """The names and values of a JSON object. Raises `HttpError`."""
    try:
        text = body.decode()
        doc, end = _decode(text, 0 if text[:1] == "{" else len(text) - len(text.lstrip(SPACE)))
        if end < len(text) and (behind := text[end:].lstrip(SPACE)):
            raise json.JSONDecodeError("Extra data", text, len(text) - len(behind))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        raise _refusal(body, error) from None
    if not isinstance(doc, tuple):
        raise HttpError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
    return doc


def decode(body: bytes) -> SendMessage:
    """The message of a request, its values as they are: the domain judges them. Raises `HttpError`.

    Names are matched without regard to case and underscores. One that we do not know, or one given twice, is refused: a
    setting that is silently ignored costs money.
    """
    return message_of(parse_object(body), NO_DEFAULTS)


def message_of(doc: Any, defaults: Mapping[str, Any]) -> SendMessage:
    """The message of a JSON object, or of another value, which is refused; `defaults` stand in for missing fields."""
    if not isinstance(doc, tuple):
        raise HttpError(HTTPStatus.BAD_REQUEST, "a message must be a JSON object")
    found: dict[str, Any] = {}
    for name, value in doc:
        field = FIELD_OF.get(name)
        if field is None or field in found:  # otherwise `_field` would say the same
            field = _field(name, found)
        found[field] = math.nan if value is None else value  # null is no value: None would be the default
    if defaults:
        found = {**defaults, **found}
    try:
        return SendMessage(found["phone_number"], found["message"], found.get("max_delay"), found.get("max_age"))
    except KeyError as error:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"{FIELDS[error.args[0]]} is missing") from None


def decode_list(body: bytes) -> Iterator[tuple[Mapping[str, Any], Sequence[Any]]]:
    """The defaults and the messages of a request with a list, for `message_of`: as many as have been decoded, after
    each step that takes a fraction of a millisecond, and at the end all. Raises `HttpError`.

    The text is read by the value: what is behind an error, or more than may be in a list, costs nothing.
    """
    found: dict[str, Any] = {}
    items: list[Any] | None = None
    try:
        reader = _Reader(body.decode())
        for _ in reader.inside("{", "}"):
            name = reader.name()
            if _normalized(name) != LIST:
                field = _field(name, found, (NAMES[LIST],))
                found[field] = reader.value()
            elif items is not None:
                raise HttpError(HTTPStatus.BAD_REQUEST, "Messages is given twice")
            elif reader.symbol() != "[":
                raise HttpError(HTTPStatus.BAD_REQUEST, "Messages must be an array")
            else:
                items, begun = [], reader.at
                for _ in reader.inside("[", "]"):
                    if len(items) == LONGEST_LIST:
                        raise HttpError(HTTPStatus.BAD_REQUEST, f"Messages must have at most {LONGEST_LIST:,} messages")
                    items.append(reader.value())
                    if reader.at - begun >= STEP:
                        begun = reader.at
                        yield found, items
        reader.end()
    except (ValueError, RecursionError) as error:
        raise _refusal(body, error) from None
    if not items:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"Messages is {'missing' if items is None else 'empty'}")
    yield {field: math.nan if value is None else value for field, value in found.items()}, items


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """The key that the request has. Raises `HttpError`."""
    key = headers.get("idempotency-key")
    if key is not None and IDEMPOTENCY_KEY.fullmatch(key) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key


class _Reader:
    """Reads a JSON text value by value. Raises what the decoder raises."""

    def __init__(self, text: str) -> None:
        self._text, self.at = text, 0
        self._begin, self._piece = 0, text[:PIECE]

    def symbol(self) -> str:
        """The next character behind white space; it is not taken."""
        space = SPACES.match(self._text, self.at)
        self.at = space.end() if space else self.at
        return self._text[self.at : self.at + 1]

    def take(self, expected: str) -> None:
        """Takes this character."""
        if self.symbol() != expected:
            raise json.JSONDecodeError(f"Expecting '{expected}'", self._text, self.at)
        self.at += 1

    def value(self) -> Any:
        """Takes a value. It is decoded from a piece of the text, so that no value takes more than some milliseconds."""
        self.symbol()
        try:
            return self._value_in_piece()
        except ValueError:  # perhaps the end of the piece is in the value
            self._begin, self._piece = self.at, self._text[self.at : self.at + PIECE]
            return self._value_in_piece()

    def _value_in_piece(self) -> Any:
        begin, size = self._begin, len(self._piece)
        more = begin + size < len(self._text)
        try:
            value, end = _decode(self._piece, self.at - begin)
        except json.JSONDecodeError as error:
            # An error so near to the end, or a string without an end, may be none in the whole text.
            if more and (error.pos > size - LONGEST_ESCAPE or error.msg.startswith("Unterminated")):
                raise json.JSONDecodeError(f"No end within {PIECE:,} characters", self._text, self.at) from None
            raise json.JSONDecodeError(error.msg, self._text, begin + error.pos) from None
        if more and end > size - CUT and isinstance(value, float):
            raise json.JSONDecodeError(f"No end within {PIECE:,} characters", self._text, self.at)
        self.at = begin + end
        return value

    def name(self) -> str:
        """Takes the name of a member with its colon."""
        if self.symbol() != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", self._text, self.at)
        name: str = self.value()
        self.take(":")
        return name

    def inside(self, opening: str, closing: str) -> Iterator[None]:
        """Once for each member of an array or an object; whoever asks takes it."""
        self.take(opening)
        more = self.symbol() != closing
        while more:
            yield
            more = self.symbol() != closing
            if more:
                self.take(",")
        self.take(closing)

    def end(self) -> None:
        """Nothing but white space may be left."""
        if self.symbol():
            raise json.JSONDecodeError("Extra data", self._text, self.at)


def _refusal(body: bytes, error: Exception) -> HttpError:
    """Of a body that is no JSON object."""
    problem = "the body must be a JSON object in UTF-8"
    if not body.strip():
        problem = "the body is empty; it must be a JSON object"
    elif FORM.match(body[:LONGEST_FORM_NAME].decode("latin-1")):
        problem = "the body is form-encoded; it must be a JSON object"
    elif isinstance(error, json.JSONDecodeError):
        problem += f": {error.msg} at line {error.lineno}, column {error.colno}"
    return HttpError(HTTPStatus.BAD_REQUEST, problem)


def _field(name: str, found: Mapping[str, Any], others: Sequence[str] = ()) -> str:
    """The domain's name of a field that is not among those found; `others` are known, too."""
    field = FIELD_OF.get(name) or FIELD_OF.get(_normalized(name))
    if field is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, _unknown(name, others))
    if field in found:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"{FIELDS[field]} is given twice")
    return field


def _normalized(name: str) -> str:
    return name.replace("_", "").lower()


def _unknown(name: str, others: Sequence[str]) -> str:
    """What is said of a field that is not ours. No digits are quoted: they may be a phone number."""
    quoted = re.sub(r"\d", "*", name[:QUOTED]) + ("..." if len(name) > QUOTED else "")
    known = {field.lower(): field for field in (*FIELDS.values(), *others)}
    near = difflib.get_close_matches(_normalized(name[:QUOTED]), list(known), 1)
    return f"unknown field {quoted}" + (f"; did you mean {known[near[0]]}?" if near else "")
