"""Lists of messages over HTTP: all or nothing, in slices, with a bound on what is held of large bodies."""
from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import bulk_requests
import request_decoding
from helpers import Clock
from http_doubles import DrivenFront, Peer, req
from http_protocol import HttpError, Limits
from message_model import MessageStatus
from providers import Receiver, Recorder
from restapi import RestApi
from smsproxy import InMemoryRepository, SmsProxy, SmsProxyConfig

MIB = 1024 * 1024
RETENTION = 100.0  # seconds
BULK = "/sms/bulk"
KEY = "Idempotency-Key: newsletter-7"
TEXT = "We are open on Sunday"


class Service:
    """The REST interface in a front that a test drives, over a repository in memory that nobody sends from."""

    def __init__(self, max_pending: int = 100_000, **options: Any) -> None:
        self.clock = Clock()
        self.repository = InMemoryRepository(RETENTION, clock=self.clock)
        config = SmsProxyConfig(batch_size=10, max_pending=max_pending)
        self.proxy = SmsProxy(Recorder(), config, repository=self.repository)
        self.front = DrivenFront(Limits(), RestApi(self.proxy, **options))

    def ask(self, document: object, *lines: str, path: str = "/sms/bulk") -> tuple[int, Any]:
        """Status and document of a POST on a connection of its own."""
        response = self.front.connect().send(posted(document, *lines, path=path)).response("POST")
        return response.status, json.loads(response.body)

    def ids(self, document: object, *lines: str) -> list[str]:
        """The IDs of a list that is accepted."""
        status, found = self.ask(document, *lines)
        assert (status, list(found)) == (202, ["Messages"]), found
        return [each["ID"] for each in found["Messages"]]


def posted(document: object, *lines: str, path: str = "/sms/bulk") -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return req(f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}", *lines, body=body)


def listed(numbers: Sequence[int], **beside: object) -> dict[str, object]:
    return {"Messages": [{"PhoneNumber": str(number)} for number in numbers], "Content": TEXT, **beside}


@pytest.fixture
def it() -> Iterator[Service]:
    service = Service()
    yield service
    service.front.close()


# All or nothing


def test_a_list_is_accepted_with_its_ids_in_order_and_defaults_for_what_a_message_does_not_say(it: Service) -> None:
    first = {"phone_number": "481", "Content": "Hi", "MaxDelay": 0, "maxage": 50}
    messages = [first, {"PhoneNumber": "482"}, {}]
    ids = it.ids({"MaxDelay": 60, "Messages": messages, "Content": TEXT, "PhoneNumber": "483"})
    assert [it.repository.get(each) for each in ids] == [MessageStatus.ACCEPTED] * 3
    batch = it.repository.claim(9, 0.0, flush=True).batch
    assert batch is not None
    found = {each.message.message_id: (each.message.phone_number, each.message.message, each.linger, each.max_age)
             for each in batch.entries}  # fmt: skip
    none = float("inf")
    expected = [("481", "Hi", 0, 50), ("482", TEXT, 60, none), ("483", TEXT, 60, none)]
    assert [found[each] for each in ids] == expected
    assert it.proxy.metrics.accepted.total == 3


def test_a_thousand_of_the_longest_default_are_one_list_and_one_more_is_not(it: Service) -> None:
    assert len(set(it.ids(listed(range(1_000), Content="\U0001f4e6" * 1_600)))) == 1_000
    status, found = it.ask(listed(range(1_001)))
    assert (status, found) == (400, {"Error": "Messages must have at most 1,000 messages"})
    assert it.repository.backlog() == 1_000


GOOD = {"PhoneNumber": "48", "Content": TEXT}
REFUSED: dict[str, tuple[object, str]] = {
    "no list": ({}, "Messages is missing"), "empty": ({"Messages": []}, "Messages is empty"),
    "not a list": ({"Messages": {}}, "Messages must be an array"), "null": ({"Messages": None}, "must be an array"),
    "twice": (b'{"Messages": [], "messages": []}', "Messages is given twice"),
    "default twice": (b'{"Content": "a", "content": "b", "Messages": []}', "Content is given twice"),
    "misspelt": ({"Mesages": [GOOD]}, "unknown field Mesages; did you mean Messages?"),
    "misspelt default": ({"MaxDelya": 1, "Messages": [GOOD]}, "unknown field MaxDelya; did you mean MaxDelay?"),
    "not an object": ([GOOD], "must be a JSON object"), "no body": (b"", "the body is empty"),
    "a form": (b"Messages=1", "form-encoded"), "not UTF-8": (b'{"\xff', "must be a JSON object in UTF-8"),
    "cut": (b'{"Messages": [{}', "Expecting ',' at line 1, column 17"), "no name": (b"{1", "property name"),
    "comma": (b'{"Messages": [{},]}', "Expecting value"), "behind": (b'{"Messages": [{}]} x', "Extra data"),
    "deep": (b'{"Messages": [' + b"[" * 100_000, "must be a JSON object in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("document", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_list_is_refused_with_its_reason(it: Service, document: object, error: str) -> None:
    status, found = it.ask(document)
    assert (status, list(found), error in found["Error"]) == (400, ["Error"], True), found


def test_a_list_means_the_same_wherever_its_text_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = r"""{"MaxDelay": 1234, "Messages": [{"PhoneNumber": "48", "Content": "a\ud83d\udce6\"b"},
        [true, null, -1.5e3], {}, "x\\", 12], "Content": "z"}"""
    [*_, expected] = request_decoding.decode_list(text.encode())
    for size in range(60, len(text) + 2):
        monkeypatch.setattr(request_decoding, "PIECE", size)
        assert [*request_decoding.decode_list(text.encode())][-1] == expected, size
        with pytest.raises(HttpError, match="Expecting value at line 2, column 31"):
            list(request_decoding.decode_list(text.replace("{}", "?}").encode()))


NUMBERS = ("0", "-0", "7", "604800", "1.5", "-2.25", "1e3", "1E+2", "12.5e-3", "1.0e+10")
OTHERS = ('"48"', '"a\\u00e9\\ud83d\\udce6\\n"', '""', "true", "false", "null", "[]", "[1, 1.5]", '{"a": -1e-2}')
BESIDE = ("PhoneNumber", "Content", "MaxDelay", "MaxAge")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_default_whose_number_is_cut_by_the_end_of_a_piece_is_read_as_a_whole(it: Service, number: str) -> None:
    head = b'{"Messages": [{"PhoneNumber": "48", "Content": "Hi"}], "MaxDelay": '
    for cut in range(len(number) + 1):
        body = head + b" " * (request_decoding.PIECE - len(head) - cut) + number.encode() + b"}"
        [*_, (defaults, _)] = request_decoding.decode_list(body)
        assert defaults == {"max_delay": float(number)}, cut


@pytest.mark.parametrize("seed", range(50))
def test_any_list_is_read_as_the_json_module_reads_it(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)

    def space() -> str:
        return "".join(chance.choices(" \t\r\n", k=chance.choice((0, 0, 1, 3, 30))))

    def joined(parts: Sequence[str]) -> str:
        return ",".join(f"{space()}{part}{space()}" for part in parts)

    def value() -> str:
        return chance.choice(chance.choice((NUMBERS, OTHERS)))

    for _ in range(20):
        members = [f'"{name}"{space()}:{space()}{value()}' for name in chance.sample(BESIDE, chance.randrange(5))]
        messages = joined([value() for _ in range(chance.randrange(1, 20))])
        members.insert(chance.randrange(len(members) + 1), f'"Messages"{space()}:{space()}[{messages}]')
        text = f"{space()}{{{joined(members)}}}{space()}"
        expected = json.loads(text, object_pairs_hook=tuple, parse_int=float)
        monkeypatch.setattr(request_decoding, "PIECE", chance.randrange(40, 120))
        [*_, (defaults, items)] = request_decoding.decode_list(text.encode())
        found = [*((request_decoding.FIELDS[name], each) for name, each in defaults.items()), ("Messages", items)]
        expected = [(name, math.nan if each is None else each) for name, each in expected]
        assert sorted(map(repr, found)) == sorted(map(repr, expected)), text  # the repr, since NaN equals nothing


@pytest.mark.parametrize("value", ["[" + "1," * 500_000 + "1]", '"' + "x" * 1_000_000 + '"', "1" * 1_000_000])
def test_a_value_that_takes_long_to_decode_is_refused_before_it_does(it: Service, value: str) -> None:
    for text in (f'{{"Messages": [{value}]}}', f'{{"MaxDelay": {value}, "Messages": []}}'):
        status, found = it.ask(text.encode())
        assert (status, "No end within 65,536 characters" in found["Error"]) == (400, True), found


def test_what_is_behind_an_unknown_field_is_never_looked_at(it: Service) -> None:
    assert it.ask(b'{"Mesages": ' + b"[" * 1_000_000)[1]["Error"].startswith("unknown field Mesages")


def test_each_message_that_is_wrong_is_named_by_its_place_and_nothing_is_accepted(it: Service) -> None:
    bad: dict[int, tuple[object, str]] = {
        1: ({"Content": "x"}, "PhoneNumber is missing"), 3: ("48", "a message must be a JSON object"),
        4: ({**GOOD, "PhoneNumber": "+48"}, "PhoneNumber must consist of the digits 0 to 9 only"),
        5: ({**GOOD, "Contnet": 1}, "unknown field Contnet; did you mean Content?"),
        7: ({**GOOD, "Content": None}, "Content must be a string"),
        998: ({**GOOD, "MaxAge": 0}, "MaxAge must be a number of seconds, more than 0 and at most 604,800"),
    }  # fmt: skip
    messages = [bad[place][0] if place in bad else GOOD for place in range(1_000)]
    status, found = it.ask({"Messages": messages})
    assert (status, found["Errors"]) == (400, [{"Index": place, "Error": text} for place, (_, text) in bad.items()])
    assert found["Error"] == "nothing is accepted; the message with index 1: PhoneNumber is missing"
    assert (it.repository.backlog(), it.proxy.metrics.accepted.total) == (0, 0)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("MaxDelay", "abc", "must be a number of seconds from 0 to 604,800"),
        ("MaxAge", -5, "must be a number of seconds, more than 0 and at most 604,800"),
        ("Content", None, "must be a string"), ("PhoneNumber", [], "must be a string"),
        ("PhoneNumber", "", "must not be empty"),
        ("Content", "x" * 1_601, "must have at most 1600 characters"), ("maxdelay", None, "must be a number"),
    ],
)  # fmt: skip
def test_a_default_that_is_wrong_is_refused_also_if_no_message_needs_it(
    it: Service, field: str, value: object, problem: str
) -> None:
    complete = {**GOOD, "MaxDelay": 0, "MaxAge": 50}
    status, found = it.ask({field: value, "Messages": [complete] * 3})
    named = "MaxDelay" if field == "maxdelay" else field
    assert (status, list(found), found["Error"].startswith(f"{named} {problem}")) == (400, ["Error"], True), found
    assert it.repository.backlog() == 0


def test_at_most_a_hundred_errors_are_named(it: Service) -> None:
    status, found = it.ask(listed(range(1_000), MaxDelay=-1))
    assert (status, [each["Index"] for each in found["Errors"]]) == (400, list(range(100)))


def test_a_list_for_which_there_is_no_room_is_refused_as_a_whole_and_one_that_never_fits_is_a_400() -> None:
    it = Service(max_pending=10)
    with_key = it.ids(listed(range(6)), KEY)
    response = it.front.connect().send(posted(listed(range(5)))).response("POST")
    assert (response.status, response.headers["retry-after"], it.repository.backlog()) == (503, "1", 6)
    assert it.ids(listed(range(6)), KEY) == with_key
    status, found = it.ask(listed(range(11)))
    assert (status, found) == (400, {"Error": "Messages must be a list of 1 to 10 messages"})
    assert it.proxy.metrics.refused.count("queue_full") == 5
    it.front.close()


# Idempotency


def test_the_same_list_gets_the_same_ids_and_any_other_is_refused(it: Service) -> None:
    ids = it.ids(listed([1, 2, 3]), KEY)
    messages = [{**GOOD, "PhoneNumber": str(number), "MaxAge": 9} for number in (1, 2, 3)]
    assert it.ids({"messages": messages, "MaxDelay": 7}, KEY) == ids
    others = [listed([1, 2]), listed([1, 2, 3, 4]), listed([3, 2, 1]), listed([1, 2, 3], Content="another")]
    for other in others:
        assert it.ask(other, KEY) == (422, {"Error": "the idempotency key was used for another list"})
    assert it.repository.backlog() == 3
    assert it.ids(listed([1, 2]), "Idempotency-Key: another") != ids[:2]


def test_texts_do_not_run_into_each_other(it: Service) -> None:
    first = {"Messages": [{"PhoneNumber": "1", "Content": "a\0\0002\0b"}, {"PhoneNumber": "3", "Content": "c"}]}
    it.ids(first, KEY)
    second = {"Messages": [{"PhoneNumber": "1", "Content": "a\0"}, {"PhoneNumber": "2", "Content": "b\0\0003\0c"}]}
    assert it.ask(second, KEY)[0] == 422


def test_a_key_of_a_list_is_not_that_of_a_single_message(it: Service) -> None:
    ids = it.ids(listed([1]), KEY)
    status, found = it.ask({"PhoneNumber": "9", "Content": "other"}, KEY, path="/sms")
    assert (status, found["ID"] in ids) == (202, False)


def test_a_list_of_which_some_are_forgotten_still_gets_its_ids(it: Service) -> None:
    ids = it.ids(listed([1, 2, 3]), KEY)
    it.repository.update_all({ids[0]: MessageStatus.DELIVERED})
    it.clock.advance(1.1 * RETENTION)
    while it.repository.forget() == 0.0:
        pass
    assert it.repository.get(ids[0]) is MessageStatus.NOT_FOUND
    assert it.ids(listed([1, 2, 3]), KEY) == ids
    assert it.ask(listed([9, 2, 3]), KEY)[0] == 422
    assert it.repository.get(ids[0]) is MessageStatus.NOT_FOUND, "it was sent once"


# What the head decides, and large bodies


def announced(size: int, line: str = "POST /sms/bulk HTTP/1.1", *lines: str) -> bytes:
    return req(line, f"Content-Length: {size}", *lines)


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (413, announced(MIB + 1)), (413, announced(64 * 1024 + 1, "POST /sms HTTP/1.1")),
        (404, announced(MIB, "POST /nowhere HTTP/1.1")), (405, announced(MIB, "PUT /sms/bulk HTTP/1.1")),
        (403, announced(MIB, "POST /sms/bulk HTTP/1.1", "Origin: http://evil.example")),
        (404, announced(MIB, "POST /reports HTTP/1.1")), (405, announced(9, "POST /metrics HTTP/1.1")),
        (411, req("POST /sms/bulk HTTP/1.1")),
    ],
)  # fmt: skip
def test_what_the_head_decides_is_told_before_the_body_comes(it: Service, status: int, head: bytes) -> None:
    peer = it.front.connect().send(head)
    assert peer.response("POST").status == status
    peer.wait_for_end()
    assert it.front.large_bodies[BULK] == 0


def test_a_key_that_is_missing_is_told_before_the_body_comes() -> None:
    it = Service(api_keys={"shop": "a-key-of-16-chars"})
    assert it.front.connect().send(announced(MIB)).response("POST").status == 401
    peer = it.front.connect().send(announced(MIB, "POST /sms/bulk HTTP/1.1", "Authorization: Bearer a-key-of-16-chars"))
    assert peer.is_silent
    it.front.close()


def test_of_forty_large_bodies_at_once_as_many_are_taken_in_as_may_be_held(it: Service) -> None:
    body = json.dumps(listed(range(1_000))).encode().ljust(MIB)
    head = announced(MIB)
    peers = [it.front.connect().send(head) for _ in range(40)]
    waiting = [peer for peer in peers if peer.is_silent]
    assert (len(waiting), it.front.large_bodies[BULK]) == (32, 32 * MIB)
    for peer in set(peers) - set(waiting):
        response = peer.response("POST")
        assert (response.status, response.headers["retry-after"]) == (503, "1")
    assert it.ask(listed([1]))[0] == 202, "a small list needs no share"
    for peer in waiting[:9]:
        peer.send(body)
    assert [peer.response("POST").status for peer in waiting[:9]] == [202] * 9
    assert it.front.large_bodies[BULK] == 23 * MIB
    assert it.front.connect().send(head + body).response("POST").status == 202


def test_reports_that_anybody_may_send_take_no_room_from_lists() -> None:
    it = Service(api_keys={"shop": "a-key-of-16-chars"}, receiver=Receiver())
    peers = [it.front.connect().send(announced(MIB, "POST /reports HTTP/1.1")) for _ in range(33)]
    assert [peer.is_silent for peer in peers].count(False) == 1
    large = json.dumps(listed([1])).encode().ljust(MIB)
    accepted = it.front.connect().send(posted(large, "Authorization: Bearer a-key-of-16-chars")).response("POST")
    assert accepted.status == 202
    assert it.front.connect().send(announced(MIB, "POST /reports HTTP/1.1")).response("POST").status == 503
    it.front.close()


def in_time(it: Service, peer: Peer) -> None:
    peer.send(json.dumps(listed([1])).encode().ljust(MIB))
    assert peer.response("POST").status == 202


def refused(it: Service, peer: Peer) -> None:
    peer.send(b"x" * MIB)
    assert peer.response("POST").status == 400


def too_slow(it: Service, peer: Peer) -> None:
    peer.send(b"{")
    it.front.wait(10.1)
    assert peer.response("POST").status == 408


def gone(it: Service, peer: Peer) -> None:
    peer.send(b"{" * 100_000)
    peer.reset()
    it.front.settle()


@pytest.mark.parametrize("end", [in_time, refused, too_slow, gone])
def test_what_is_held_of_a_large_body_is_given_back(it: Service, end: Any) -> None:
    peer = it.front.connect().send(announced(MIB))
    it.front.settle()
    assert it.front.large_bodies[BULK] == MIB
    end(it, peer)
    assert it.front.large_bodies[BULK] == 0


def test_a_client_that_goes_away_while_its_list_is_decoded_leaves_nothing_behind(
    it: Service, caplog: pytest.LogCaptureFixture
) -> None:
    data = posted(json.dumps({**listed(range(900)), "forged": 1}).encode().ljust(100_000))
    for iterations in range(60):  # until it has its response
        peer = it.front.connect().send(data)
        for _ in range(iterations):
            it.front.iterate(it.front.selector.select(0))
        peer.reset()
        it.front.settle()
        assert (it.front.large_bodies[BULK], it.front.open_connections) == (0, 0)
    assert it.front.counts.by_status()["/sms/bulk", 400] > 0
    assert (it.repository.backlog(), caplog.messages) == (0, [])
    assert it.ask(listed([1]))[0] == 202


# Side by side with others


def test_a_list_is_decoded_in_slices_and_other_requests_come_between(it: Service) -> None:
    many, single = it.front.connect(), it.front.connect()
    many.send(posted(listed(range(1_000))))
    served = 0
    while not it.front.counts.by_status()["/sms/bulk", 202]:
        single.socket.send(posted(GOOD, path="/sms"))
        it.front.iterate(it.front.selector.select(0))
        served = it.front.counts.by_status()["/sms", 202]
    assert served >= 20


def test_lists_that_wait_are_bounded_and_those_of_peers_that_are_gone_are_not_accepted(
    it: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_requests, "WAITING", 3)
    peers = [it.front.connect() for _ in range(4)]
    it.front.settle()
    for peer in peers:
        peer.socket.send(posted(listed([1])))
    it.front.iterate(it.front.selector.select(0))
    assert it.front.counts.by_status()["/sms/bulk", 503] == 1
    peers[1].reset()
    it.front.settle()
    assert (it.front.counts.by_status()["/sms/bulk", 202], it.repository.backlog()) == (2, 2)
